"""Rows of several tensors as those of their concatenation: gathering and scattering them without atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Config


@triton.jit
def row_of(pointers, strides, first, size, at, exists, ALIGN: tl.constexpr):
    """Pointer to rows of the concatenation of several tensors `[R]`, and whether there is such a row.

    ALIGN: bytes; a choice by a tensor hides from the compiler what all pointers are multiples of.
    """
    base = pointers[0] + tl.zeros_like(at)
    offset = tl.zeros_like(at)
    there = at != at
    for m in tl.static_range(len(pointers)):
        mine = exists & (at >= first[m]) & (at < first[m] + size[m])
        base = tl.where(mine, pointers[m], base)
        offset = tl.where(mine, (at - first[m]) * strides[m], offset)
        there = there | mine
    return tl.multiple_of(base + offset, ALIGN), there


@triton.jit(do_not_specialize=["rows", "x_first", "x_size", "out_first", "out_size"])
def _gather(
    x, x_row, x_first, x_size, index, out, out_row, out_first, out_size, rows, width,
    FILL: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + row, mask=row < rows, other=-1).to(tl.int64)
    wide = (column < width)[None, :]
    source, there = row_of(x, x_row, x_first, x_size, at, row < rows, ALIGN)
    fill = tl.full([ROWS, BLOCK], FILL, x[0].dtype.element_ty)
    value = tl.load(source[:, None] + column[None, :], mask=there[:, None] & wide, other=fill)
    target, there = row_of(out, out_row, out_first, out_size, row, row < rows, ALIGN)
    tl.store(target[:, None] + column[None, :], value, mask=there[:, None] & wide)


@triton.jit(do_not_specialize=["rows", "out_rows"])
def _invert(index, out, rows, out_rows, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + i, mask=i < rows, other=-1)
    tl.store(out + at, i, mask=(at >= 0) & (at < out_rows))


def alignment(tensors: Sequence[Tensor]) -> int:
    """Bytes that every row begins at a multiple of: 16 or 1."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    return 16 if aligned else 1


def gather_rows(x: Sequence[Tensor], index: Tensor, value: float, out: Sequence[Tensor]) -> None:
    """out[i] = x[index[i]], or `value` where index[i] names no row: rows of the concatenations of x and of out.

    Args:
        x, out: tensors `[N_m, W]` or `[N_m]`, rows any stride apart.
        index: int64 `[sum of out's rows]`.
    """
    x, out = ([t if t.dim() == 2 else t[:, None] for t in some] for some in (x, out))
    rows, width = index.shape[0], out[0].shape[1]
    if rows == 0 or width == 0:
        return
    block = min(1024, triton.next_power_of_2(width))
    config = Config({"ROWS": max(1, 1024 // block), "BLOCK": block})  # a copy: the same on every architecture

    def described(name: str, tensors: Sequence[Tensor]) -> dict:
        sizes = [t.shape[0] for t in tensors]
        return {
            name: tuple(tensors),
            f"{name}_row": tuple(t.stride(0) for t in tensors),
            f"{name}_first": tuple(sum(sizes[:m]) for m in range(len(sizes))),
            f"{name}_size": tuple(sizes),
        }

    _gather[(triton.cdiv(rows, config.constants["ROWS"]), triton.cdiv(width, block))](
        index=index,
        rows=rows,
        width=width,
        ALIGN=alignment([*x, *out]),
        FILL=value if out[0].is_floating_point() else int(value),
        **described("x", x),
        **described("out", out),
        **config.options(),
    )


def scatter_rows(x: Tensor, index: Tensor, out: Sequence[Tensor]) -> None:
    """out[index[i]] = x[i]; rows that no index names are zero. No row may be named twice.

    Args:
        x: `[N, W]` or `[N]`, rows any stride apart.
        index: int64 `[N]`, rows of the concatenation of out; negative: the row is dropped.
    """
    rows = sum(t.shape[0] for t in out)
    inverse = torch.full((rows,), -1, dtype=torch.int64, device=x.device)
    if index.shape[0] and rows:
        _invert[(triton.cdiv(index.shape[0], 1024),)](
            index, inverse, index.shape[0], rows, **Config({"BLOCK": 1024}).options()
        )
    gather_rows([x], inverse, 0.0, out)
