"""mmfast.rotary against the float64 oracle, complex numbers and its algebra."""

import dataclasses
import itertools

import pytest
import torch

from mmfast import Layout, _native, pack, rotary
from mmfast.ops.rotary import _rotary, _rotary_backward
from mmfast.testing.numeric import EDGE_LENGTHS, assert_close_to_oracle, poisoned_empty

needs_cpu = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))
isas = _native.available_isas() if _native.cpu_refusal is None else ()


def layout_of(lengths, axes=0, largest=50, seed=0):
    layout = Layout.from_lengths(lengths)
    if not axes:
        return layout
    g = torch.Generator().manual_seed(seed)
    position = torch.randint(0, largest, (sum(lengths), axes), generator=g, dtype=torch.int32)
    return dataclasses.replace(layout, position=position)


def tensors(rows_q, rows_k, dim, dtype=torch.float32, heads=(3, 1), norm=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(rows_q, heads[0], dim, generator=g).to(dtype)
    k = torch.randn(rows_k, heads[1], dim, generator=g).to(dtype)
    weights = [torch.randn(dim, generator=g).to(dtype) for _ in range(2)] if norm else []
    return [q, k, *weights]


def run(inputs, layouts, grads, **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    if len(leaves) > 2:
        kwargs["qk_norm"] = (leaves[2], leaves[3], 1e-6)
    out = rotary(leaves[0], leaves[1], *layouts, **kwargs)
    return [*out, *torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(grads, out)])]


def check(inputs, layouts, **kwargs):
    grads = [torch.randn(t.shape, generator=torch.Generator().manual_seed(5)).to(t.dtype) for t in inputs[:2]]
    with poisoned_empty():
        got = run(inputs, layouts, grads, backend="cpu", **kwargs)
    want = run([t.double() for t in inputs], layouts, grads, backend="reference", **kwargs)
    peer = run(inputs, layouts, grads, backend="reference", **kwargs)
    for i, (a, b, c) in enumerate(zip(got, want, peer)):
        assert_close_to_oracle(f"result {i}", a, b, c, gradient=i > 1)
    return got


@needs_cpu
@pytest.mark.parametrize("isa", isas)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 8, 24, 72, 128])
def test_against_oracle(isa, dtype, interleaved, dim):
    with _native.use_isa(isa):
        for norm, axes, shared in itertools.product((False, True), (0, 2, 3), (True, False)):
            if norm and dim == 2:
                continue  # the gradient cancels: nothing but rounding is left
            lengths_k = [5, 0, 17, 2] if shared else [3, 1, 0, 40]
            layouts = [layout_of([5, 0, 17, 2], axes)] + ([] if shared else [layout_of(lengths_k, axes, seed=1)])
            check(tensors(24, sum(lengths_k), dim, dtype, norm=norm), layouts, interleaved=interleaved)


@needs_cpu
@pytest.mark.parametrize("length", EDGE_LENGTHS)
def test_edge_lengths(length):
    check(tensors(length + 3, length + 3, 32, norm=True), [layout_of([length, 0, 3])])


@needs_cpu
def test_many_rows():
    """The norm's weight gets a gradient from twelve heads of 9000 rows: a long sum in float32."""
    check(tensors(9000, 9000, 64, heads=(12, 4), norm=True), [layout_of([9000], axes=3)])


@needs_cpu
def test_sections_and_base():
    layout = layout_of([40, 9], axes=3)
    got = check(tensors(49, 49, 128), [layout], sections=(16, 24, 24), base=1e6)
    other = check(tensors(49, 49, 128), [layout], sections=(24, 16, 24), base=1e6)
    assert not torch.equal(got[0], other[0])
    check(tensors(49, 49, 128), [layout], sections=(0, 64, 0))
    # Text has one position on all axes: sections then make no difference.
    plain = layout_of([40, 9])
    a = check(tensors(49, 49, 128), [plain], sections=(16, 24, 24))
    b = check(tensors(49, 49, 128), [plain])
    assert torch.equal(a[0], b[0])


@needs_cpu
@pytest.mark.parametrize("isa", isas)
@pytest.mark.parametrize("interleaved", [False, True])
def test_large_positions(isa, interleaved):
    """Positions to 2^31 - 1 keep float32 accuracy; also equal to complex multiplication in float64."""
    position = torch.tensor([0, 1, 4095, 99_999, 1_000_000, 123_456_789, 2**31 - 1, -1_000_000], dtype=torch.int32)
    layout = dataclasses.replace(Layout.from_lengths([8]), position=position[:, None])
    q, k = tensors(8, 8, 64)
    with _native.use_isa(isa):
        got, _ = rotary(q, k, layout, interleaved=interleaved, backend="cpu")
    x = q.double()
    pairs = x.unflatten(2, (32, 2)) if interleaved else torch.stack([x[..., :32], x[..., 32:]], 3)
    angle = position.double()[:, None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()).double(), angle)[:, None]
    )
    want = turned.flatten(2) if interleaved else torch.cat(turned.unbind(3), 2)
    assert (got - want).abs().max() < 1e-6


