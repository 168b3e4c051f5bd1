"""The CUDA attention kernels: on a GPU, or each thread as a fibre on the CPU. Numbers, masks, memory, order of sums."""

from __future__ import annotations

import dataclasses
import os
import random

import cuda_shim
import pytest
import torch
from cuda_cases import DEVICE, cuda_kernels, cuda_module, needs_cuda  # noqa: F401

import mmfast
from mmfast import Layout, ModalityMask, _native
from mmfast.ops import _attention_cuda
from mmfast.ops import attention as op
from mmfast.reference.attention import dropout_keep
from mmfast.testing import shapes
from mmfast.testing.numeric import assert_close_to_oracle, poisoned_empty

pytestmark = needs_cuda

DTYPES = (torch.bfloat16, torch.float16)
NAMES = ("out", "lse", "dq", "dk", "dv")


def inputs(layout_q, layout_k=None, heads=1, heads_k=None, dim=64, dtype=torch.float16, seed=0):
    layout_k = layout_q if layout_k is None else layout_k
    generator = torch.Generator().manual_seed(seed)
    sizes = [(layout_q.total, heads), *[(layout_k.total, heads_k or heads)] * 2, (layout_q.total, heads)]
    return [torch.randn(*size, dim, generator=generator).to(DEVICE, dtype) for size in sizes]


def results(tensors, *args, backend="cuda", **options):
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
def parts(monkeypatch):
    """Divides the work of each tile among so many blocks."""
    return lambda count: monkeypatch.setattr(_attention_cuda, "parts", lambda *_: count)


# Numbers


