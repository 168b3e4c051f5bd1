"""Attack step and random start over a list of tensors. Formulas and sources: mmfast/reference/perturbation.py.

A tensor is a matrix of rows; a unit (a sample, or a token, which is one row) is some consecutive rows that share a
norm. L-inf without momentum is one pass. Each norm takes a pass that leaves float64 sums per row and tile, and a small
kernel that adds them in order and makes the unit's coefficients from them. Sums of squares in float64 neither overflow
nor cancel, whatever the gradient's scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Config, Example
from mmfast.kernels._samples import sample_of

MAX_TENSORS = 16  # of one launch; longer lists take several
# What a pass over the tiles does, and what the norm that it measures is for.
_APPLY, _L1, _L2, _BLEND, _RADIUS = (tl.constexpr(i) for i in range(5))


@triton.jit
def _pick(values, which):
    value = values[0] + which * 0  # a tensor, also where the list holds one number
    for i in tl.static_range(1, len(values)):
        value = tl.where(which == i, values[i], value)
    return value


@triton.jit
def _tensor_of(program, first):
    """The tensor that a program works on: `first` holds each tensor's first program."""
    which = program * 0
    for i in tl.static_range(1, len(first)):
        which += (program >= first[i]).to(which.dtype)
    return which, program - _pick(first, which)


@triton.jit
def _finite(g):
    """NaN as 0, infinities as the largest finite number."""
    g = tl.where(g == g, g, 0.0)
    return tl.minimum(tl.maximum(g, -3.4028234663852886e38), 3.4028234663852886e38)


