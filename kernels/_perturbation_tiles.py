"""How tensors of an attack are cut into tiles, the sums over their units, and what the passes over tiles share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Config, size_class
from mmfast.kernels._samples import sample_of


@triton.jit
def pick(values, which):
    value = values[0] + which * 0  # a tensor, also where the list holds one number
    for i in tl.static_range(1, len(values)):
        value = tl.where(which == i, values[i], value)
    return value


@triton.jit
def tensor_of(program, first):
    """The tensor that a program works on: `first` holds each tensor's first program."""
    which = program * 0
    for i in tl.static_range(1, len(first)):
        which += (program >= first[i]).to(which.dtype)
    return which, program - pick(first, which)


@triton.jit
def finite(g):
    """NaN as 0, infinities as the largest finite number."""
    g = tl.where(g == g, g, 0.0)
    return tl.minimum(tl.maximum(g, -3.4028234663852886e38), 3.4028234663852886e38)


@triton.jit
def within(v, low, high):
    """Clamp that keeps a NaN of v."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def round_down(eps, dtype: tl.constexpr):
    """The largest number of the dtype that is not above eps, so that stored values keep the limit."""
    if dtype != tl.float32:
        nearest = eps.to(dtype)
        below = (nearest.to(tl.int16, bitcast=True) - 1).to(dtype, bitcast=True)
        eps = tl.where(nearest.to(tl.float32) > eps, below, nearest).to(tl.float32)
    return eps


@triton.jit
def per_row(value, values, which, sample, inside):
    """A number, or a number per sample, `[R]`."""
    if values is None:
        return tl.where(inside, pick(value, which), 0.0)
    else:
        return tl.load(pick(values, which) + sample, mask=inside, other=0.0)


@triton.jit
def inverse(norm):
    """1 / norm as a power of two and the rest, float32 each: the inverse of a tiny norm is no float32 number."""
    exponent = tl.floor(tl.log2(tl.where(norm > 0, norm, 1.0)))
    scale = tl.exp2(-tl.minimum(tl.maximum(exponent, -126.0), 126.0))
    rest = tl.where(norm > 0, 1.0 / (tl.where(norm > 0, norm, 1.0) * scale), 0.0)
    return scale.to(tl.float32), rest.to(tl.float32)


@triton.jit
def shrink(square, eps):
    """The factor that brings a vector into the ball."""
    out = square > eps * eps
    return tl.where(out, eps / tl.sqrt(tl.where(out, square, 1.0)), 1.0).to(tl.float32)


@triton.jit
def tile(
    program, first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which tensor, rows and columns a program has, and what the layout says of its rows."""
    which, block = tensor_of(program, first_program)
    height = pick(rows, which)
    wide = pick(width, which)
    group = pick(row_group, which)
    blocks = tl.cdiv(wide, BLOCK)
    row = (block // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < height
    sample = row // group
    place = row * 0
    if cu_seqlens is not None:
        own = pick(packed, which) + row * 0 == 1
        if seqused is None:
            found, place, there = sample_of(
                sample, inside & own, pick(cu_seqlens, which), None, pick(batch, which), steps
            )
        else:
            found, place, there = sample_of(
                sample, inside & own, pick(cu_seqlens, which), pick(seqused, which), pick(batch, which), steps
            )
        inside = tl.where(own, there, inside)
        sample = tl.where(own, found, sample)
        place = tl.where(own, place, 0)
    place = place * group + row % group
    return which, block % blocks, blocks, wide, row, column, sample, place, inside


@triton.jit
def box(v, origin, which, offset, mask, low, high):
    if origin is not None:
        x = tl.load(pick(origin, which) + offset, mask=mask, other=0.0).to(tl.float32)
        v = within(v, pick(low, which) - x, pick(high, which) - x)
    return v


@triton.jit
def measured(value, sums, plane, unit, inside, WHOLE: tl.constexpr):
    """The sum of float64 values over each row's unit: here, or by an earlier pass and `_add`."""
    if WHOLE:
        return tl.sum(value, 1)
    else:
        return tl.load(sums + plane + unit, mask=inside, other=0.0)


VARYING = ["first_program", "rows", "packed", "batch", "steps", "first_unit", "first_sum", "units", "sums"]


@triton.jit(do_not_specialize=VARYING)
def _add(
    partial, sums, out, units, rows, width, packed, cu_seqlens, seqused, first_unit, first_sum,
    TOKEN: tl.constexpr, PLANES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of one unit in order. The sums of consecutive rows lie behind each other."""
    program = tl.program_id(0).to(tl.int64)
    which, begin = tensor_of(program, first_unit)
    end = begin + 1
    if cu_seqlens is not None and not TOKEN:
        own = pick(packed, which) == 1
        if own:
            cu = pick(cu_seqlens, which) + begin
            begin = tl.load(cu).to(tl.int64)
            end = tl.load(cu + 1).to(tl.int64)
            if seqused is not None:
                end = begin + tl.load(pick(seqused, which) + (program - pick(first_unit, which)))
            end = tl.minimum(end, pick(rows, which))
    blocks = tl.cdiv(pick(width, which), TILE)
    first = pick(first_sum, which)
    for plane in tl.static_range(PLANES):
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(begin * blocks, end * blocks, BLOCK):
            at = i + tl.arange(0, BLOCK)
            total += tl.load(partial + plane * sums + first + at, mask=at < end * blocks, other=0.0)
        tl.store(out + plane * units + program, tl.sum(total, 0))


def _config(widths: Sequence[int], whole_rows: bool, elements: int = 2048) -> Config:
    """Tiles of so many elements, 16 for each thread; a row that is a unit of its own lies in one tile, 8 for each.

    Bound by memory: the same on every architecture.
    """
    longest = max(widths)
    block = triton.next_power_of_2(longest if whole_rows else min(longest, 1024))
    warps = max(elements // (256 if whole_rows else 512), block // 512)
    return Config({"ROWS": max(1, elements // block), "BLOCK": block}, num_warps=min(32, warps))


class Launch:
    """At most `MAX_TENSORS` tensors of one call: how they are cut into tiles, and what kernels say of them."""

    def __init__(self, delta, cu_seqlens, seqused, token, l2, momentum, config=None):
        self.token, self.device = token, delta[0].device
        widths = [d.shape[-1] if token else d[0].numel() if d.shape[0] else 0 for d in delta]
        rows = [d.numel() // w if w else 0 for d, w in zip(delta, widths)]
        layouts = [cu is not None for cu in cu_seqlens]
        # A unit of one row that fits a tile needs no second pass.
        self.whole = (token or not any(layouts)) and max(widths, default=0) <= WHOLE
        whole_rows = self.whole and (l2 or momentum)
        self.config = _config(widths, whole_rows) if config is None else config
        self.candidates = lambda: [_config(widths, whole_rows, n) for n in (512, 1024, 4096, 8192)]
        self.key = (len(delta), delta[0].dtype, token, l2, momentum, whole_rows, size_class(max(rows), max(widths)))
        tile, block = self.config.constants["ROWS"], self.config.constants["BLOCK"]
        columns = [triton.cdiv(w, block) for w in widths]
        batch = [d.shape[0] if cu is None else cu.shape[0] - 1 for d, cu in zip(delta, cu_seqlens)]
        programs = _cumulative([triton.cdiv(r, tile) * c for r, c in zip(rows, columns)])
        units = _cumulative(rows if token else batch)
        sums = _cumulative([r * c for r, c in zip(rows, columns)])
        self.programs, self.units, self.sums = programs[-1], units[-1], sums[-1]
        given = [cu for cu in cu_seqlens if cu is not None]
        used = any(s is not None for s in seqused)
        self.rows = {
            "rows": tuple(rows),
            "width": tuple(widths),
            "packed": tuple(int(p) for p in layouts),
            # Tensors without a layout borrow one, which is not read.
            "cu_seqlens": tuple(given[0] if cu is None else cu for cu in cu_seqlens) if given else None,
            "seqused": tuple(
                given[0] if cu is None else cu.diff() if s is None else s for cu, s in zip(cu_seqlens, seqused)
            )
            if used
            else None,
            "first_unit": tuple(units[:-1]),
            "first_sum": tuple(sums[:-1]),
        }
        self.tiles = {
            **self.rows,
            "first_program": tuple(programs[:-1]),
            "row_group": tuple(math.prod(d.shape[1:-1]) if token else 1 for d in delta),
            "batch": tuple(batch),
            "steps": max((b.bit_length() for b, p in zip(batch, layouts) if p), default=0),
            "units": self.units,
            "TOKEN": token,
            **self.config.options(),
        }

    def room(self, planes: int) -> Tensor:
        return torch.empty(planes, self.sums, dtype=torch.float64, device=self.device)

    def add(self, partial: Tensor) -> Tensor:
        """float64 `[planes, units]`: the sums of each unit."""
        planes = partial.shape[0]
        out = torch.empty(planes, self.units, dtype=torch.float64, device=self.device)
        block = 16 if self.token else 256
        _add[(self.units,)](
            partial, self.sums, out, self.units, **self.rows, TOKEN=self.token, PLANES=planes,
            TILE=self.config.constants["BLOCK"], **Config({"BLOCK": block}, num_warps=1).options(),
        )  # fmt: skip
        return out


WHOLE = 8192  # a unit up to this many elements is measured and changed in one pass


def _cumulative(sizes: Sequence[int]) -> list[int]:
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return ends


def numbers(tensors: Sequence[Tensor | None], values: Sequence[float], batch: Sequence[int]):
    """Tensors for all, or None for all: where some are numbers and some are not, the numbers become tensors."""
    given = [t for t in tensors if t is not None]
    if not given:
        return None
    return tuple(given[0].new_full((n,), value) if t is None else t for t, value, n in zip(tensors, values, batch))


def origins(origin: Sequence[Tensor | None], delta: Sequence[Tensor]):
    if all(x is None for x in origin):
        return None
    return tuple(d if x is None else x for x, d in zip(origin, delta))