def test_ragged_self_and_cross():
    layout, other = Layout.from_lengths([17, 33, 70, 1]), Layout.from_lengths([3, 100, 0, 65])
    check(inputs(layout), layout, None, ModalityMask.causal())
    check(inputs(layout, other, 2, 1), layout, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
def test_head_dimensions_and_dtypes(dim, dtype):
    layout, other = Layout.from_lengths([9, 30]), Layout.from_lengths([70, 20])
    check(inputs(layout, other, 4, 2, dim, dtype), layout, other, ModalityMask.full(window=(60, 30)))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
def test_edge_lengths(length):
    layout, other = Layout.from_lengths([length, 3]), Layout.from_lengths([16, 65])
    check(inputs(layout, other), layout, other)
    check(inputs(other, layout), other, layout, ModalityMask.full(window=(70, 70)))


@pytest.mark.parametrize("heads, heads_k", [(6, 2), (8, 1), (5, 1)])
def test_grouped_heads(heads, heads_k):
    layout, other = Layout.from_lengths([1, 21]), Layout.from_lengths([30, 40])
    check(inputs(layout, other, heads, heads_k), layout, other, ModalityMask.causal(window=(25, -1)))


@pytest.mark.parametrize(
    "lengths_q, lengths_k",
    [([0, 5, 0], [4, 6, 0]), ([5, 5], [0, 7]), ([0, 0], [3, 0]), ([3, 0], [0, 0]), ([0], [0]), ([], [])],
)
@pytest.mark.parametrize("count", [1, 3])
def test_empty_samples(lengths_q, lengths_k, count, parts):
    parts(count)
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
    layout = Layout.from_lengths(torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(3)))
    check(inputs(layout), layout, None, ModalityMask.causal())


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap):
    layout, other = Layout.from_lengths([17, 30]), Layout.from_lengths([9, 70])
    check(inputs(layout, other), layout, other, ModalityMask.causal(), softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_softmax_scale(scale):
    layout, other = Layout.from_lengths([17, 30]), Layout.from_lengths([9, 70])
    check(inputs(layout, other), layout, other, ModalityMask.causal(), softmax_scale=scale)


def test_large_scores_do_not_overflow():
    layout = Layout.from_lengths([70])
    q, k, v, dout = inputs(layout)
    assert all(bool(x.isfinite().all()) for x in results([q * 300, k * 300, v, dout], layout))


def test_peaks_that_rise_from_tile_to_tile():
    """Each tile of keys scores higher than those before: everything is rescaled again and again."""
    layout, other = Layout.from_lengths([20]), Layout.from_lengths([250])
    q, k, v, dout = inputs(layout, other)
    k += 0.5 * torch.arange(4, device=DEVICE).repeat_interleave(64)[:250, None, None] * q.mean(0)
    check([q, k, v, dout], layout, other)


# Masks


def documents(time, modalities):
    layout = shapes.interleaved([[(0, 9), (1, 40), (0, 20)], [(1, 33), (0, 3)], [(0, 5)]], ("text", "image"))
    return layout.with_time(time, modalities=modalities) if time != "index" else layout


MASKS = {
    "early_fusion_window": (ModalityMask.early_fusion(window=(15, -1)), "segment_start", ("image",)),
    "prefix_lm": (ModalityMask.prefix_lm(), "prefix", ("image",)),
    "q_former_contrastive": (ModalityMask.q_former("contrastive", "image"), "index", ()),
    "q_former_generation": (ModalityMask.q_former("generation", "image"), "index", ()),
    "bottleneck": (ModalityMask.bottleneck({"text": "image"}), "index", ()),
    "co_attention": (ModalityMask.co_attention(), "index", ()),
    "block_diffusion": (ModalityMask.block_diffusion("text", "image"), "media_count", ("image",)),
    "past": (ModalityMask(default="past"), "index", ()),
    "same": (ModalityMask(default="same"), "media_count", ("image",)),
    "none": (ModalityMask(), "index", ()),
    "full_window": (ModalityMask.full(window=(20, 5)), "index", ()),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask, time, modalities = MASKS[name]
    layout = documents(time, modalities)
    check(inputs(layout), layout, None, mask)


@pytest.mark.parametrize("latest", [True, False])
def test_flamingo(latest):
    layout = shapes.interleaved([[(0, 9), (1, 64), (0, 20), (1, 64), (0, 5)], [(1, 64), (0, 3)]], ("text", "image"))
    layout = layout.with_time("media_count", modalities=("image",))
    text, image = layout.select("text")[0], layout.select("image")[0]
    check(inputs(text, image, 2, 1), text, image, ModalityMask.flamingo(latest=latest))


def random_layout(random_, samples, longest):
    lengths = [random_.randint(0, longest) for _ in range(samples)]
    total = sum(lengths)
    return dataclasses.replace(
        Layout.from_lengths(lengths),
        modality=torch.tensor([random_.randrange(16) for _ in range(total)], dtype=torch.uint8),
        time=torch.tensor([random_.randint(-9, 9) for _ in range(total)], dtype=torch.int32),
        start=torch.tensor([random_.randint(-5, 5) for _ in lengths], dtype=torch.int32),
        seqused=torch.tensor([random_.randint(0, n) for n in lengths], dtype=torch.int32),
    )


def random_mask(random_):
    rules = {(a, b): random_.randrange(5) for a in range(16) for b in range(16)}
    return ModalityMask(rules, window=[random_.choice((-1, random_.randint(0, 40))) for _ in range(2)])


@pytest.mark.parametrize("seed", range(4))
def test_random_layouts_and_rules(seed):
    random_ = random.Random(seed)
    layout, other = random_layout(random_, 3, 60), random_layout(random_, 3, 140)
    check(inputs(layout, other, 2, 1, seed=seed), layout, other, random_mask(random_))


def test_times_and_positions_at_the_ends_of_their_range():
    big = 2**31 - 1
    layout = dataclasses.replace(
        Layout.from_lengths([3, 40]),
        time=torch.tensor([-big - 1, 0, big] + [big] * 20 + [-big - 1] * 20).to(torch.int32),
        start=torch.tensor([-big - 1, big - 40], dtype=torch.int32),
    )
    for rule in ("causal", "past", "same"):
        check(inputs(layout), layout, None, ModalityMask(default=rule, window=(big, big)))


# Dropout


def test_dropout_is_the_reference_s():
    layout, other = Layout.from_lengths([17, 40]), Layout.from_lengths([70, 130])
    seed = torch.tensor([-(2**40) + 12345])
    for mask in (None, ModalityMask.full(window=(30, 90))):
        check(inputs(layout, other, 2, 1), layout, other, mask, dropout_p=0.3, dropout_seed=seed)


def test_dropout_pattern_bit_for_bit():
    """With v the identity the output shows which weights stayed."""
    layout, other = Layout.from_lengths([9, 11]), Layout.from_lengths([128, 100])
    q, k, _, _ = inputs(layout, other, heads=2, dim=128)
    v = torch.cat([torch.eye(128), torch.eye(128)[:100]])[:, None].expand(-1, 2, -1).to(DEVICE, q.dtype)
    seed = torch.tensor(77, device=DEVICE)
    layout_q, layout_k = layout.to(DEVICE), other.to(DEVICE)
    out = mmfast.attention(q, k, v, layout_q, layout_k, dropout_p=0.4, dropout_seed=seed, backend="cuda")
    for sample, (rows, n) in enumerate(((slice(0, 9), 128), (slice(9, 20), 100))):
        kept = dropout_keep(seed, 0.4, sample, range(2), rows.stop - rows.start, n)
        assert torch.equal(out[rows].transpose(0, 1)[..., :n] != 0, kept)


# Layouts and memory


def test_cached_queries():
    keys, queries = Layout.from_lengths([40, 200, 7]), Layout.from_lengths([1, 20, 7])
    queries = dataclasses.replace(queries, start=keys.lengths() - queries.lengths())
    out, *_ = check(inputs(queries, keys, 4, 1), queries, keys, ModalityMask.causal())
    assert out.abs().sum() > 0


def test_more_tiles_of_keys_than_a_block_classifies_at_once():
    keys, queries = Layout.from_lengths([8300]), Layout.from_lengths([3])
    queries = dataclasses.replace(queries, start=torch.tensor([8250], dtype=torch.int32))
    out, *_ = check(inputs(queries, keys), queries, keys, ModalityMask.causal(window=(70, -1)))
    assert out.abs().sum() > 0


def test_padded_tensors_by_seqused():
    layout = Layout.padded(4, 70, torch.tensor([3, 64, 0, 70], dtype=torch.int32))
    out, lse, *gradients = check(inputs(layout), layout, None, ModalityMask.causal())
    outside = layout.samples() == layout.batch
    assert not any(x[outside].any() for x in (out, *gradients)) and bool((lse[:, outside] == -torch.inf).all())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mask", [None, ModalityMask.causal()])
def test_nan_outside_the_layout_changes_no_bit(mask, count, parts):
    parts(count)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([2, 19, 19, 90], [1, 71, 75, 120]))
    layout = Layout(cu_q, seqused=torch.tensor([16, 0, 68], dtype=torch.int32), time=torch.arange(100).int())
    other = Layout(cu_k, seqused=torch.tensor([65, 4, 40], dtype=torch.int32), time=torch.arange(130).int())
    tensors = inputs(layout, other, 2, 1)
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


def test_lengths_that_lie_about_the_tensors_stay_inside_them():
    """On a GPU nobody looks at cu_seqlens, but the kernels clamp it."""
    layout = Layout.from_lengths([10, 20, 40])
    q, k, v, _ = (x.requires_grad_() for x in inputs(layout))
    layout.cu_seqlens.copy_(torch.tensor([-7, 10, 500, 2**31 - 1]))
    layout = layout if DEVICE == "cpu" else layout.to(DEVICE)
    mmfast.attention(q, k, v, layout, None, ModalityMask.causal(), backend="cuda").sum().backward()


def test_strided_views():
    layout = Layout.from_lengths([17, 20])
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(37, 3, 2, 64, generator=generator).to(DEVICE, torch.float16)
    dout = torch.randn(37, 2, 64, generator=generator).to(DEVICE, torch.float16)
    views = [*qkv.unbind(1), dout]
    odd = torch.randn(37, 2, 71, generator=generator).to(DEVICE, torch.float16)[..., 1:65]
    actual = results(views, layout) + results([odd, odd, odd, dout[:, :1].expand(37, 2, 64)], layout)
    expected = results([x.contiguous() for x in views], layout)
    expected += results([odd.contiguous()] * 3 + [dout[:, :1].expand(37, 2, 64).contiguous()], layout)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


# Several blocks share a tile's work; the order of sums is fixed


@pytest.mark.parametrize("count", [2, 3, 4])
def test_shared_tiles(count, parts):
    parts(count)
    queries, keys = Layout.from_lengths([3, 33]), Layout.from_lengths([140, 130])
    check(inputs(queries, keys, 4, 2), queries, keys, ModalityMask.full(window=(-1, 100)))
    check(inputs(keys, queries), keys, queries, dropout_p=0.2, dropout_seed=torch.tensor(4))


def test_the_number_of_parts_depends_on_shapes_only():
    device = torch.device("cpu")  # 16 multiprocessors
    parts = _attention_cuda.parts
    assert [parts(32 * n, 2, 1000 * n, n, device) for n in (1, 2, 4, 8, 100)] == [8, 8, 4, 2, 1]
    assert [parts(32, 1, n, 1, device) for n in (0, 1, 64, 129, 257, 10**6)] == [1, 1, 1, 1, 2, 32]
    assert parts(0, 1, 0, 0, device) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_repeated_runs_are_bit_equal(count, parts):
    parts(count)
    queries, keys = Layout.from_lengths([5, 33]), Layout.from_lengths([130, 65])
    tensors = inputs(queries, keys, 2, 1)
    first = results(tensors, queries, keys)
    for _ in range(2 if DEVICE == "cpu" else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, results(tensors, queries, keys)))


