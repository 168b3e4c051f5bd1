"""mmfast.unpack, to_padded and from_padded, and the rows that they gather, against plain loops over samples."""

import dataclasses

import pytest
import torch
from test_packing import batch, needs_cpu

from mmfast import Layout, _native, from_padded, pack, to_padded, unpack
from mmfast.reference import packing as reference


@needs_cpu
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (16,)])
def test_rows_of_any_dtype(dtype, shape):
    layout = Layout.from_lengths([3, 0, 5, 1])
    x = (torch.randn(9, *shape) * 3).abs().to(dtype)
    padded = to_padded(x, layout, value=1.0)
    assert padded.shape == (4, 5, *shape) and padded.dtype == dtype
    for b, (begin, end) in enumerate([(0, 3), (3, 3), (3, 8), (8, 9)]):
        assert torch.equal(padded[b, : end - begin], x[begin:end])
        assert torch.equal(padded[b, end - begin :], torch.ones_like(padded[b, end - begin :]))
    assert torch.equal(from_padded(padded, layout), x)
    both = dataclasses.replace(layout, source=torch.randperm(9), sizes=(4, 5), names=("a", "b"))
    parts = unpack(x, both)
    assert torch.equal(torch.cat([parts["a"], parts["b"]])[both.source], x)


@needs_cpu
def test_padding_outside_the_layout():
    """Rows outside the layout may hold NaN; they are zero in outputs and in gradients."""
    layout = Layout(
        torch.tensor([1, 4, 4, 9], dtype=torch.int32),
        seqused=torch.tensor([2, 0, 5], dtype=torch.int32),
        modality=torch.zeros(11, dtype=torch.uint8),
    )
    x = torch.randn(11, 6)
    x[[0, 3, 9, 10]] = float("nan")
    x.requires_grad_()
    padded = to_padded(x, layout, length=7)
    assert not padded.isnan().any() and torch.equal(padded[0, :2], x[1:3]) and torch.equal(padded[2, :5], x[4:9])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert grad[:, 0].tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    full = torch.full((3, 7, 6), float("nan"))
    for b, n in enumerate([2, 0, 5]):
        full[b, :n] = torch.randn(n, 6)
    full.requires_grad_()
    packed = from_padded(full, layout)
    assert packed.shape == (11, 6) and not packed.isnan().any() and not packed[[0, 3, 9, 10]].any()
    (grad,) = torch.autograd.grad(packed.sum(), full)
    assert grad.sum() == 7 * 6
    assert torch.equal(to_padded(packed, layout, length=7), full.nan_to_num(0.0))


def check_float16_fill(backend, device="cpu"):
    layout, x = Layout.from_lengths([1, 0]).to(device), torch.zeros(1, 3, dtype=torch.float16, device=device)
    for value in (-1e-7, 6e-8, 2e-8, 3.05e-5, 0.1, -3.3, 2049.0, 2051.0, 65519.0, 65520.0, -1e9, -torch.inf, torch.nan):
        padded = to_padded(x, layout, length=1, value=value, backend=backend)
        want = torch.full((3,), value).half()
        assert torch.equal(padded[1, 0].cpu().nan_to_num(7.0), want.nan_to_num(7.0)), value


@needs_cpu
def test_float16_is_filled_with_the_nearest():
    check_float16_fill("cpu")


@needs_cpu
def test_rows_differentiate_twice():
    layout = Layout.from_lengths([3, 0, 2])
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: to_padded(x, layout).square(),
        lambda x: from_padded(to_padded(x, layout).square(), layout),
        lambda x: unpack(x, pack({"a": (x, [3, 2])})[1])["a"].square(),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@needs_cpu
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_backends_agree(backend):
    parts, _ = batch(dim=10)
    x, layout = pack(parts, backend=backend)
    parts_back = unpack(x, layout, backend=backend)
    assert all(torch.equal(parts_back[n], p[0]) for n, p in parts.items())
    padded = to_padded(x, layout, value=-1.5, backend=backend)
    assert torch.equal(padded, to_padded(x, layout, value=-1.5, backend="cpu"))
    assert torch.equal(from_padded(padded, layout, backend=backend), x)


@needs_cpu
def test_unpack_of_more_than_the_cache():
    """Together the parts are larger than the cache, one alone is not."""
    dim = 1024
    rows = _native.cpu().streamed_bytes() // (4 * dim) * 3 // 4
    _, layout = pack({name: (torch.zeros(rows, 1), [rows]) for name in "ab"}, backend="reference")
    x = torch.randn(2 * rows, dim)
    for m, part in enumerate(unpack(x, layout, backend="cpu").values()):
        assert torch.equal(part, x[layout.modality == m])


@needs_cpu
def test_rows_are_gathered_from_several_parts():
    parts = [torch.randn(n, 5) for n in (3, 0, 4, 1)]
    index = torch.tensor([7, 0, 3, 2, 6, -1, 4, 1, 5, 2])
    wanted = torch.cat(parts)[index] * (index >= 0)[:, None]
    assert torch.equal(torch.ops.mmfast.gather_rows.default(parts, index, 0.0, "cpu"), wanted)


def test_reference_rows():
    x = torch.randn(3, 2)
    assert torch.equal(reference.gather_rows(x, torch.tensor([1, -1]), 4.0), torch.stack([x[1], torch.full((2,), 4.0)]))
    assert torch.equal(
        reference.scatter_rows(x, torch.tensor([3, -1, 0]), 4)[[3, 0, 1]], torch.stack([x[0], x[2], x[0] * 0])
    )
