"""Gathering and scattering of rows: two linear ops, each the other's gradient. Used by packing and padding."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import _native
from mmfast.ops._dispatch import choose, cpu_refusal, triton_refusal
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
    return _through(x, value, chosen, lambda x: _gather(x, index, value, chosen))


def scatter(op: str, x: Tensor, index: Tensor, rows: int, backend: str | None = None) -> Tensor:
    """out[index[i]] = x[i]; rows that no index names are zero, a negative index drops the row."""
    chosen = _choose(op, x, backend)
    if chosen == "reference":
        return reference.scatter_rows(x, index, rows)
    return _through(x, 0.0, chosen, lambda x: _scatter(x, index, rows, chosen))


def _choose(op: str, x: Tensor, backend: str | None) -> str:
    refusals = {"cpu": lambda: cpu_refusal(x, dtypes=_DTYPES), "triton": lambda: triton_refusal(x, dtypes=_DTYPES)}
    return choose(op, backend, refusals)


def _through(x: Tensor, value: float, backend: str, function) -> Tensor:
    """Through a dtype that the kernel knows."""
    if x.dtype == torch.bool:
        return function(x.to(torch.uint8)).bool()
    if x.dtype == torch.float16 and value and backend == "cpu":
        return function(x.float()).half()
    return function(x)


def _dense_rows(x: Tensor) -> Tensor:
    """Rows may be strided in dimension 0 only."""
    return x if x.dim() == 1 or x.shape[0] == 0 or x[0].is_contiguous() else x.contiguous()


def _gather_cpu(x: Tensor, index: Tensor, value: float) -> Tensor:
    out = x.new_empty(index.shape[0], *x.shape[1:])
    _native.cpu().gather_rows(_two(_dense_rows(x)), index, value, _two(out))
    return out


def _gather_triton(x: Tensor, index: Tensor, value: float) -> Tensor:
    from mmfast.kernels import _rows as kernels

    out = x.new_empty(index.shape[0], *x.shape[1:])
    kernels.gather_rows([_two(_dense_rows(x))], index.contiguous(), value, [_two(out)])
    return out


def _scatter_cpu(x: Tensor, index: Tensor, rows: int) -> Tensor:
    out = x.new_empty(rows, *x.shape[1:])
    _native.cpu().scatter_rows(_two(_dense_rows(x)), index, _two(out))
    return out


def _scatter_triton(x: Tensor, index: Tensor, rows: int) -> Tensor:
    from mmfast.kernels import _rows as kernels

    out = x.new_empty(rows, *x.shape[1:])
    kernels.scatter_rows(_two(_dense_rows(x)), index.contiguous(), [_two(out)])
    return out


def _two(out: Tensor) -> Tensor:
    return out.flatten(1) if out.dim() > 1 else out


def _gather_context(ctx, inputs, output):
    x, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)
    ctx.rows = x.shape[0]


def _scatter_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.backend = inputs[-1]


def _gather_backward(ctx, grad):
    return _scatter(grad, ctx.saved_tensors[0], ctx.rows, ctx.backend), None, None, None


def _scatter_backward(ctx, grad):
    return _gather(grad, ctx.saved_tensors[0], 0.0, ctx.backend), None, None, None


_gather = define(
    "gather_rows(Tensor x, Tensor index, float value, str backend) -> Tensor",
    cpu=_gather_cpu,
    triton=_gather_triton,
    fake=lambda x, index, value: x.new_empty(index.shape[0], *x.shape[1:]),
    setup_context=_gather_context,
    backward=_gather_backward,
)
_scatter = define(
    "scatter_rows(Tensor x, Tensor index, SymInt rows, str backend) -> Tensor",
    cpu=_scatter_cpu,
    triton=_scatter_triton,
    fake=lambda x, index, rows: x.new_empty(rows, *x.shape[1:]),
    setup_context=_scatter_context,
    backward=_scatter_backward,
)