# The schedule, which host and device share


@pytest.fixture(scope="module")
def schedule():
    here = cuda_shim.HERE
    bindings = [here / "schedule.cpp", cuda_shim.ROOT / "csrc/bindings/torch_tensor.cpp"]
    flags = os.environ.get("MMFAST_CXXFLAGS", "")
    return cuda_shim.load(cuda_shim.compile_module("_schedule", [], bindings, cuda_shim.ROOT / "csrc", flags))


def fields(layout):
    return [getattr(layout, field) for field in op._FIELDS]


def test_tiles_cover_every_row_once_and_lie_in_one_sample(schedule):
    random_ = random.Random(7)
    for _ in range(2000):
        group = random_.choice([1, 2, 3, 8])
        layout = random_layout(random_, random_.randint(0, 6), random_.choice([3, 70, 200]))
        begin = random_.randint(0, 3)
        layout = dataclasses.replace(layout, cu_seqlens=layout.cu_seqlens + begin, modality=None, time=None)
        total = int(layout.cu_seqlens[-1]) + random_.randint(0, 3)
        owned, valid = torch.zeros(total * group), torch.zeros(total * group)
        for sample, first_row, first, extent, count in schedule.tiles(fields(layout), total, group):
            assert count <= extent <= 64 and (not count or 0 <= sample < layout.batch)
            owned[first_row * group + first :][:extent] += 1
            valid[first_row * group + first :][:count] += 1
            if count:
                start = int(layout.cu_seqlens[sample])
                assert first_row == start and first + count <= int(layout.seqused[sample]) * group
        assert bool((owned == 1).all())
        wanted = torch.zeros(total)
        for start, used in zip(layout.cu_seqlens.tolist(), layout.seqused.tolist()):
            wanted[start : start + used] = 1
        assert torch.equal(valid, wanted.repeat_interleave(group))


