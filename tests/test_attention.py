"""attention: numbers, gradients, memory, determinism, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mmfast
from mmfast import Layout, ModalityMask, Rule
from mmfast._native import available_isas, cpu_refusal, use_isa
from mmfast.nn import attention_map
from mmfast.ops import attention as op
from mmfast.reference.attention import dropout_keep
from mmfast.testing import shapes
from mmfast.testing.numeric import EDGE_LENGTHS, assert_close_to_oracle, poisoned_empty

pytestmark = pytest.mark.skipif(cpu_refusal is not None, reason=str(cpu_refusal))

ISAS = available_isas() if cpu_refusal is None else ()
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(layout_q, layout_k=None, heads=2, heads_k=None, dim=64, dtype=torch.float32, seed=0, extra=0):
    layout_k = layout_q if layout_k is None else layout_k
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = layout_q.total + extra, layout_k.total + extra
    sizes = [(total_q, heads), (total_k, heads_k or heads), (total_k, heads_k or heads), (total_q, heads)]
    return [torch.randn(*size, dim, generator=generator).to(dtype) for size in sizes]


def results(tensors, *args, backend="cpu", **options):
    *qkv, dout = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    out, lse = mmfast.attention(*qkv, *args, return_lse=True, backend=backend, **options)
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, qkv, dout))]


def check(tensors, *args, isa=None, **options):
    """Kernels against the oracle, by the error rule; returns the kernels' results."""
    with use_isa(isa or mmfast._native.cpu().isa()):
        actual = results(tensors, *args, **options)
    oracle = results([x.double() for x in tensors], *args, backend="reference", **options)
    peer = results(tensors, *args, backend="reference", **options)
    for name, a, o, p in zip(NAMES, actual, oracle, peer):
        assert_close_to_oracle(name, a, o.double(), p, gradient=name.startswith("d"))
    return actual


# Numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_ragged_self_and_cross(isa, dtype):
    layout = Layout.from_lengths([17, 64, 130, 1])
    other = Layout.from_lengths([3, 300, 0, 65])
    check(inputs(layout, dtype=dtype), layout, isa=isa)
    check(inputs(layout, dtype=dtype), layout, None, ModalityMask.causal(), isa=isa)
    check(inputs(layout, other, 4, 2, dtype=dtype), layout, other, isa=isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", EDGE_LENGTHS)
def test_edge_lengths(length, dtype):
    layout, other = Layout.from_lengths([length, 3]), Layout.from_lengths([33, 65])
    check(inputs(layout, heads=1, dtype=dtype), layout, None, ModalityMask.causal())
    check(inputs(layout, other, heads=1, dtype=dtype), layout, other)
    check(inputs(other, layout, heads=1, dtype=dtype), other, layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 128, 256])
def test_head_dimensions(dim, dtype, isa):
    layout, other = Layout.from_lengths([20, 70]), Layout.from_lengths([90, 31])
    check(inputs(layout, other, dim=dim, dtype=dtype), layout, other, isa=isa)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, heads_k", [(4, 4), (4, 2), (6, 1), (8, 1)])
def test_grouped_heads(heads, heads_k, dtype):
    layout = Layout.from_lengths([1, 40, 101])
    check(inputs(layout, heads=heads, heads_k=heads_k, dim=32, dtype=dtype), layout, None, ModalityMask.causal())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lengths_q, lengths_k",
    [
        ([0, 5, 0], [4, 6, 0]),
        ([5, 5], [0, 7]),
        ([0, 0], [3, 0]),
        ([3, 0], [0, 0]),
        ([0], [0]),
        ([], []),
        ([200], [300]),
    ],
)
def test_empty_samples(lengths_q, lengths_k, dtype):
    layout, other = Layout.from_lengths(lengths_q), Layout.from_lengths(lengths_k)
    with poisoned_empty():
        out, lse, dq, dk, dv = check(inputs(layout, other, dtype=dtype), layout, other)
    for sample, (nq, nk) in enumerate(zip(lengths_q, lengths_k)):
        rows_q = slice(*layout.cu_seqlens[sample : sample + 2].tolist())
        rows_k = slice(*other.cu_seqlens[sample : sample + 2].tolist())
        if not nk:
            assert not out[rows_q].any() and not dq[rows_q].any() and bool((lse[:, rows_q] == -torch.inf).all())
        if not nq:
            assert not dk[rows_k].any() and not dv[rows_k].any()


