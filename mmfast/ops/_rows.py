"""Gathering and scattering of rows: two linear ops, each the other's gradient. Used by packing and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _native
from mmfast.ops._dispatch import choose, cpu_refusal, cuda_refusal, triton_refusal
from mmfast.ops._library import define
from mmfast.reference import packing as reference

_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)


def gather(op: str, x: Tensor, index: Tensor, value: float = 0.0, backend: str | None = None) -> Tensor:
    """out[i] = x[index[i]], or `value` where index[i] is negative. No row may be named twice."""
    chosen = _choose(op, x, backend)
    if chosen == "reference":
        return reference.gather_rows(x, index, value)
    if x.dtype == torch.bool:
        return _gather([x.to(torch.uint8)], index, value, chosen).bool()
    return _gather([x], index, value, chosen)


def scatter(op: str, x: Tensor, index: Tensor, sizes: Sequence[int], backend: str | None = None) -> list[Tensor]:
    """Tensors of `sizes` rows, whose concatenation has out[index[i]] = x[i].

    Rows that no index names are zero, a negative index drops the row.
    """
    chosen = _choose(op, x, backend)
    if chosen == "reference":
        return list(reference.scatter_rows(x, index, sum(sizes)).split(list(sizes)))
    if x.dtype == torch.bool:
        return [out.bool() for out in _scatter(x.to(torch.uint8), index, sizes, chosen)]
    return _scatter(x, index, sizes, chosen)


def _choose(op: str, x: Tensor, backend: str | None) -> str:
    refusals = {
        "cpu": lambda: cpu_refusal(x, dtypes=_DTYPES),
        "triton": lambda: triton_refusal(x, dtypes=_DTYPES),
        "cuda": lambda: cuda_refusal(x, dtypes=_DTYPES),
    }
    return choose(op, backend, refusals)


def _dense_rows(x: Tensor) -> Tensor:
    """Rows may be strided in dimension 0 only."""
    return x if x.dim() == 1 or x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()


def _gather_cpu(x: list[Tensor], index: Tensor, value: float) -> Tensor:
    out = _native.empty(index.shape[0], *x[0].shape[1:], dtype=x[0].dtype)
    _native.cpu().gather_rows([_two(_dense_rows(t)) for t in x], index, value, _two(out))
    return out


def _gather_triton(x: list[Tensor], index: Tensor, value: float) -> Tensor:
    from mmfast.kernels import _rows as kernels

    out = _gather_fake(x, index, value)
    kernels.gather_rows([_two(_dense_rows(t)) for t in x], index.contiguous(), value, [_two(out)])
    return out


def _gather_cuda(x: list[Tensor], index: Tensor, value: float) -> Tensor:
    out = _gather_fake(x, index, value)
    x = [_two(_dense_rows(t)) for t in x]
    _native.cuda().gather_rows(x, index.contiguous(), value, _two(out), _native.stream_of(out))
    return out


def _scatter_cpu(x: Tensor, index: Tensor, sizes: list[int]) -> list[Tensor]:
    out = [_native.empty(rows, *x.shape[1:], dtype=x.dtype) for rows in sizes]
    _native.cpu().scatter_rows(_two(_dense_rows(x)), index, [_two(t) for t in out])
    return out


def _scatter_triton(x: Tensor, index: Tensor, sizes: list[int]) -> list[Tensor]:
    from mmfast.kernels import _rows as kernels

    out = _scatter_fake(x, index, sizes)
    kernels.scatter_rows(_two(_dense_rows(x)), index.contiguous(), [_two(t) for t in out])
    return out


def _scatter_cuda(x: Tensor, index: Tensor, sizes: list[int]) -> list[Tensor]:
    out = _scatter_fake(x, index, sizes)
    x, stream = _two(_dense_rows(x)), _native.stream_of(x)
    inverse = torch.full((sum(sizes),), -1, dtype=torch.int64, device=x.device)
    _native.cuda().invert_rows(index.contiguous(), inverse, stream)
    for t, rows in zip(out, inverse.split(sizes)):
        _native.cuda().gather_rows([x], rows, 0.0, _two(t), stream)
    return out


def _gather_fake(x: list[Tensor], index: Tensor, value: float) -> Tensor:
    return x[0].new_empty(index.shape[0], *x[0].shape[1:])


def _scatter_fake(x: Tensor, index: Tensor, sizes: list[int]) -> list[Tensor]:
    return [x.new_empty(rows, *x.shape[1:]) for rows in sizes]


def _two(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x


def _gather_context(ctx, inputs, output):
    x, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)
    ctx.sizes = [t.shape[0] for t in x]


def _gather_backward(ctx, grad):
    return _scatter(grad, ctx.saved_tensors[0], ctx.sizes, ctx.backend), None, None, None


def _scatter_context(ctx, inputs, output):
    x, index, ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(index)
    ctx.like = x.shape[1:], x.dtype, x.device


def _scatter_backward(ctx, grads):
    shape, dtype, device = ctx.like
    grads = [
        torch.zeros(rows, *shape, dtype=dtype, device=device) if g is None else g for g, rows in zip(grads, ctx.sizes)
    ]
    return _gather(grads, ctx.saved_tensors[0], 0.0, ctx.backend), None, None, None


_gather = define(
    "gather_rows(Tensor[] x, Tensor index, float value, str backend) -> Tensor",
    cpu=_gather_cpu,
    triton=_gather_triton,
    cuda=_gather_cuda,
    fake=_gather_fake,
    setup_context=_gather_context,
    backward=_gather_backward,
)
_scatter = define(
    "scatter_rows(Tensor x, Tensor index, SymInt[] sizes, str backend) -> Tensor[]",
    cpu=_scatter_cpu,
    triton=_scatter_triton,
    cuda=_scatter_cuda,
    fake=_scatter_fake,
    setup_context=_scatter_context,
    backward=_scatter_backward,
)