@needs_cpu
def test_algebra():
    """Scores depend on the distance only; the rotation keeps lengths; position 0 does nothing."""
    q, k = tensors(1, 1, 64)
    at = lambda p: dataclasses.replace(Layout.from_lengths([1]), start=torch.tensor([p], dtype=torch.int32))  # noqa: E731
    scores = []
    for p in (0, 1, 7, 1000):
        a, b = rotary(q, k, at(p + 3), at(p))
        scores.append((a[0, 0] * b[0, 0]).sum())
        assert torch.allclose(a.norm(), q.norm())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(4), rtol=1e-4, atol=1e-4)
    same, _ = rotary(q, k, at(0))
    assert torch.equal(same, q)


@needs_cpu
def test_rows_outside_the_layout():
    layout = Layout(
        torch.tensor([1, 4, 4, 9], dtype=torch.int32),
        seqused=torch.tensor([2, 0, 5], dtype=torch.int32),
        start=torch.tensor([4, 0, 9], dtype=torch.int32),
    )
    inputs = tensors(11, 11, 40, norm=True)
    grads = [torch.randn_like(t) for t in inputs[:2]]
    clean = run(inputs, [layout], grads, backend="cpu")
    outside = [0, 3, 9, 10]
    for t in (*inputs[:2], *grads):
        t[outside] = float("nan")
    with poisoned_empty():
        dirty = run(inputs, [layout], grads, backend="cpu")
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)
    assert all(not t[outside].any() for t in dirty[:4])


@needs_cpu
def test_strides():
    """Slices of a fused projection need no copy; any other stride is right too."""
    layout = layout_of([6, 5])
    qkv = torch.randn(11, 5, 3, 16)
    q, k = qkv[:, :, 0], qkv[:, :3, 1]
    want = rotary(q.contiguous(), k.contiguous(), layout)
    for a, b in zip(rotary(q, k, layout), want):
        assert torch.equal(a, b) and a.is_contiguous()
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(transposed, k, layout)[0], want[0])
    leaf = q.clone().requires_grad_()
    grad = torch.randn(5, 11, 16).transpose(0, 1)
    a = torch.autograd.grad(rotary(leaf, k, layout)[0], leaf, grad)[0]
    assert torch.equal(a, torch.autograd.grad(rotary(leaf, k, layout)[0], leaf, grad.contiguous())[0])