@triton.jit
def _within(v, low, high):
    """Clamp that keeps a NaN of v."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def _round_down(eps, dtype: tl.constexpr):
    """The largest number of the dtype that is not above eps, so that stored values keep the limit."""
    if dtype != tl.float32:
        nearest = eps.to(dtype)
        below = (nearest.to(tl.int16, bitcast=True) - 1).to(dtype, bitcast=True)
        eps = tl.where(nearest.to(tl.float32) > eps, below, nearest).to(tl.float32)
    return eps


@triton.jit
def _per_row(value, values, which, sample, inside):
    """A number, or a number per sample, `[R]`."""
    if values is None:
        return tl.where(inside, _pick(value, which), 0.0)
    else:
        return tl.load(_pick(values, which) + sample, mask=inside, other=0.0)


@triton.jit
def _inverse(norm):
    """1 / norm as a power of two and the rest, float32 each: the inverse of a tiny norm is no float32 number."""
    exponent = tl.floor(tl.log2(tl.where(norm > 0, norm, 1.0)))
    scale = tl.exp2(-tl.minimum(tl.maximum(exponent, -126.0), 126.0))
    rest = tl.where(norm > 0, 1.0 / (tl.where(norm > 0, norm, 1.0) * scale), 0.0)
    return scale.to(tl.float32), rest.to(tl.float32)


@triton.jit
def _shrink(square, eps):
    """The factor that brings a vector into the ball."""
    out = square > eps * eps
    return tl.where(out, eps / tl.sqrt(tl.where(out, square, 1.0)), 1.0).to(tl.float32)


@triton.jit
def _tile(
    program, first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which tensor, rows and columns a program has, and what the layout says of its rows."""
    which, block = _tensor_of(program, first_program)
    height = _pick(rows, which)
    wide = _pick(width, which)
    group = _pick(row_group, which)
    blocks = tl.cdiv(wide, BLOCK)
    row = (block // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (block % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < height
    sample = row // group
    place = row * 0
    if cu_seqlens is not None:
        own = _pick(packed, which) + row * 0 == 1
        if seqused is None:
            found, place, there = sample_of(
                sample, inside & own, _pick(cu_seqlens, which), None, _pick(batch, which), steps
            )
        else:
            found, place, there = sample_of(
                sample, inside & own, _pick(cu_seqlens, which), _pick(seqused, which), _pick(batch, which), steps
            )
        inside = tl.where(own, there, inside)
        sample = tl.where(own, found, sample)
        place = tl.where(own, place, 0)
    place = place * group + row % group
    return which, block % blocks, blocks, wide, row, column, sample, place, inside


@triton.jit
def _box(v, origin, which, offset, mask, low, high):
    if origin is not None:
        x = tl.load(_pick(origin, which) + offset, mask=mask, other=0.0).to(tl.float32)
        v = _within(v, _pick(low, which) - x, _pick(high, which) - x)
    return v


@triton.jit
def _measured(value, sums, plane, unit, inside, WHOLE: tl.constexpr):
    """The sum of float64 values over each row's unit: here, or by an earlier pass and `_add`."""
    if WHOLE:
        return tl.sum(value, 1)
    else:
        return tl.load(sums + plane + unit, mask=inside, other=0.0)


_VARYING = ["first_program", "rows", "packed", "batch", "steps", "first_unit", "first_sum", "units", "sums"]


@triton.jit(do_not_specialize=_VARYING)
def _step(
    delta, grad, origin, momentum, previous,  # tuples with one entry for each tensor, or None
    step_size, eps, step_value, eps_value, low, high, decay, blend,
    first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, first_unit, first_sum,
    partial, sums, by_l1, by_l2, by_blend, units,
    STAGE: tl.constexpr, L2: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass: the step, or sums for a norm of it. `momentum` None: `grad` is the step's direction already."""
    which, column_block, blocks, wide, row, column, sample, _place, inside = _tile(
        tl.program_id(0), first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, ROWS, BLOCK
    )
    exists = row < _pick(rows, which)
    mask = inside[:, None] & (column < wide)[None, :]
    offset = (row * wide)[:, None] + column[None, :]
    unit = (row if TOKEN else sample) + _pick(first_unit, which)
    line = _pick(first_sum, which) + row * blocks + column_block
    g = _finite(tl.load(_pick(grad, which) + offset, mask=mask, other=0.0).to(tl.float32))
    if STAGE == _L1:
        tl.store(partial + line, tl.sum(tl.abs(g.to(tl.float64)), 1), mask=exists)
    else:
        if momentum is not None:
            scale, rest = _inverse(_measured(tl.abs(g.to(tl.float64)), by_l1, 0, unit, inside, WHOLE))
            target = _pick(momentum, which)
            m = decay * tl.load(target + offset, mask=mask, other=0.0).to(tl.float32)
            m = (m + g * scale[:, None] * rest[:, None]).to(target.dtype.element_ty)
            tl.store(target + offset, m, mask=mask)
            g = m.to(tl.float32)
        target = _pick(delta, which)
        d = tl.load(target + offset, mask=mask, other=0.0).to(tl.float32)
        dd = d.to(tl.float64)
        gg = g.to(tl.float64)
        if STAGE == _L2:
            tl.store(partial + line, tl.sum(gg * gg, 1), mask=exists)
            tl.store(partial + sums + line, tl.sum(dd * gg, 1), mask=exists)
            tl.store(partial + 2 * sums + line, tl.sum(dd * dd, 1), mask=exists)
        else:
            a = _per_row(step_value, step_size, which, sample, inside)
            limit = _per_row(eps_value, eps, which, sample, inside)
            if L2:
                norm = tl.sqrt(_measured(gg * gg, by_l2, 0, unit, inside, WHOLE))
                along = _measured(dd * gg, by_l2, units, unit, inside, WHOLE)
                square = _measured(dd * dd, by_l2, 2 * units, unit, inside, WHOLE)
                length = tl.where(norm > 0, a, 0.0).to(tl.float64)
                square += 2 * length * along / tl.where(norm > 0, norm, 1.0) + length * length
                scale, rest = _inverse(norm)
                v = (d + g * scale[:, None] * (rest * a)[:, None]) * _shrink(square, limit.to(tl.float64))[:, None]
            else:
                limit = _round_down(limit, target.dtype.element_ty)
                v = d + tl.where(g > 0, a[:, None], tl.where(g < 0, -a[:, None], 0.0))
                v = _within(v, -limit[:, None], limit[:, None])
            v = _box(v, origin, which, offset, mask, low, high)
            if previous is not None:
                before = _pick(previous, which)
                p = tl.load(before + offset, mask=mask, other=0.0).to(tl.float32)
                v = d + blend * (v - d) + (1 - blend) * (d - p)
                vv = tl.where(mask, v, 0.0).to(tl.float64)
                if STAGE == _BLEND:
                    tl.store(partial + line, tl.sum(vv * vv, 1), mask=exists)
                else:
                    if L2:
                        square = _measured(vv * vv, by_blend, 0, unit, inside, WHOLE)
                        v *= _shrink(square, limit.to(tl.float64))[:, None]
                    else:
                        v = _within(v, -limit[:, None], limit[:, None])
                    v = _box(v, origin, which, offset, mask, low, high)
                    tl.store(before + offset, d.to(before.dtype.element_ty), mask=mask)
            if STAGE == _APPLY:
                tl.store(target + offset, v.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _add(
    partial, sums, out, units, rows, width, packed, cu_seqlens, seqused, first_unit, first_sum,
    TOKEN: tl.constexpr, PLANES: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of one unit in order. The sums of consecutive rows lie behind each other."""
    program = tl.program_id(0).to(tl.int64)
    which, begin = _tensor_of(program, first_unit)
    end = begin + 1
    if cu_seqlens is not None and not TOKEN:
        own = _pick(packed, which) == 1
        if own:
            cu = _pick(cu_seqlens, which) + begin
            begin = tl.load(cu).to(tl.int64)
            end = tl.load(cu + 1).to(tl.int64)
            if seqused is not None:
                end = begin + tl.load(_pick(seqused, which) + (program - _pick(first_unit, which)))
            end = tl.minimum(end, _pick(rows, which))
    blocks = tl.cdiv(_pick(width, which), TILE)
    first = _pick(first_sum, which)
    for plane in tl.static_range(PLANES):
        total = tl.zeros([BLOCK], tl.float64)
        for i in range(begin * blocks, end * blocks, BLOCK):
            at = i + tl.arange(0, BLOCK)
            total += tl.load(partial + plane * sums + first + at, mask=at < end * blocks, other=0.0)
        tl.store(out + plane * units + program, tl.sum(total, 0))


@triton.jit
def _uniform(bits):
    """float32 in [0, 1) on a grid of 2^-24."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _sine_cosine(u):
    """Of 2 pi u, u in [0, 1): reduced to an eighth of a turn around the nearest quarter."""
    quarter = (u * 4.0 + 0.5).to(tl.int32)
    x = (u - quarter.to(tl.float32) * 0.25) * 6.2831853
    z = x * x
    s = ((-1.9515296e-4 * z + 8.3321609e-3) * z - 1.6666655e-1) * z * x + x
    c = ((2.4433157e-5 * z - 1.3887316e-3) * z + 4.1666646e-2) * z * z - 0.5 * z + 1.0
    odd = (quarter & 1) == 1
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where((quarter & 2) == 2, -sine, sine), tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)


@triton.jit
def _words(seed, at, sample, stream):
    """Philox4x32-10 of a place in a sample: four words, as csrc/include/mmfast/rng.h makes them."""
    low = at.to(tl.int32)
    zero = low * 0
    return tl.philox(seed, low, sample.to(tl.int32) + zero, stream + zero, (at >> 32).to(tl.int32))


@triton.jit(do_not_specialize=[*_VARYING, "index"])
def _start(
    delta, origin, eps, eps_value, low, high, seed, index,
    first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, first_unit, first_sum,
    partial, by_square, units,
    STAGE: tl.constexpr, L2: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills delta; or with STAGE other than _APPLY sums the squares of the normal numbers."""
    which, column_block, blocks, wide, row, column, sample, place, inside = _tile(
        tl.program_id(0), first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, ROWS, BLOCK
    )
    mask = inside[:, None] & (column < wide)[None, :]
    offset = (row * wide)[:, None] + column[None, :]
    target = _pick(delta, which)
    key = tl.load(seed)
    stream = _pick(index, which) * 4
    element = place[:, None] * wide + column[None, :]
    word = (element & 3).to(tl.int32)
    limit = _per_row(eps_value, eps, which, sample, inside)
    if L2:
        w0, w1, w2, w3 = _words(key, element >> 2, sample[:, None], stream + 1)
        u = _uniform(tl.where(word < 2, w0, w2)) + 5.9604644775390625e-08
        sine, cosine = _sine_cosine(_uniform(tl.where(word < 2, w1, w3)))
        z = tl.sqrt(-2.0 * tl.log(u)) * tl.where((word & 1) == 0, cosine, sine)
        z = tl.where(mask, z, 0.0)
        zz = z.to(tl.float64)
        if STAGE == _APPLY:
            unit = (row if TOKEN else sample) + _pick(first_unit, which)
            square = _measured(zz * zz, by_square, 0, unit, inside, WHOLE)
            count = tl.zeros([ROWS], tl.float64) + wide
            token = place
            if not TOKEN:
                token = place * 0
                if cu_seqlens is not None:
                    own = inside & (_pick(packed, which) + row * 0 == 1)
                    if seqused is None:
                        cu = _pick(cu_seqlens, which) + sample
                        length = tl.load(cu + 1, mask=own, other=1) - tl.load(cu, mask=own, other=0)
                    else:
                        length = tl.load(_pick(seqused, which) + sample, mask=own, other=1)
                    count *= length
            words = _words(key, token, sample, stream + 2)
            u = _uniform(words[0]).to(tl.float64) + 5.9604644775390625e-08
            radius = limit.to(tl.float64) * tl.exp(tl.log(u) / count)
            radius /= tl.sqrt(tl.where(square > 0, square, 1.0))
            v = z * tl.where(square > 0, radius, 0.0).to(tl.float32)[:, None]
        else:
            line = _pick(first_sum, which) + row * blocks + column_block
            tl.store(partial + line, tl.sum(zz * zz, 1), mask=row < _pick(rows, which))
    else:
        w0, w1, w2, w3 = _words(key, element >> 2, sample[:, None], stream)
        u = _uniform(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))
        stored_limit = _round_down(limit, target.dtype.element_ty)[:, None]
        v = _within(limit[:, None] * (2 * u - 1), -stored_limit, stored_limit)
    if STAGE == _APPLY:
        v = _box(v, origin, which, offset, mask, low, high)
        tl.store(target + offset, v.to(target.dtype.element_ty), mask=mask)


# Launchers


def _config(widths: Sequence[int], whole_rows: bool) -> Config:
    """Tiles of 2048 elements, 16 for each thread; a row that is a unit of its own lies in one tile."""
    longest = max(widths)
    block = triton.next_power_of_2(longest if whole_rows else min(longest, 1024))
    return Config({"ROWS": max(1, 2048 // block), "BLOCK": block}, num_warps=max(4, block // 512))


class _Launch:
    """At most `MAX_TENSORS` tensors of one call: how they are cut into tiles, and what kernels say of them."""

    def __init__(self, delta, cu_seqlens, seqused, token, l2, momentum):
        self.token, self.device = token, delta[0].device
        widths = [d.shape[-1] if token else d[0].numel() if d.shape[0] else 0 for d in delta]
        rows = [d.numel() // w if w else 0 for d, w in zip(delta, widths)]
        layouts = [cu is not None for cu in cu_seqlens]
        # A unit of one row that fits a tile needs no second pass.
        self.whole = (token or not any(layouts)) and max(widths, default=0) <= WHOLE
        self.config = _config(widths, self.whole and (l2 or momentum))
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


def _numbers(tensors: Sequence[Tensor | None], values: Sequence[float], batch: Sequence[int]):
    """Tensors for all, or None for all: where some are numbers and some are not, the numbers become tensors."""
    given = [t for t in tensors if t is not None]
    if not given:
        return None
    return tuple(given[0].new_full((n,), value) if t is None else t for t, value, n in zip(tensors, values, batch))


def _origins(origin: Sequence[Tensor | None], delta: Sequence[Tensor]):
    if all(x is None for x in origin):
        return None
    return tuple(d if x is None else x for x, d in zip(origin, delta))


def perturb(
    delta: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum: Sequence[Tensor],
    previous: Sequence[Tensor],
    origin: Sequence[Tensor | None],
    step_size: Sequence[Tensor | None],
    eps: Sequence[Tensor | None],
    cu_seqlens: Sequence[Tensor | None],
    seqused: Sequence[Tensor | None],
    step_values: Sequence[float],
    eps_values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    l2: bool,
    token: bool,
    decay: float,
    blend: float,
) -> None:
    """Changes delta, momentum and previous in place. Contiguous tensors; arguments as the CPU kernel's."""
    kept = [i for i, d in enumerate(delta) if d.numel()]
    for begin in range(0, len(kept), MAX_TENSORS):
        _perturb_some(
            *(
                [x[i] for i in kept[begin : begin + MAX_TENSORS]] if x else []
                for x in (delta, grad, momentum, previous, origin, step_size, eps, cu_seqlens, seqused,
                          step_values, eps_values, low, high)
            ),
            l2, token, decay, blend,
        )  # fmt: skip


def _perturb_some(
    delta, grad, momentum, previous, origin, step_size, eps, cu_seqlens, seqused, step_values, eps_values, low, high,
    l2, token, decay, blend,
):  # fmt: skip
    launch = _Launch(delta, cu_seqlens, seqused, token, l2, bool(momentum))
    batch = launch.tiles["batch"]
    direction, sums = tuple(grad), {"by_l1": None, "by_l2": None, "by_blend": None}

    def run(stage, partial):
        _step[(launch.programs,)](
            delta=tuple(delta),
            grad=direction,
            origin=_origins(origin, delta),
            momentum=tuple(momentum) if momentum and direction[0] is not momentum[0] else None,
            previous=tuple(previous) if previous else None,
            step_size=_numbers(step_size, step_values, batch),
            eps=_numbers(eps, eps_values, batch),
            step_value=tuple(step_values),
            eps_value=tuple(eps_values),
            low=tuple(low),
            high=tuple(high),
            decay=decay,
            blend=blend,
            partial=partial,
            sums=launch.sums,
            STAGE=stage.value,
            L2=l2,
            WHOLE=launch.whole,
            **sums,
            **launch.tiles,
        )

    def measure(stage, planes):
        partial = launch.room(planes)
        run(stage, partial)
        return launch.add(partial)

    if not launch.whole:
        if momentum:
            sums["by_l1"] = measure(_L1, 1)
        if l2:
            sums["by_l2"] = measure(_L2, 3)
            if momentum:
                direction = tuple(momentum)
            if previous:
                sums["by_blend"] = measure(_BLEND, 1)
    run(_APPLY, None)


def random_start(
    delta: Sequence[Tensor],
    origin: Sequence[Tensor | None],
    eps: Sequence[Tensor | None],
    cu_seqlens: Sequence[Tensor | None],
    seqused: Sequence[Tensor | None],
    eps_values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    l2: bool,
    token: bool,
    seed: Tensor,
) -> None:
    """Fills delta. Contiguous tensors; arguments as the CPU kernel's."""
    kept = [i for i, d in enumerate(delta) if d.numel()]
    for begin in range(0, len(kept), MAX_TENSORS):
        some = kept[begin : begin + MAX_TENSORS]
        _start_some(
            *([x[i] for i in some] for x in (delta, origin, eps, cu_seqlens, seqused, eps_values, low, high)),
            l2, token, seed, some,
        )  # fmt: skip


def _start_some(delta, origin, eps, cu_seqlens, seqused, eps_values, low, high, l2, token, seed, index):
    launch = _Launch(delta, cu_seqlens, seqused, token, l2, False)

    def run(stage, partial, squares):
        _start[(launch.programs,)](
            delta=tuple(delta),
            origin=_origins(origin, delta),
            eps=_numbers(eps, eps_values, launch.tiles["batch"]),
            eps_value=tuple(eps_values),
            low=tuple(low),
            high=tuple(high),
            seed=seed,
            index=tuple(index),
            partial=partial,
            by_square=squares,
            STAGE=stage.value,
            L2=l2,
            WHOLE=launch.whole,
            **launch.tiles,
        )

    squares = None
    if l2 and not launch.whole:
        partial = launch.room(1)
        run(_RADIUS, partial, None)
        squares = launch.add(partial)
    run(_APPLY, None, squares)


def examples() -> list[Example]:
    def step(shapes, dtype, l2, token, everything, packed=False):
        x = [torch.empty(shape, dtype=dtype) for shape in shapes]
        some = x if everything else [None] * len(x)
        ends = [torch.zeros(9, dtype=torch.int32) if packed else None] * len(x)
        none, ones = [None] * len(x), [1.0] * len(x)
        changed = [[torch.empty_like(t) for t in x] if everything else [] for _ in range(2)]
        perturb(x, x, *changed, some, none, none, ends, none, ones, ones, ones, ones, l2, token, 0.9, 0.75)
        seed = torch.zeros((), dtype=torch.int64)
        random_start(x, none, none, ends, none, ones, ones, ones, l2, token, seed)

    pixels, text = (8, 3, 64, 64), (256, 1024)
    return [
        Example("linf float32 pixels", lambda: step([pixels], torch.float32, False, False, False)),
        Example("linf bfloat16 pixels, all options", lambda: step([pixels], torch.bfloat16, False, False, True)),
        Example("l2 float32 pixels, all options", lambda: step([pixels], torch.float32, True, False, True)),
        Example("l2 bfloat16 packed text", lambda: step([text], torch.bfloat16, True, False, False, True)),
        Example("l2 bfloat16 tokens, all options", lambda: step([text], torch.bfloat16, True, True, True, True)),
        Example(
            "linf bfloat16 three modalities", lambda: step([pixels, text, text], torch.bfloat16, False, False, True)
        ),
    ]
