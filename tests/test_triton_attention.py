"""The Triton attention kernels, interpreted where there is no GPU: numbers, gradients, memory, determinism, mutants."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mmfast
from mmfast import Layout, ModalityMask
from mmfast.ops import _dispatch
from mmfast.ops import attention as op
from mmfast.reference.attention import dropout_keep
from mmfast.testing import shapes
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

pytestmark = pytest.mark.skipif(
    _dispatch.no_triton is not None or not (_dispatch.interpreted or torch.cuda.is_available()),
    reason=_dispatch.no_triton or "kernels are compiled and there is no GPU",
)

DEVICE = "cpu" if _dispatch.interpreted else "cuda"
DTYPES = (torch.float32, torch.float16) if _dispatch.interpreted else (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(layout_q, layout_k=None, heads=2, heads_k=None, dim=16, dtype=torch.float32, seed=0):
    layout_k = layout_q if layout_k is None else layout_k
    generator = torch.Generator().manual_seed(seed)
    sizes = [(layout_q.total, heads), *[(layout_k.total, heads_k or heads)] * 2, (layout_q.total, heads)]
    return [torch.randn(*size, dim, generator=generator).to(DEVICE, dtype) for size in sizes]


def results(tensors, *args, backend="triton", **options):
    *qkv, dout = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    args = [x.to(DEVICE) if isinstance(x, Layout) else x for x in args]
    if options.get("dropout_seed") is not None:
        options["dropout_seed"] = options["dropout_seed"].to(DEVICE)
    out, lse = mmfast.attention(*qkv, *args, return_lse=True, backend=backend, **options)
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, qkv, dout))]


def check(tensors, *args, **options):
    """Kernels against the oracle, by the error rule; returns the kernels' results."""
    with poisoned_empty():
        actual = results(tensors, *args, **options)
    oracle = results([x.double() for x in tensors], *args, backend="reference", **options)
    peer = results(tensors, *args, backend="reference", **options)
    for name, a, o, p in zip(NAMES, actual, oracle, peer):
        assert_close_to_oracle(name, a, o.double(), p, gradient=name.startswith("d"))
    return actual


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile sizes of interpreted kernels; on a GPU nothing, its configurations are what is tested."""
    from mmfast.kernels import _attention_configs as configs

    def change(kernel, *sizes):
        monkeypatch.setitem(configs.INTERPRETED_TILES, kernel, (*sizes, 4, 1))

    return change


# Numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_self_and_cross(dtype):
    layout, other = Layout.from_lengths([17, 33, 70, 1]), Layout.from_lengths([3, 100, 0, 65])
    check(inputs(layout, dtype=dtype), layout, None, ModalityMask.causal())
    check(inputs(layout, other, heads=1, dtype=dtype), layout, other)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
def test_edge_lengths(length):
    layout, other = Layout.from_lengths([length, 3]), Layout.from_lengths([33, 65])
    check(inputs(layout, heads=1), layout, None, ModalityMask.causal())
    check(inputs(layout, other, heads=1), layout, other)


@pytest.mark.slow
@pytest.mark.parametrize("length", [239, 799, 1023])
def test_long_edge_lengths(length, tiles):
    for kernel in ("forward", "dkdv", "dq"):
        tiles(kernel, 128, 64)
    layout = Layout.from_lengths([length, 3])
    check(inputs(layout, heads=1), layout, None, ModalityMask.causal())


@pytest.mark.parametrize("dim", [8, 16, 40, 64, 80, 128, 256])
def test_head_dimensions(dim):
    layout, other = Layout.from_lengths([20, 40]), Layout.from_lengths([70, 31])
    check(inputs(layout, other, 1, dim=dim, dtype=torch.float16), layout, other)
    check(inputs(layout, other, 1, dim=dim), layout, other, ModalityMask.causal())


@pytest.mark.parametrize("heads, heads_k", [(4, 2), (6, 2), (8, 1)])
def test_grouped_heads(heads, heads_k):
    layout = Layout.from_lengths([1, 40])
    check(inputs(layout, None, heads, heads_k), layout, None, ModalityMask.causal())


@pytest.mark.parametrize(
    "lengths_q, lengths_k",
    [
        ([0, 5, 0], [4, 6, 0]),
        ([5, 5], [0, 7]),
        ([0, 0], [3, 0]),
        ([3, 0], [0, 0]),
        ([0], [0]),
        ([], []),
    ],
)
def test_empty_samples(lengths_q, lengths_k):
    layout, other = Layout.from_lengths(lengths_q), Layout.from_lengths(lengths_k)
    for mask in (None, ModalityMask.causal()):
        out, lse, dq, dk, dv = check(inputs(layout, other), layout, other, mask)
    for sample, (nq, nk) in enumerate(zip(lengths_q, lengths_k)):
        rows_q = slice(*layout.cu_seqlens[sample : sample + 2].tolist())
        rows_k = slice(*other.cu_seqlens[sample : sample + 2].tolist())
        if not nk:
            assert not out[rows_q].any() and not dq[rows_q].any() and bool((lse[:, rows_q] == -torch.inf).all())
        if not nq:
            assert not dk[rows_k].any() and not dv[rows_k].any()


def test_many_samples():
    lengths = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(3))
    layout = Layout.from_lengths(lengths)
    check(inputs(layout, heads=1), layout, None, ModalityMask.causal())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, dtype):
    layout = Layout.from_lengths([17, 70])
    check(inputs(layout, dtype=dtype), layout, None, ModalityMask.causal(), softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_softmax_scale(scale):
    layout = Layout.from_lengths([17, 70])
    check(inputs(layout), layout, None, ModalityMask.causal(), softmax_scale=scale)
    check(inputs(layout), layout, softmax_scale=scale, softcap=2.0)


def test_large_scores_do_not_overflow():
    layout = Layout.from_lengths([70])
    q, k, v, dout = inputs(layout)
    assert all(bool(x.isfinite().all()) for x in results([q * 300, k * 300, v, dout], layout))


# Masks


def documents(time, modalities):
    layout = shapes.interleaved([[(0, 9), (1, 40), (0, 20)], [(1, 33), (0, 3)], [(0, 5)]], ("text", "image"))
    return layout.with_time(time, modalities=modalities) if time != "index" else layout


MASKS = {
    "early_fusion": (ModalityMask.early_fusion(), "segment_start", ("image",)),
    "early_fusion_window": (ModalityMask.early_fusion(window=(15, -1)), "segment_start", ("image",)),
    "prefix_lm": (ModalityMask.prefix_lm(), "prefix", ("image",)),
    "q_former_contrastive": (ModalityMask.q_former("contrastive", "image"), "index", ()),
    "q_former_matching": (ModalityMask.q_former("matching", "image"), "index", ()),
    "q_former_generation": (ModalityMask.q_former("generation", "image"), "index", ()),
    "bottleneck": (ModalityMask.bottleneck({"text": "image"}), "index", ()),
    "co_attention": (ModalityMask.co_attention(), "index", ()),
    "dual_encoder": (ModalityMask.dual_encoder(), "index", ()),
    "block_diffusion": (ModalityMask.block_diffusion("text", "image"), "media_count", ("image",)),
    "past": (ModalityMask(default="past"), "index", ()),
    "same": (ModalityMask(default="same"), "media_count", ("image",)),
    "none": (ModalityMask(), "index", ()),
    "full_window": (ModalityMask.full(window=(20, 5)), "index", ()),
    "causal_window": (ModalityMask.causal(window=(40, -1)), "index", ()),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, time, modalities = MASKS[name]
    layout = documents(time, modalities)
    check(inputs(layout, heads=1), layout, None, mask)


@pytest.mark.parametrize("latest", [True, False])
def test_flamingo(latest):
    layout = shapes.interleaved([[(0, 9), (1, 40), (0, 20), (1, 8), (0, 5)], [(1, 33), (0, 3)]], ("text", "image"))
    layout = layout.with_time("media_count", modalities=("image",))
    text, image = layout.select("text")[0], layout.select("image")[0]
    check(inputs(text, image, 4, 2), text, image, ModalityMask.flamingo(latest=latest))


def test_sixteen_modalities_with_random_rules_and_times():
    generator = torch.Generator().manual_seed(5)
    for number in range(3):
        rules = torch.randint(0, 5, (16, 16), generator=generator).tolist()
        mask = ModalityMask({(a, b): rules[a][b] for a in range(16) for b in range(16)}, window=(-1, 30 + number))
        lengths = (50, 20, 3)
        layout = dataclasses.replace(
            Layout.from_lengths(lengths),
            modality=torch.randint(0, 16, (73,), generator=generator).to(torch.uint8),
            time=torch.randint(-9, 9, (73,), generator=generator).to(torch.int32),
            start=torch.tensor([0, 7, -3], dtype=torch.int32),
        )
        check(inputs(layout, heads=1, seed=number), layout, None, mask)


def test_times_and_positions_at_the_ends_of_their_range():
    big = 2**31 - 1
    layout = dataclasses.replace(
        Layout.from_lengths([3, 40]),
        time=torch.tensor([-big - 1, 0, big] + [big] * 20 + [-big - 1] * 20).to(torch.int32),
        start=torch.tensor([-big - 1, big - 40], dtype=torch.int32),
    )
    for rule in ("causal", "past", "same"):
        check(inputs(layout, heads=1), layout, None, ModalityMask(default=rule, window=(big, big)))


def plans(layout, other, mask, block_q, block_k, own, sort=True):
    from mmfast.kernels import _attention_plan as plan

    sides = [plan.Side(*(getattr(x, f) for f in op._FIELDS), x.total) for x in (layout.to(DEVICE), other.to(DEVICE))]
    kernel_mask = plan.mask_of(mask.table(layout.names, other.names), *mask.window)
    return plan.plan(*sides, kernel_mask, block_q, block_k, own, sort)


@pytest.mark.parametrize("name", ["early_fusion_window", "block_diffusion", "causal_window", "q_former_generation"])
@pytest.mark.parametrize("own", ["queries", "keys"])
def test_a_plan_lists_what_the_dense_mask_shows(name, own):
    """Skipped tiles hold no visible pair, full ones only such, and no tile that could be decided is left partial."""
    mask, time, modalities = MASKS[name]
    layout = documents(time, modalities)
    seen = mask.visible(layout)
    block_q, block_k = 16, 32
    plan = plans(layout, layout, mask, block_q, block_k, own)
    other_block = block_k if own == "queries" else block_q
    covered = torch.zeros(layout.total)
    work = []
    for number, record in enumerate(plan.records.tolist()):
        row, valid, extent, begin, end = record[1], record[2], record[3], record[9], record[10]
        covered[row : row + extent] += 1
        full, partial = plan.counts[number].tolist()
        work.append(full + partial)
        listed = plan.lists[number].tolist()
        fulls, partials = set(listed[:full]), set(listed[len(listed) - partial :])
        assert len(fulls) == full and len(partials) == partial and not fulls & partials
        for tile in range(-(-(end - begin) // other_block) if valid else 0):
            rows = slice(row, row + valid)
            others = slice(begin + tile * other_block, min(end, begin + (tile + 1) * other_block))
            cells = seen[rows, others] if own == "queries" else seen[others, rows]
            if tile in fulls:
                assert cells.all() and others.stop - others.start == other_block
            elif tile not in partials:
                assert not cells.any()
    assert bool((covered == 1).all())
    order = plan.order.tolist()
    assert sorted(order) == list(range(len(order)))
    assert [work[i] for i in order] == sorted(work, reverse=True)
    skipped = plan.records[:, 2].gt(0).sum() * 3 - plan.counts.sum()
    assert skipped > 0 or own == "keys"


# Dropout


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_reference_s(dtype):
    layout, other = Layout.from_lengths([17, 40]), Layout.from_lengths([70, 130])
    seed = torch.tensor([-(2**40) + 12345])
    for mask in (None, ModalityMask.full(window=(30, 90))):
        check(inputs(layout, other, 2, 1, dtype=dtype), layout, other, mask, dropout_p=0.3, dropout_seed=seed)


def test_dropout_pattern_bit_for_bit():
    """With v the identity the output shows which weights stayed."""
    layout, other = Layout.from_lengths([9, 11]), Layout.from_lengths([128, 100])
    q, k, _, _ = inputs(layout, other, heads=2, dim=128)
    v = torch.cat([torch.eye(128), torch.eye(128)[:100]])[:, None].expand(-1, 2, -1).to(DEVICE)
    seed = torch.tensor(77, device=DEVICE)
    layout_q, layout_k = layout.to(DEVICE), other.to(DEVICE)
    out = mmfast.attention(q, k, v, layout_q, layout_k, dropout_p=0.4, dropout_seed=seed, backend="triton")
    for sample, (rows, n) in enumerate(((slice(0, 9), 128), (slice(9, 20), 100))):
        kept = dropout_keep(seed, 0.4, sample, range(2), rows.stop - rows.start, n)
        assert torch.equal(out[rows].transpose(0, 1)[..., :n] != 0, kept)


# Layouts and memory


def test_cached_queries():
    keys, queries = Layout.from_lengths([40, 200, 7]), Layout.from_lengths([1, 20, 7])
    queries = dataclasses.replace(queries, start=keys.lengths() - queries.lengths())
    out, *_ = check(inputs(queries, keys, 4, 1), queries, keys, ModalityMask.causal())
    assert out.abs().sum() > 0


def test_padded_tensors_by_seqused():
    layout = Layout.padded(4, 70, torch.tensor([3, 64, 0, 70], dtype=torch.int32))
    out, lse, *gradients = check(inputs(layout, heads=1), layout, None, ModalityMask.causal())
    outside = layout.samples() == layout.batch
    assert not any(x[outside].any() for x in (out, *gradients)) and bool((lse[:, outside] == -torch.inf).all())


@pytest.mark.parametrize("mask", [None, ModalityMask.causal()])
def test_nan_outside_the_layout_changes_no_bit(mask):
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([2, 19, 19, 90], [1, 71, 75, 120]))
    layout = Layout(cu_q, seqused=torch.tensor([16, 0, 68], dtype=torch.int32), time=torch.arange(100).int())
    other = Layout(cu_k, seqused=torch.tensor([65, 4, 40], dtype=torch.int32), time=torch.arange(130).int())
    tensors = inputs(layout, other, heads=1)
    outside_q, outside_k = layout.samples() == layout.batch, other.samples() == other.batch
    poisoned = [x.clone() for x in tensors]
    for x, outside in zip(poisoned, (outside_q, outside_k, outside_k, outside_q)):
        x[outside.to(DEVICE)] = torch.nan
    clean = results(tensors, layout, other, mask)
    with poisoned_empty():
        dirty = results(poisoned, layout, other, mask)
    for name, a, b in zip(NAMES, clean, dirty):
        assert torch.equal(a, b), name
    out, lse, dq, dk, dv = dirty
    for x, outside in ((out, outside_q), (dq, outside_q), (dk, outside_k), (dv, outside_k)):
        assert outside.any() and not x[outside].any()
    assert bool((lse[:, outside_q] == -torch.inf).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value):
    layout, other = Layout.from_lengths([40, 40, 9]), Layout.from_lengths([30, 70, 65])
    tensors = inputs(layout, other, heads=1)
    dirty = [x.clone() for x in tensors]
    rows = [(slice(40, 80), slice(80, 89)), (slice(30, 100), slice(100, 165))]
    for x, side in zip(dirty, (0, 1, 1, 0)):
        x[rows[side][0]] = value
    mask = ModalityMask.full(window=(20, 20))
    clean, spoiled = results(tensors, layout, other, mask), results(dirty, layout, other, mask)
    for name, a, b, side in zip(NAMES, clean, spoiled, (0, 0, 0, 1, 1)):
        if name == "lse":
            a, b = a.T, b.T
        assert not b[rows[side][0]].isfinite().all(), name
        first = slice(0, rows[side][0].start)
        assert torch.equal(a[first], b[first]) and torch.equal(a[rows[side][1]], b[rows[side][1]]), name


def test_lengths_that_lie_about_the_tensors_stay_inside_them():
    """On a GPU nobody looks at cu_seqlens, but the kernels clamp it."""
    layout = Layout.from_lengths([10, 20, 40]).to(DEVICE)
    q, k, v, _ = (x.requires_grad_() for x in inputs(layout))
    layout.cu_seqlens.copy_(torch.tensor([-7, 10, 500, 2**31 - 1]))
    mmfast.attention(q, k, v, layout, None, ModalityMask.causal(), backend="triton").sum().backward()


def test_strided_views():
    layout = Layout.from_lengths([17, 40])
    qkv = torch.randn(57, 3, 2, 64).to(DEVICE)
    dout = torch.randn(57, 2, 64).to(DEVICE)
    views = [*qkv.unbind(1), dout]
    odd = torch.randn(57, 2, 71).to(DEVICE)[..., 1:65]
    actual = results(views, layout) + results([odd, odd, odd, dout[:, :1].expand(57, 2, 64)], layout)
    expected = results([x.contiguous() for x in views], layout)
    expected += results([odd.contiguous()] * 3 + [dout[:, :1].expand(57, 2, 64).contiguous()], layout)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


# Few programs share their tiles among several; the order of sums is fixed


@pytest.mark.parametrize("heads, heads_k", [(2, 2), (4, 1), (3, 1)])
def test_short_queries_onto_long_keys(heads, heads_k):
    queries, keys = Layout.from_lengths([1, 7]), Layout.from_lengths([140, 130])
    tensors = inputs(queries, keys, heads, heads_k)
    check(tensors, queries, keys, ModalityMask.full(window=(-1, 120)))
    check(tensors, queries, keys, dropout_p=0.2, dropout_seed=torch.tensor(4))


def test_long_queries_onto_short_keys():
    queries, keys = Layout.from_lengths([150, 70]), Layout.from_lengths([3, 9])
    check(inputs(queries, keys, 2, 1), queries, keys)


def test_the_number_of_parts_depends_on_shapes_only():
    from mmfast.kernels import _attention_configs as configs

    device = torch.device("cpu")  # 16 multiprocessors
    assert [configs.parts(n, 100, device) for n in (1, 2, 8, 16, 32, 1000)] == [16, 16, 4, 2, 1, 1]
    assert [configs.parts(1, n, device) for n in (0, 1, 3, 4, 9, 40)] == [1, 1, 1, 2, 4, 16]


def test_repeated_runs_are_bit_equal():
    queries, keys = Layout.from_lengths([5, 33]), Layout.from_lengths([130, 65])
    tensors = inputs(queries, keys, 2, 1)
    first = results(tensors, queries, keys)
    for _ in range(2 if _dispatch.interpreted else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, results(tensors, queries, keys)))


# PyTorch around it


def test_opcheck():
    layout = dataclasses.replace(
        Layout.from_lengths([5, 9]), modality=torch.zeros(14, dtype=torch.uint8), time=torch.arange(14).int()
    ).to(DEVICE)
    q, k, v, _ = (x.requires_grad_() for x in inputs(layout, heads=2, heads_k=1))
    fields = [getattr(layout, f) for f in op._FIELDS]
    rules = ModalityMask.causal().table()
    arguments = (q, k, v, *fields, *fields, rules, -1, -1, 0.25, 0.0, 0.5, torch.tensor([3], device=DEVICE), "triton")
    torch.library.opcheck(op._attention.op, arguments)


def test_compiles_once_for_ragged_batches():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, v, layout):
        return mmfast.attention(q, k, v, layout, None, ModalityMask.causal(), backend="triton").square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for seed in range(4):
        layout = Layout.from_lengths([3 + seed, 9, *[4] * seed]).to(DEVICE)
        q, k, v, _ = (x.requires_grad_() for x in inputs(layout, heads=1, seed=seed))
        loss = compiled(q, k, v, layout)
        loss.backward()
        torch.testing.assert_close(loss, function(q, k, v, layout))
        assert q.grad is not None
    assert counter.frame_count <= 2, counter.frame_count
    torch._dynamo.reset()


def test_half_precision_under_autocast():
    layout = Layout.from_lengths([17, 5]).to(DEVICE)
    tensors = inputs(layout)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = mmfast.attention(*tensors[:3], layout, backend="triton")
    assert torch.equal(out, mmfast.attention(*(x.half() for x in tensors[:3]), layout, backend="triton"))


def test_double_backward_raises():
    layout = Layout.from_lengths([5]).to(DEVICE)
    q, k, v, dout = (x.requires_grad_() for x in inputs(layout))
    (dq,) = torch.autograd.grad(mmfast.attention(q, k, v, layout, backend="triton"), q, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        dq.sum().backward()


def test_the_other_backend_is_refused_with_a_reason():
    layout = Layout.from_lengths([5]).to(DEVICE)
    q, k, v, _ = (x.double() for x in inputs(layout))
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: dtype float64"):
        mmfast.attention(q, k, v, layout, backend="triton")