def test_skipped_tiles_show_nothing_and_full_ones_everything(schedule):
    random_ = random.Random(8)
    seen = {0: 0, 1: 0, 2: 0}
    for _ in range(250):
        kind = random_.random()
        layout, other = random_layout(random_, 2, 130), random_layout(random_, 2, 130)
        if kind < 0.7:  # few modalities and times that grow, as in practice
            layout, other = (
                dataclasses.replace(x, modality=x.modality // 8, time=x.time.sort()[0] * 9) for x in (layout, other)
            )
        mask = random_mask(random_)
        if kind < 0.4:
            mask = ModalityMask(default=random_.choice(["full", "causal", "past", "same"]), window=mask.window)
        dense = mask.visible(layout, other)
        kinds = schedule.kinds(
            fields(layout),
            layout.total,
            fields(other),
            other.total,
            mask.table(layout.names, other.names),
            *mask.window,
        )
        for row, rows, column, columns, found in kinds:
            cells = dense[row : row + rows, column : column + columns]
            assert cells.all() if found == 2 else not cells.any() if found == 0 else True
            seen[found] += 1
    assert min(seen.values()) > 30, seen


def test_shares_cover_every_tile_once(schedule):
    for tiles in range(40):
        for count in range(1, 34):
            shares = [schedule.share(tiles, part, count) for part in range(count)]
            assert [i for begin, end in shares for i in range(begin, end)] == list(range(tiles))


# PyTorch around it


def test_opcheck():
    layout = dataclasses.replace(
        Layout.from_lengths([5, 9]), modality=torch.zeros(14, dtype=torch.uint8), time=torch.arange(14).int()
    ).to(DEVICE)
    q, k, v, _ = (x.requires_grad_() for x in inputs(layout, heads=2, heads_k=1))
    rules = ModalityMask.causal().table()
    seed = torch.tensor([3], device=DEVICE)
    arguments = (q, k, v, *fields(layout), *fields(layout), rules, -1, -1, 0.25, 0.0, 0.5, seed, "cuda")
    torch.library.opcheck(op._attention.op, arguments)


def test_double_backward_raises():
    layout = Layout.from_lengths([5]).to(DEVICE)
    q, k, v, dout = (x.requires_grad_() for x in inputs(layout))
    (dq,) = torch.autograd.grad(mmfast.attention(q, k, v, layout, backend="cuda"), q, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        dq.sum().backward()


@pytest.mark.parametrize(
    "dtype, dim, message",
    [(torch.float32, 64, "dtype float32 is not supported"), (torch.float16, 80, "D is 80, and there are CUDA kernels")],
)
def test_refusals(dtype, dim, message):
    layout = Layout.from_lengths([5]).to(DEVICE)
    q, k, v, _ = inputs(layout, dim=dim, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: {message}"):
        mmfast.attention(q, k, v, layout, backend="cuda")


def test_the_binding_refuses_what_would_be_read_out_of_bounds(cuda_module):  # noqa: F811
    layout = Layout.from_lengths([5]).to(DEVICE)
    q, k, v, _ = inputs(layout)
    wide = torch.zeros(5, 1, 65, dtype=q.dtype, device=DEVICE)[..., 1:]
    rules = ModalityMask.full().table()
    summaries = torch.empty(cuda_module.attention_tiles(5, 1, 1) * 2, 5, dtype=torch.int32, device=DEVICE)
    out, lse = torch.empty_like(q), torch.empty(1, 5, device=DEVICE)

    def forward(q=q, summaries=summaries, parts=1, out=out):
        cuda_module.attention_forward(
            q, k, v, out, lse, fields(layout), fields(layout), rules, -1, -1, 0.1, 0.0, 0.0, None, parts, summaries,
            None, None, _native.stream_of(q),
        )  # fmt: skip

    for wrong, message in (
        ({"q": wide}, "q has rows that are not aligned to 16 bytes"),
        ({"summaries": summaries[1:]}, "summaries has size"),
        ({"parts": 0}, "a tile has 0 parts"),
        ({"parts": 2}, "rows must have"),
        ({"out": out[:3]}, "out has size 3"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(**wrong)