@needs_cpu
def test_streaming_stores_are_bit_equal():
    rows = 8 * (_native.cpu().streamed_bytes() // (8 * 64 * 4) // 4)
    q, k = tensors(rows, rows, 64, heads=(8, 1))
    layout = layout_of([rows], 1, largest=10**6)
    whole, _ = rotary(q, k, layout)
    for begin in range(0, rows, rows // 8):
        part = slice(begin, begin + rows // 8)
        piece = dataclasses.replace(Layout.from_lengths([rows // 8]), position=layout.position[part])
        assert torch.equal(whole[part], rotary(q[part], k[part], piece)[0])


@needs_cpu
def test_determinism_and_threads():
    inputs, layout = tensors(3000, 3000, 64, torch.bfloat16, norm=True), layout_of([1000, 2000])
    grads = [torch.randn_like(t) for t in inputs[:2]]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, [layout], grads))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_cpu
@pytest.mark.parametrize("isa", isas)
def test_mutations_are_caught(isa):
    inputs, layout = tensors(30, 30, 64), layout_of([10, 20], axes=2)
    want, _ = rotary(*inputs, layout, backend="reference")
    later = dataclasses.replace(layout, position=layout.position + 1)
    swapped = dataclasses.replace(layout, position=layout.position.flip(1).contiguous())
    calls = [(later, {}), (swapped, {}), (layout, {"base": 10001.0}), (layout, {"sections": (15, 17)}),
             (layout, {"interleaved": True}), (layout, {"qk_norm": (None, None, 1e-6)})]  # fmt: skip
    with _native.use_isa(isa):
        for mutated, kwargs in calls:
            with pytest.raises(AssertionError):
                assert_close_to_oracle("q", rotary(*inputs, mutated, backend="cpu", **kwargs)[0], want.double(), want)


def test_gradcheck_of_the_reference():
    inputs = [t.requires_grad_() for t in tensors(4, 4, 6, torch.float64, heads=(2, 1), norm=True)]
    layout = layout_of([3, 1], axes=2)
    for interleaved in (False, True):

        def function(q, k, a, b, interleaved=interleaved):
            return rotary(q, k, layout, qk_norm=(a, b, 1e-6), interleaved=interleaved, backend="reference")

        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@needs_cpu
def test_dtypes_and_autocast():
    inputs, layout = tensors(9, 9, 16, torch.float16), layout_of([9])
    got = rotary(*inputs, layout, backend="cpu")[0]
    assert got.dtype == torch.float16 and torch.equal(got, rotary(*(t.float() for t in inputs), layout)[0].half())
    with pytest.raises(RuntimeError, match="float64 is not supported"):
        rotary(*(t.double() for t in inputs), layout, backend="cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rotary(*(t.float() for t in inputs), layout)[0]
    assert torch.equal(got, rotary(*(t.float().bfloat16() for t in inputs), layout)[0])


@needs_cpu
def test_only_one_output_used():
    inputs, layout = [t.requires_grad_() for t in tensors(9, 9, 16, norm=True)], layout_of([9])
    q, _ = rotary(*inputs[:2], layout, qk_norm=(inputs[2], inputs[3], 1e-6))
    grads = torch.autograd.grad(q.sum(), inputs)
    assert grads[0].any() and not grads[1].any() and not grads[3].any()
    q, _ = rotary(*inputs[:2], layout, qk_norm=(None, inputs[3], 1e-6))
    q.sum().backward()


@needs_cpu
def test_second_derivative_raises():
    q, k = (t.requires_grad_() for t in tensors(5, 5, 8))
    a, _ = rotary(q, k, layout_of([5]))
    (grad,) = torch.autograd.grad(a.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        grad.sum().backward()


@needs_cpu
def test_opcheck():
    q, k, a, b = tensors(7, 7, 8, norm=True)
    layout = layout_of([4, 3], axes=2)
    fields = (layout.cu_seqlens, None, None, layout.position, 1e4, [3, 1], True, 1e-6, False, "cpu")
    torch.library.opcheck(_rotary_backward.op, ([q, k], [q, k], a, b, *fields))
    torch.library.opcheck(_rotary_backward.op, ([q], [q], None, None, *fields))
    torch.library.opcheck(_rotary.op, ([q.requires_grad_(), k.requires_grad_()], a.requires_grad_(), b, *fields))


@needs_cpu
def test_compile_with_pack():
    torch.compiler.reset()
    linear = torch.nn.Linear(16, 32)

    def step(image, text, lengths_image, lengths_text, positions):
        x, layout = pack({"image": (image, lengths_image, positions), "text": (text, lengths_text)})
        qk = linear(x).unflatten(1, (2, 2, 8))
        return rotary(qk[:, 0], qk[:, 1], layout)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (2, 3 + seed), generator=g, dtype=torch.int32)
        rows = [int(n.sum()) for n in lengths]
        positions = torch.randint(0, 30, (rows[0], 2), generator=g, dtype=torch.int32)
        arguments = torch.randn(rows[0], 16), torch.randn(rows[1], 16), *lengths, positions
        got, want = compiled(*arguments), step(*arguments)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
        got[0].square().mean().backward()
    assert counter.frame_count <= 2
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: rotary(q[0], k, layout_of([5])), r"q must be a float tensor \[T, H, D\]"),
        (lambda q, k: rotary(q[..., :7], k[..., :7], layout_of([5])), "D is 7; it must be even"),
        (lambda q, k: rotary(q, k[..., :6], layout_of([5])), "q has D 8, k has 6"),
        (lambda q, k: rotary(q, k.bfloat16(), layout_of([5])), "q has dtype"),
        (lambda q, k: rotary(q, k, layout_of([4], axes=1)), "q has 5 rows, layout_q.position 4"),
        (lambda q, k: rotary(q, k, layout_of([5]), sections=(2, 3)), r"sum is D / 2 = 4"),
        (lambda q, k: rotary(q, k, layout_of([5], axes=3), sections=(2, 2)), "sections has 2 numbers.*3 axes"),
        (lambda q, k: rotary(q, k, layout_of([5], 1), layout_of([5], 2)), r"\[1, 2\] position axes"),
        (lambda q, k: rotary(q, k, layout_of([5]), qk_norm=(torch.ones(7), None, 0.1)), r"q_weight of qk_norm.*\[8\]"),
        (lambda q, k: rotary(q, k, layout_of([5]), qk_norm=(None, 0.1)), "got 2 values"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(*tensors(5, 5, 8))


@needs_cpu
def test_layout_longer_than_the_tokens():
    with pytest.raises(ValueError, match="ends at row 6, but the tokens have 5 rows"):
        rotary(*tensors(5, 5, 8), layout_of([6]))