def test_a_thousand_samples():
    lengths = torch.randint(0, 5, (1000,), generator=torch.Generator().manual_seed(3))
    layout = Layout.from_lengths(lengths)
    check(inputs(layout, heads=2, dim=16), layout, None, ModalityMask.causal())


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_samples_run_over_several_packings(dtype):
    layout, other = Layout.from_lengths([5, 800]), Layout.from_lengths([2400, 1500])
    check(inputs(layout, other, heads=1, dim=128, dtype=dtype), layout, other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0])
def test_softcap(softcap, dtype, isa):
    layout = Layout.from_lengths([17, 130])
    tensors = inputs(layout, dtype=dtype)
    check(tensors, layout, None, ModalityMask.causal(), softcap=softcap, isa=isa)
    check(tensors, layout, softcap=softcap, isa=isa)


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.5, 1.0])
def test_softmax_scale(scale):
    layout = Layout.from_lengths([17, 130])
    check(inputs(layout, dim=16), layout, None, ModalityMask.causal(), softmax_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_see_one_key_are_exact(isa, dtype):
    layout = Layout.from_lengths([600])
    q, k, v, dout = inputs(layout, dtype=dtype)
    itself = ModalityMask({}, default=Rule.SAME)
    with use_isa(isa):
        out, _, dq, dk, _ = results([q * 10, k, v, dout], layout, None, itself)
    assert torch.equal(out, v)
    assert not dq.any() and not dk.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries", [3, 70])
def test_one_score_far_above_the_rest(queries, isa, dtype):
    """Key i of sample i takes all the weight: a maximum that misses it lets its exponential overflow."""
    keys = 70
    layout, other = Layout.from_lengths([queries] * keys), Layout.from_lengths([keys] * keys)
    q, k, v, dout = inputs(layout, other, heads=1, dim=16, dtype=dtype)
    first, highest = torch.arange(16) == 0, torch.arange(keys) * (keys + 1)
    q, k = first.to(dtype).expand_as(q), torch.zeros_like(k)
    k[highest, 0, 0] = 300
    with use_isa(isa):
        out, lse, *gradients = results([q, k, v, dout], layout, other, softmax_scale=1.0)
    assert torch.equal(out, v[highest].repeat_interleave(queries, 0))
    assert torch.equal(lse, torch.full_like(lse, 300))
    assert all(bool(x.isfinite().all()) for x in gradients)


# Dropout


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_reference_s(dtype, isa):
    layout, other = Layout.from_lengths([17, 40]), Layout.from_lengths([70, 300])
    seed = torch.tensor([-(2**40) + 12345])
    for mask in (None, ModalityMask.full(window=(30, 90))):
        tensors = inputs(layout, other, 4, 2, dtype=dtype)
        check(tensors, layout, other, mask, dropout_p=0.3, dropout_seed=seed, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_pattern_bit_for_bit(isa):
    """With v the identity the output shows which weights stayed."""
    layout, other = Layout.from_lengths([9, 11]), Layout.from_lengths([64, 50])
    q, k, _, _ = inputs(layout, other, heads=2, dim=64)
    v = torch.cat([torch.eye(64), torch.eye(64)[:50]])[:, None].expand(-1, 2, -1)
    seed = torch.tensor(77)
    with use_isa(isa):
        out = mmfast.attention(q, k, v, layout, other, dropout_p=0.4, dropout_seed=seed, backend="cpu")
    for sample, (rows, n) in enumerate(((slice(0, 9), 64), (slice(9, 20), 50))):
        kept = dropout_keep(seed, 0.4, sample, range(2), rows.stop - rows.start, n)
        assert torch.equal(out[rows].transpose(0, 1)[..., :n] != 0, kept)


def test_dropout_keeps_the_expected_share():
    share = dropout_keep(torch.tensor(5), 0.25, 0, range(4), 100, 100).float().mean().item()
    assert abs(share - 0.75) < 0.01


# Layouts


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_queries(dtype):
    keys = Layout.from_lengths([40, 300, 7])
    queries = Layout.from_lengths([1, 20, 7])
    queries = dataclasses.replace(queries, start=keys.lengths() - queries.lengths())
    out, *_ = check(inputs(queries, keys, 4, 1, dtype=dtype), queries, keys, ModalityMask.causal())
    assert out.abs().sum() > 0


def test_cached_queries_are_the_last_rows_of_self_attention():
    layout = Layout.from_lengths([50])
    q, k, v, _ = inputs(layout)
    whole = mmfast.attention(q, k, v, layout, None, ModalityMask.causal())
    last = Layout(torch.tensor([0, 3], dtype=torch.int32), start=torch.tensor([47], dtype=torch.int32))
    torch.testing.assert_close(mmfast.attention(q[47:], k, v, last, layout, ModalityMask.causal()), whole[47:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_tensors_by_seqused(dtype):
    used = torch.tensor([3, 64, 0, 100], dtype=torch.int32)
    layout = Layout.padded(4, 100, used)
    tensors = inputs(layout, dtype=dtype)
    with poisoned_empty():
        padded = check(tensors, layout, None, ModalityMask.causal())
    packed_layout = Layout.from_lengths(used)
    rows = torch.cat([torch.arange(n) + 100 * b for b, n in enumerate(used.tolist())])
    packed = results([x[rows] for x in tensors], packed_layout, None, ModalityMask.causal())
    for a, b in zip(padded, packed):
        if a.dim() == 2:
            assert torch.equal(a[:, rows], b)
        else:
            assert torch.equal(a[rows], b)
            assert int((a != 0).any(-1).any(-1).sum()) <= len(rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(dtype, isa):
    layout = Layout.from_lengths([17, 130])
    qkv = torch.randn(147, 3, 2, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    dout = torch.randn(147, 2, 64).to(dtype)
    views = [*qkv.unbind(1), dout]
    assert not views[0].is_contiguous()
    with use_isa(isa):
        actual = results(views, layout)
        expected = results([x.contiguous() for x in views], layout)
        odd = torch.randn(147, 2, 71, generator=torch.Generator().manual_seed(1)).to(dtype)[..., 1:65]
        odd_actual = results([odd, odd, odd, dout.expand(147, 2, 64)], layout)
        odd_expected = results([odd.contiguous()] * 3 + [dout], layout)
    for name, a, b in zip(NAMES, actual + odd_actual, expected + odd_expected):
        assert torch.equal(a, b), name


def test_gradient_of_a_sum_is_expanded():
    layout = Layout.from_lengths([17, 5])
    q, k, v, dout = inputs(layout)
    q.requires_grad_()
    mmfast.attention(q, k, v, layout).sum().backward()
    expected = results([q.detach(), k, v, torch.ones_like(dout)], layout)[2]
    assert torch.equal(q.grad, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_outside_the_layout_changes_no_bit(dtype, isa):
    cu_q = torch.tensor([2, 19, 19, 150], dtype=torch.int32)
    cu_k = torch.tensor([1, 71, 75, 140], dtype=torch.int32)
    layout = Layout(cu_q, seqused=torch.tensor([16, 0, 131], dtype=torch.int32))
    other = Layout(cu_k, seqused=torch.tensor([65, 4, 65], dtype=torch.int32))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 2, 64, generator=generator).to(dtype) for n in (160, 150, 150, 160)]
    outside_q, outside_k = layout.samples(160) == layout.batch, other.samples(150) == other.batch
    poisoned = [x.clone() for x in tensors]
    for x, outside in zip(poisoned, (outside_q, outside_k, outside_k, outside_q)):
        x[outside] = torch.nan
    with use_isa(isa):
        clean = results(tensors, layout, other)
        with poisoned_empty():
            dirty = results(poisoned, layout, other)
    for name, a, b in zip(NAMES, clean, dirty):
        assert torch.equal(a, b), name
    out, lse, dq, dk, dv = dirty
    for x, outside in ((out, outside_q), (dq, outside_q), (dk, outside_k), (dv, outside_k)):
        assert outside.any() and not x[outside].any()
    assert bool((lse[:, outside_q] == -torch.inf).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value, dtype, isa):
    layout, other = Layout.from_lengths([40, 70, 9]), Layout.from_lengths([30, 100, 65])
    tensors = inputs(layout, other, dtype=dtype)
    dirty = [x.clone() for x in tensors]
    rows = [(slice(40, 110), slice(110, 119)), (slice(30, 130), slice(130, 195))]
    for x, side in zip(dirty, (0, 1, 1, 0)):
        x[rows[side][0]] = value
    mask = ModalityMask.full(window=(20, 20))
    with use_isa(isa):
        clean, spoiled = results(tensors, layout, other, mask), results(dirty, layout, other, mask)
    for name, a, b, side in zip(NAMES, clean, spoiled, (0, 0, 0, 1, 1)):
        if name == "lse":
            a, b = a.T, b.T
        assert not b[rows[side][0]].isfinite().all(), name
        first = slice(0, rows[side][0].start)
        assert torch.equal(a[first], b[first]) and torch.equal(a[rows[side][1]], b[rows[side][1]]), name


# Determinism


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs_are_bit_equal(dtype):
    layout = Layout.from_lengths([33, 7, 129])
    tensors = inputs(layout, heads=4, heads_k=2, dtype=dtype)
    torch.set_num_threads(2)
    first = results(tensors, layout, None, ModalityMask.causal())
    for _ in range(50):
        again = results(tensors, layout, None, ModalityMask.causal())
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dtype", DTYPES)
def test_thread_count_changes_no_bit(dtype):
    layout = Layout.from_lengths([1300, 7, 129])
    tensors = inputs(layout, heads=2, heads_k=1, dtype=dtype)
    one = results(tensors, layout)
    torch.set_num_threads(2)
    two = results(tensors, layout)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


# The reference


def test_reference_gradients():
    layout, other = Layout.from_lengths([2, 0, 1]), Layout.from_lengths([2, 1, 2])
    q, k, v, _ = (x.double().requires_grad_() for x in inputs(layout, other, 2, 1, dim=8))

    def function(q, k, v):
        return mmfast.attention(
            q,
            k,
            v,
            layout,
            other,
            ModalityMask.causal(),
            softcap=2.0,
            dropout_p=0.2,
            dropout_seed=torch.tensor(1),
            backend="reference",
        )

    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_reference_is_pytorch_s_attention():
    layout = Layout.from_lengths([30])
    q, k, v, _ = (x.double() for x in inputs(layout))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True
    ).transpose(0, 1)
    actual = mmfast.attention(q, k, v, layout, None, ModalityMask.causal(), backend="reference")
    torch.testing.assert_close(actual, expected)


def test_double_backward_of_the_kernels_raises():
    layout = Layout.from_lengths([5])
    q, k, v, dout = (x.requires_grad_() for x in inputs(layout))
    (dq,) = torch.autograd.grad(mmfast.attention(q, k, v, layout), q, dout, create_graph=True)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        dq.sum().backward()


def test_recomputed_weights_give_the_output():
    load = shapes.early_fusion(3, 4, 16)
    q, k, v, _ = load.tensors(torch.float32)
    out = mmfast.attention(q, k, v, load.layout_q, None, load.mask)
    rows = slice(*load.layout_q.cu_seqlens[1:3].tolist())
    weights = attention_map((q, k), load.layout_q, None, load.mask, samples=[1], heads=[2, 0])[0].weights
    torch.testing.assert_close((weights @ v[rows].transpose(0, 1)[[2, 0]]).transpose(0, 1), out[rows][:, [2, 0]])
    with pytest.raises(IndexError, match="sample 3"):
        attention_map((q, k), load.layout_q, None, load.mask, samples=[3])


# PyTorch around it


def test_opcheck():
    layout = dataclasses.replace(
        Layout.from_lengths([5, 9]), modality=torch.zeros(14, dtype=torch.uint8), time=torch.arange(14).int()
    )
    q, k, v, _ = (x.requires_grad_() for x in inputs(layout, heads=2, heads_k=1, dim=16))
    fields = [getattr(layout, f) for f in ("cu_seqlens", "seqused", "modality", "time", "start")]
    arguments = (q, k, v, *fields, *fields, ModalityMask.causal().table(), -1, -1, 0.25, 0.0, 0.0, None, "cpu")
    torch.library.opcheck(op._attention.op, arguments)
    torch.library.opcheck(op._attention.op, (*arguments[:-3], 0.5, torch.tensor([3]), "cpu"))


def test_lse_takes_no_gradient():
    layout = Layout.from_lengths([5])
    q, k, v, _ = (x.requires_grad_() for x in inputs(layout))
    out, lse = mmfast.attention(q, k, v, layout, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_compiles_once_for_ragged_batches():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(q, k, v, layout, other):
        out = mmfast.attention(q * 2, k, v, layout, other, ModalityMask.full())
        return (out * out).sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        batch = int(torch.randint(2, 9, (), generator=rng))
        lengths = torch.randint(1, 30, (2, batch), generator=rng)
        layout, other = Layout.from_lengths(lengths[0].tolist()), Layout.from_lengths(lengths[1].tolist())
        q, k, v, _ = (x.requires_grad_() for x in inputs(layout, other, dim=16))
        loss = compiled(q, k, v, layout, other)
        loss.backward()
        expected = step(q, k, v, layout, other)
        torch.testing.assert_close(loss, expected)
        assert q.grad is not None
    assert counter.frame_count <= 2, counter.frame_count
    torch._dynamo.reset()


def test_compiles_for_layouts_with_modalities():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    mask = ModalityMask.early_fusion()
    compiled = torch.compile(
        lambda q, k, v, layout: mmfast.attention(q, k, v, layout, None, mask), fullgraph=True, backend=counter
    )
    for seed in range(20):
        load = shapes.early_fusion(2 + seed % 4, 2, 16, seed)
        q, k, v, _ = load.tensors(torch.float32, requires_grad=True)
        out = compiled(q, k, v, load.layout_q)
        assert torch.equal(out, mmfast.attention(q, k, v, load.layout_q, None, mask))
    assert counter.frame_count <= 2, counter.frame_count
    torch._dynamo.reset()


def test_autocast():
    layout = Layout.from_lengths([17, 5])
    tensors = inputs(layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mmfast.attention(*tensors[:3], layout)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, mmfast.attention(*(x.bfloat16() for x in tensors[:3]), layout))


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    layout = Layout.from_lengths([17, 5])
    tensors = inputs(layout)
    expected = results(tensors, layout)[2:]
    qkv = [x.requires_grad_() for x in tensors[:3]]
    out = checkpoint(lambda q, k, v: mmfast.attention(q, k, v, layout), *qkv, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(out, qkv, tensors[3]), expected):
        assert torch.equal(a, b)


def test_backward_twice_leaves_the_saved_tensors():
    layout = Layout.from_lengths([17, 5])
    q, k, v, dout = (x.requires_grad_() for x in inputs(layout))
    out = mmfast.attention(q, k, v, layout)
    first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_half_precision_by_conversion():
    layout = Layout.from_lengths([17, 5])
    tensors = [x.half() for x in inputs(layout)]
    actual = results(tensors, layout)
    expected = results([x.float() for x in tensors], layout)
    assert actual[0].dtype == actual[2].dtype == torch.float16
    assert torch.equal(actual[0], expected[0].half())


# Errors


def bad(**changes):
    layout = changes.pop("layout", Layout.from_lengths([3, 4]))
    q, k, v, _ = inputs(Layout.from_lengths([3, 4]), heads=4, heads_k=2, dim=16)
    given = {"q": q, "k": k, "v": v, "layout_q": layout, **changes}
    return mmfast.attention(**given)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": torch.zeros(7, 3, 16), "v": torch.zeros(7, 3, 16)}, "k has 3 heads, which must divide q's 4"),
        ({"v": torch.zeros(7, 1, 16)}, r"v has shape \[7, 1, 16\]; expected k's \[7, 2, 16\]"),
        ({"k": torch.zeros(7, 2, 16).bfloat16()}, "k has dtype torch.bfloat16"),
        ({"q": torch.zeros(7, 4, 12)}, "D is 12; expected a multiple of 8"),
        ({"q": torch.zeros(7, 4, 264)}, "D is 264"),
        ({"q": torch.zeros(7, 4, 24)}, "k has D = 16, q has 24"),
        ({"q": torch.zeros(7, 64)}, r"q must be \[T, heads, D\]"),
        ({"q": torch.zeros(7, 4, 16, dtype=torch.int32)}, "expected a floating-point dtype"),
        ({"q": torch.zeros(7, 4, 16, device="meta")}, "k is on cpu, q on meta"),
        ({"layout": torch.tensor([0, 3, 7])}, "layout_q must be a mmfast.Layout"),
        ({"layout": Layout.from_lengths([3, 5])}, "cu_seqlens_q ends at row 8, but the tokens have 7 rows"),
        ({"layout_k": Layout.from_lengths([3])}, "layout_q has 2 samples, layout_k 1"),
        (
            {"layout": Layout(torch.tensor([0, 3], dtype=torch.int32), time=torch.zeros(5, dtype=torch.int32))},
            "layout_q describes 5 rows, q has 7",
        ),
        ({"mask": "causal"}, "mask must be a mmfast.ModalityMask"),
        ({"mask": ModalityMask.flamingo()}, "'text' is no modality"),
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"k": [1.0]}, "k must be a torch.Tensor, got list"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"dropout_p": 0.1}, "dropout needs dropout_seed"),
        ({"dropout_p": 0.1, "dropout_seed": torch.tensor(1.0)}, "dropout needs dropout_seed"),
        ({"backend": "gpu"}, "backend is 'gpu'"),
    ],
)
def test_errors(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        bad(**changes)


def test_float64_needs_the_reference():
    layout = Layout.from_lengths([3, 4])
    tensors = [x.double() for x in inputs(layout)[:3]]
    with pytest.raises(RuntimeError, match="float64 is not supported"):
        mmfast.attention(*tensors, layout, backend="cpu")
    assert mmfast.attention(*tensors, layout).dtype == torch.float64


def test_strides_that_the_kernels_do_not_take_are_copied():
    layout = Layout.from_lengths([3, 4])
    q, k, v, _ = inputs(layout)
    wide = torch.stack([q, q], -1).flatten(2)  # every column twice
    assert torch.equal(mmfast.attention(wide[..., ::2], k, v, layout), mmfast.attention(q, k, v, layout))
    row = q[:1].expand(q.shape)
    assert torch.equal(mmfast.attention(row, k, v, layout), mmfast.attention(row.contiguous(), k, v, layout))


def test_no_rows_heads_or_samples():
    for lengths, rows, heads in [([], 0, 2), ([], 7, 2), ([0, 0], 0, 2), ([3, 4], 7, 0)]:
        layout = Layout.from_lengths(lengths)
        q = torch.randn(rows, heads, 16, requires_grad=True)
        k = torch.randn(rows, 1, 16)
        out = mmfast.attention(q, k, k, layout)
        assert out.shape == q.shape and not torch.autograd.grad(out.sum(), q)[0].any()


def test_the_binding_guards_memory():
    layout = Layout.from_lengths([3, 4])
    q, k, v, _ = inputs(layout)
    broken = Layout.from_lengths([3, 4])
    broken.cu_seqlens[1] = 9
    with pytest.raises(ValueError, match="cu_seqlens_q decreases at sample 1"):
        mmfast.attention(q, k, v, broken)
    for field, value, message in [
        ("cu_seqlens", -5, r"cu_seqlens_q\[0\] is -5"),
        ("seqused", 9, r"seqused_q\[0\] is 9; expected 0 to the sample's length 3"),
        ("seqused", -1, r"seqused_q\[0\] is -1"),
        ("modality", 200, r"modality_q\[0\] is 200"),
    ]:
        broken = dataclasses.replace(
            Layout.from_lengths([3, 4]),
            seqused=torch.tensor([3, 4], dtype=torch.int32),
            modality=torch.zeros(7, dtype=torch.uint8),
        )
        getattr(broken, field)[0] = value
        with pytest.raises(ValueError, match=message):
            mmfast.attention(q, k, v, broken)
    short = Layout.from_lengths([3, 4])
    with pytest.raises(ValueError, match="cu_seqlens_k ends at row 7, but the tokens have 5 rows"):
        mmfast.attention(q, k[:5], v[:5], short)
    lse, fields = torch.empty(2, 7), (layout.cu_seqlens, None, None, None, None)
    rest = (fields, fields, ModalityMask.full().table(), -1, -1, 0.1, 0.0, 0.0, None)
    forward = mmfast._native.cpu().attention_forward
    with pytest.raises(ValueError, match="out has size 6"):
        forward(q, k, v, torch.empty(6, 2, 64), lse, *rest)
    with pytest.raises(ValueError, match="v has dtype bfloat16"):
        forward(q, k, v.bfloat16(), torch.empty_like(q), lse, *rest)
    with pytest.raises(ValueError, match="not contiguous in its last dimension"):
        forward(q, k, v.transpose(1, 2).contiguous().transpose(1, 2), torch.empty_like(q), lse, *rest)
