"""Rotary embedding of queries and keys, with optional RMS norm before it: one pass forward, one backward.

    angle[t, j] = position[t, axis(j)] * base^(-2 j / D),  (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)

Su et al., RoFormer (arXiv 2104.09864), equation 34. A program turns a block of rows, all heads of q and k (or a
group of them): angles are made once. Angles are reduced in float64, so that positions of millions keep their accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Config, Example, fastest, size_class
from mmfast.kernels._samples import sample_of


@triton.jit
def _sine_cosine(turns):
    """Sine and cosine of float64 quarter turns, in float32."""
    nearest = tl.floor(turns + 0.5)
    quadrant = nearest.to(tl.int64)
    a = ((turns - nearest) * 1.5707963267948966).to(tl.float32)
    z = a * a
    sine = a * (1 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880)))))
    cosine = 1 + z * (-0.5 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))))
    odd = (quadrant & 1) == 1
    s = tl.where(odd, cosine, sine)
    c = tl.where(odd, sine, cosine)
    return tl.where((quadrant & 2) == 2, -s, s), tl.where(((quadrant + 1) & 2) == 2, -c, c)


@triton.jit
def _load_pairs(head, row, stride, row_mask, j, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two members of the pairs of one head, float32 `[T, HALF]` each."""
    line = head + row[:, None] * stride
    if INTERLEAVED:
        both = tl.arange(0, 2 * j.shape[0])[None, :]
        x = tl.load(line + both, mask=row_mask[:, None] & (both < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [row.shape[0], j.shape[0], 2]))
    else:
        mask = row_mask[:, None] & (j < HALF)[None, :]
        first = tl.load(line + j[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(line + HALF + j[None, :], mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(head, row, stride, row_mask, j, first, second, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    line = head + row[:, None] * stride
    dtype = head.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * j.shape[0])[None, :]
        x = tl.reshape(tl.join(first, second), [row.shape[0], 2 * j.shape[0]])
        tl.store(line + both, x.to(dtype), mask=row_mask[:, None] & (both < 2 * HALF))
    else:
        mask = row_mask[:, None] & (j < HALF)[None, :]
        tl.store(line + j[None, :], first.to(dtype), mask=mask)
        tl.store(line + HALF + j[None, :], second.to(dtype), mask=mask)


@triton.jit
def _load_weight(weight, j, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else HALF
    first = tl.load(weight + step * j, mask=j < HALF, other=0.0)
    return first[None, :], tl.load(weight + step * j + gap, mask=j < HALF, other=0.0)[None, :]


@triton.jit
def _turn_side(
    x, x_row, x_head, grad, grad_row, grad_head, out, weight, partial,
    heads, per_group, row, exists, inside, j, sine, cosine, eps,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The heads of one tensor that belong to this program. `grad` None: forward."""
    group = tl.program_id(1).to(tl.int64)
    if NORM and weight is not None:
        w1, w2 = _load_weight(weight, j, HALF, INTERLEAVED)
    if partial is not None:
        dw1 = tl.zeros([row.shape[0], j.shape[0]], tl.float32)
        dw2 = tl.zeros([row.shape[0], j.shape[0]], tl.float32)
    for h in range(group * per_group, tl.minimum(heads, (group + 1) * per_group)):
        if NORM or grad is None:
            x1, x2 = _load_pairs(x + h * x_head, row, x_row, inside, j, HALF, INTERLEAVED)
        if NORM:
            rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * HALF) + eps)[:, None]
            x1 *= rstd
            x2 *= rstd
        if grad is None:
            if NORM and weight is not None:
                x1 *= w1
                x2 *= w2
            y1 = x1 * cosine - x2 * sine
            y2 = x2 * cosine + x1 * sine
        else:
            g1, g2 = _load_pairs(grad + h * grad_head, row, grad_row, inside, j, HALF, INTERLEAVED)
            y1 = g1 * cosine + g2 * sine
            y2 = g2 * cosine - g1 * sine
            if NORM:
                if partial is not None:
                    dw1 += y1 * x1
                    dw2 += y2 * x2
                if weight is not None:
                    y1 *= w1
                    y2 *= w2
                mean = (tl.sum(y1 * x1 + y2 * x2, 1) / (2 * HALF))[:, None]
                y1 = (y1 - x1 * mean) * rstd
                y2 = (y2 - x2 * mean) * rstd
        _store_pairs(out + h * 2 * HALF, row, heads * 2 * HALF, exists, j, y1, y2, HALF, INTERLEAVED)
    if partial is not None:
        step: tl.constexpr = 2 if INTERLEAVED else 1
        gap: tl.constexpr = 1 if INTERLEAVED else HALF
        line = partial + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * 2 * HALF + step * j
        tl.store(line, tl.sum(dw1, 0), mask=j < HALF)
        tl.store(line + gap, tl.sum(dw2, 0), mask=j < HALF)


@triton.jit(do_not_specialize=["rows", "batch", "steps", "per_group"])
def _rotary(
    x, grad, out, weight, partial,  # tuples with one entry for each tensor
    x_row, x_head, grad_row, grad_head, heads, per_group,
    cu_seqlens, seqused, start, position,
    rows, batch, steps, eps,
    LOG2_BASE: tl.constexpr, AXES: tl.constexpr, SECTION_0: tl.constexpr, SECTION_1: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_T: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = row < rows
    sample, place, inside = sample_of(row, exists, cu_seqlens, seqused, batch, steps)
    j = tl.arange(0, BLOCK_HALF)
    if position is None:
        if start is not None:
            place += tl.load(start + sample, mask=inside, other=0)
        at = tl.broadcast_to(place[:, None], [BLOCK_T, BLOCK_HALF])
    else:
        axis = (j >= SECTION_0).to(tl.int32) + (j >= SECTION_0 + SECTION_1).to(tl.int32)
        axis = tl.minimum(axis, AXES - 1)
        at = tl.load(position + row[:, None] * AXES + axis[None, :], mask=inside[:, None], other=0)
    # Quarter turns per position.
    log2_base = tl.full([BLOCK_HALF], LOG2_BASE, tl.float64)
    frequency = tl.exp2(j.to(tl.float64) * (-1.0 / HALF) * log2_base) * 0.6366197723675814
    sine, cosine = _sine_cosine(at.to(tl.float64) * frequency[None, :])
    for i in tl.static_range(len(x)):
        _turn_side(
            x[i], x_row[i], x_head[i], grad[i], grad_row[i], grad_head[i], out[i], weight[i], partial[i],
            heads[i], per_group[i], row, exists, inside, j, sine, cosine, eps,
            HALF, INTERLEAVED, NORM,
        )  # fmt: skip


def rotary(
    x: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    dweights: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    seqused: Tensor | None,
    start: Tensor | None,
    position: Tensor | None,
    base: float,
    sections: Sequence[int],
    norm: bool,
    eps: float,
    interleaved: bool,
) -> None:
    """Fills `out` (and `dweights`). Arguments as the CPU kernel's: without `grads` it is the forward pass."""
    rows, _, dim = x[0].shape
    wanted = [g for g in dweights if g is not None]
    if rows == 0 or dim == 0 or all(t.shape[1] == 0 for t in x):
        for g in wanted:
            g.zero_()
        return
    count, half, batch = len(x), dim // 2, cu_seqlens.shape[0] - 1
    nothing, given = (None,) * count, [*sections, 0, 0]
    position = None if position is None else position.contiguous()

    def launch(config: Config) -> None:
        blocks = triton.cdiv(rows, config.constants["BLOCK_T"])
        # Few rows: the heads are shared by several programs.
        groups = min(max(t.shape[1] for t in x), triton.cdiv(_PROGRAMS, blocks))
        partial = [
            x[0].new_empty(blocks * groups, dim, dtype=torch.float32) if grads and dweights[i] is not None else None
            for i in range(count)
        ]
        _rotary[(blocks, groups)](
            tuple(x),
            tuple(grads) if grads else nothing,
            tuple(out),
            tuple(weights),
            tuple(partial),
            tuple(t.stride(0) for t in x),
            tuple(t.stride(1) for t in x),
            tuple(t.stride(0) for t in grads) if grads else nothing,
            tuple(t.stride(1) for t in grads) if grads else nothing,
            tuple(t.shape[1] for t in x),
            tuple(triton.cdiv(t.shape[1], groups) for t in x),
            cu_seqlens,
            seqused,
            start,
            position,
            rows,
            batch,
            batch.bit_length(),
            eps,
            LOG2_BASE=math.log2(base),
            AXES=1 if position is None else position.shape[1],
            SECTION_0=given[0],
            SECTION_1=given[1],
            HALF=half,
            BLOCK_HALF=triton.next_power_of_2(half),
            INTERLEAVED=interleaved,
            NORM=norm,
            **config.options(),
        )
        for p, g in zip(partial, dweights):
            if p is not None:
                torch.sum(p, 0, out=g)

    key = ("rotary", dim, x[0].dtype, bool(grads), norm, interleaved, size_class(rows, *(t.shape[1] for t in x)))
    launch(fastest(key, _config(dim), lambda: _candidates(dim), launch))


_PROGRAMS = 528  # enough for four on each of 132 multiprocessors


def _config(dim: int) -> Config:
    """16 elements of a row block's two halves for each thread: bound by memory, the same on every architecture."""
    return Config({"BLOCK_T": max(1, 2048 // triton.next_power_of_2(dim))})


def _candidates(dim: int) -> list[Config]:
    half = triton.next_power_of_2(dim)
    return [Config({"BLOCK_T": max(1, size // half)}, warps) for size in (1024, 2048, 4096) for warps in (2, 4, 8)]


def examples() -> list[Example]:
    def run(dtype, dim, norm, interleaved, axes):
        q, k = torch.empty(256, 8, dim, dtype=dtype), torch.empty(256, 2, dim, dtype=dtype)
        ends = torch.zeros(9, dtype=torch.int32)
        position = torch.zeros(256, axes, dtype=torch.int32) if axes else None
        weights = [torch.empty(dim) if norm else None] * 2
        rest = (ends, None, None, position, 1e4, [dim // 2, 0, 0][: max(axes, 1)], norm, 1e-6, interleaved)
        rotary([q, k], [], [q, k], weights, [], *rest)
        rotary([q, k], [q, k], [q, k], weights, weights, *rest)

    cases = [
        (torch.bfloat16, 128, True, False, 0),
        (torch.bfloat16, 128, False, False, 3),
        (torch.bfloat16, 64, False, True, 0),
        (torch.float32, 128, True, False, 0),
    ]
    return [
        Example(
            f"{str(c[0])[6:]} D={c[1]}{' norm' * c[2]}{' interleaved' * c[3]}{f' {c[4]} axes' if c[4] else ''}",
            lambda c=c: run(*c),
        )
        for c in cases
    ]
