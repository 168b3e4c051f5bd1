"""The Triton kernels of mmfast.rotary, interpreted where there is no GPU."""

import dataclasses
import itertools

import pytest
import torch
from test_rotary import layout_of, tensors
from triton_cases import DEVICE, DTYPES, needs_triton

from mmfast import Layout, rotary
from mmfast.ops.rotary import _rotary, _rotary_backward
from mmfast.testing.numeric import EDGE_LENGTHS, assert_close_to_oracle, poisoned_empty

pytestmark = needs_triton


def run(inputs, layouts, grads, backend="triton", **kwargs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    if len(leaves) > 2:
        kwargs["qk_norm"] = (leaves[2], leaves[3], 1e-6)
    out = rotary(leaves[0], leaves[1], *layouts, backend=backend, **kwargs)
    return [*out, *torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(grads, out)])]


def check(inputs, layouts, **kwargs):
    inputs, layouts = [t.to(DEVICE) for t in inputs], [x.to(DEVICE) for x in layouts]
    grads = [torch.randn_like(t) for t in inputs[:2]]
    with poisoned_empty():
        got = run(inputs, layouts, grads, **kwargs)
    want = run([t.double() for t in inputs], layouts, grads, backend="reference", **kwargs)
    peer = run(inputs, layouts, grads, backend="reference", **kwargs)
    for i, (a, b, c) in enumerate(zip(got, want, peer)):
        assert_close_to_oracle(f"result {i}", a, b, c, gradient=i > 1)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 24, 72])
def test_against_oracle(dtype, dim):
    for interleaved, norm, axes in itertools.product((False, True), (False, True), (0, 3)):
        shared = axes == 0
        if norm and dim == 2:
            continue  # the gradient cancels: nothing but rounding is left
        lengths_k = [5, 0, 17, 2] if shared else [3, 1, 0, 40]
        layouts = [layout_of([5, 0, 17, 2], axes)] + ([] if shared else [layout_of(lengths_k, axes, seed=1)])
        check(tensors(24, sum(lengths_k), dim, dtype, norm=norm), layouts, interleaved=interleaved)


@pytest.mark.parametrize("length", [n for n in EDGE_LENGTHS if n < 300])
def test_edge_lengths(length):
    check(tensors(length + 3, length + 3, 32, norm=True), [layout_of([length, 0, 3])])


def test_no_rows_and_many_heads(monkeypatch):
    from mmfast.kernels import rotary as kernels

    check(tensors(0, 0, 16, norm=True), [layout_of([])])
    check(tensors(0, 0, 16, norm=True), [layout_of([0, 0])])
    for programs in (1, 3, 100):  # which share the heads
        monkeypatch.setattr(kernels, "_PROGRAMS", programs)
        check(tensors(5, 5, 16, heads=(7, 3), norm=True), [layout_of([5])])


def test_sections_base_and_start():
    layout = dataclasses.replace(layout_of([40, 9], axes=3), start=torch.tensor([5, 7], dtype=torch.int32))
    a = check(tensors(49, 49, 128), [layout], sections=(16, 24, 24), base=1e6)
    b = check(tensors(49, 49, 128), [layout], sections=(0, 64, 0))
    assert not torch.equal(a[0], b[0])
    plain = dataclasses.replace(layout_of([40, 9]), start=torch.tensor([5, 7], dtype=torch.int32))
    check(tensors(49, 49, 128), [plain], sections=(16, 24, 24))


@pytest.mark.parametrize("interleaved", [False, True])
def test_large_positions(interleaved):
    position = torch.tensor([0, 1, 4095, 99_999, 1_000_000, 123_456_789, 2**31 - 1, -1_000_000], dtype=torch.int32)
    layout = dataclasses.replace(Layout.from_lengths([8]), position=position[:, None]).to(DEVICE)
    q, k = (t.to(DEVICE) for t in tensors(8, 8, 64))
    got, _ = rotary(q, k, layout, interleaved=interleaved, backend="triton")
    want, _ = rotary(q.double(), k.double(), layout, interleaved=interleaved, backend="reference")
    assert (got - want).abs().max() < 1e-6


def test_rows_outside_the_layout():
    layout = Layout(
        torch.tensor([1, 4, 4, 9], dtype=torch.int32),
        seqused=torch.tensor([2, 0, 5], dtype=torch.int32),
        start=torch.tensor([4, 0, 9], dtype=torch.int32),
    ).to(DEVICE)
    inputs = [t.to(DEVICE) for t in tensors(11, 11, 40, norm=True)]
    grads = [torch.randn_like(t) for t in inputs[:2]]
    clean = run(inputs, [layout], grads)
    outside = [0, 3, 9, 10]
    for t in (*inputs[:2], *grads):
        t[outside] = float("nan")
    with poisoned_empty():
        dirty = run(inputs, [layout], grads)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)
    assert all(not t[outside].any() for t in dirty[:4])


def test_strides_and_partial_gradients():
    layout = layout_of([6, 5]).to(DEVICE)
    qkv = torch.randn(11, 5, 3, 16, device=DEVICE)
    q, k = qkv[:, :, 0], qkv[:, :3, 1]
    want = rotary(q.contiguous(), k.contiguous(), layout, backend="triton")
    for a, b in zip(rotary(q, k, layout, backend="triton"), want):
        assert torch.equal(a, b) and a.is_contiguous()
    leaf, weight = q.clone().requires_grad_(), torch.randn(16, device=DEVICE, requires_grad=True)
    out, _ = rotary(leaf, k, layout, qk_norm=(None, weight, 1e-6), backend="triton")
    dq, dweight = torch.autograd.grad(out, (leaf, weight), torch.randn(5, 11, 16, device=DEVICE).transpose(0, 1))
    assert dq.any() and not dweight.any()


def test_backward_repeats_bit_equal():
    inputs = [t.to(DEVICE) for t in tensors(70, 70, 16, norm=True)]
    grads, layout = [torch.randn_like(t) for t in inputs[:2]], layout_of([30, 40]).to(DEVICE)
    first = run(inputs, [layout], grads)
    for _ in range(3 if DEVICE == "cpu" else 50):
        assert all(torch.equal(a, b) for a, b in zip(first, run(inputs, [layout], grads)))


def test_wrong_arguments_are_noticed():
    (q, k), layout = (t.to(DEVICE) for t in tensors(30, 30, 64)), layout_of([10, 20], axes=2).to(DEVICE)
    want, _ = rotary(q, k, layout, backend="reference")
    later = dataclasses.replace(layout, position=layout.position + 1)
    swapped = dataclasses.replace(layout, position=layout.position.flip(1).contiguous())
    calls = [(later, {}), (swapped, {}), (layout, {"base": 10001.0}), (layout, {"sections": (15, 17)}),
             (layout, {"interleaved": True}), (layout, {"qk_norm": (None, None, 1e-6)})]  # fmt: skip
    for mutated, kwargs in calls:
        with pytest.raises(AssertionError):
            got = rotary(q, k, mutated, backend="triton", **kwargs)[0]
            assert_close_to_oracle("q", got, want.double(), want)


def test_opcheck():
    q, k, a, b = (t.to(DEVICE) for t in tensors(7, 7, 8, norm=True))
    layout = layout_of([4, 3], axes=2).to(DEVICE)
    fields = (layout.cu_seqlens, None, None, layout.position, 1e4, [3, 1], True, 1e-6, False, "triton")
    torch.library.opcheck(_rotary_backward, ([q, k], [q, k], a, b, *fields))
    torch.library.opcheck(_rotary, ([q.requires_grad_(), k.requires_grad_()], a.requires_grad_(), b, *fields))
