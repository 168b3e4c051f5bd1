"""Attack step and random start over a list of tensors. Formulas and sources: mmfast/reference/perturbation.py.

A tensor is a matrix of rows; a unit (a sample, or a token, which is one row) is some consecutive rows that share a
norm. L-inf without momentum is one pass, and so is all else where a unit lies in one tile. Otherwise each norm takes a
pass more, which leaves float64 sums per row and tile, and a small kernel that adds them in order. Sums of squares in
float64 neither overflow nor cancel, whatever the gradient's scale.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Example, fastest
from mmfast.kernels._perturbation_tiles import (
    VARYING,
    Launch,
    box,
    finite,
    inverse,
    measured,
    numbers,
    origins,
    per_row,
    pick,
    round_down,
    shrink,
    tile,
    within,
)

MAX_TENSORS = 16  # of one launch; longer lists take several
# What a pass over the tiles does, and what the norm that it measures is for.
_APPLY, _L1, _L2, _BLEND, _RADIUS = (tl.constexpr(i) for i in range(5))


@triton.jit(do_not_specialize=VARYING)
def _step(
    delta, grad, origin, momentum, previous,  # tuples with one entry for each tensor, or None
    step_size, eps, step_value, eps_value, low, high, decay, blend,
    first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, first_unit, first_sum,
    partial, sums, by_l1, by_l2, by_blend, units,
    STAGE: tl.constexpr, L2: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass: the step, or sums for a norm of it. `momentum` None: `grad` is the step's direction already."""
    which, column_block, blocks, wide, row, column, sample, _place, inside = tile(
        tl.program_id(0), first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, ROWS, BLOCK
    )
    exists = row < pick(rows, which)
    mask = inside[:, None] & (column < wide)[None, :]
    offset = (row * wide)[:, None] + column[None, :]
    unit = (row if TOKEN else sample) + pick(first_unit, which)
    line = pick(first_sum, which) + row * blocks + column_block
    g = finite(tl.load(pick(grad, which) + offset, mask=mask, other=0.0).to(tl.float32))
    if STAGE == _L1:
        tl.store(partial + line, tl.sum(tl.abs(g.to(tl.float64)), 1), mask=exists)
    else:
        if momentum is not None:
            scale, rest = inverse(measured(tl.abs(g.to(tl.float64)), by_l1, 0, unit, inside, WHOLE))
            target = pick(momentum, which)
            m = decay * tl.load(target + offset, mask=mask, other=0.0).to(tl.float32)
            m = (m + g * scale[:, None] * rest[:, None]).to(target.dtype.element_ty)
            tl.store(target + offset, m, mask=mask)
            g = m.to(tl.float32)
        target = pick(delta, which)
        d = tl.load(target + offset, mask=mask, other=0.0).to(tl.float32)
        dd = d.to(tl.float64)
        gg = g.to(tl.float64)
        if STAGE == _L2:
            tl.store(partial + line, tl.sum(gg * gg, 1), mask=exists)
            tl.store(partial + sums + line, tl.sum(dd * gg, 1), mask=exists)
            tl.store(partial + 2 * sums + line, tl.sum(dd * dd, 1), mask=exists)
        else:
            a = per_row(step_value, step_size, which, sample, inside)
            limit = per_row(eps_value, eps, which, sample, inside)
            if L2:
                norm = tl.sqrt(measured(gg * gg, by_l2, 0, unit, inside, WHOLE))
                along = measured(dd * gg, by_l2, units, unit, inside, WHOLE)
                square = measured(dd * dd, by_l2, 2 * units, unit, inside, WHOLE)
                length = tl.where(norm > 0, a, 0.0).to(tl.float64)
                square += 2 * length * along / tl.where(norm > 0, norm, 1.0) + length * length
                scale, rest = inverse(norm)
                v = (d + g * scale[:, None] * (rest * a)[:, None]) * shrink(square, limit.to(tl.float64))[:, None]
            else:
                limit = round_down(limit, target.dtype.element_ty)
                v = d + tl.where(g > 0, a[:, None], tl.where(g < 0, -a[:, None], 0.0))
                v = within(v, -limit[:, None], limit[:, None])
            v = box(v, origin, which, offset, mask, low, high)
            if previous is not None:
                before = pick(previous, which)
                p = tl.load(before + offset, mask=mask, other=0.0).to(tl.float32)
                v = d + blend * (v - d) + (1 - blend) * (d - p)
                vv = tl.where(mask, v, 0.0).to(tl.float64)
                if STAGE == _BLEND:
                    tl.store(partial + line, tl.sum(vv * vv, 1), mask=exists)
                else:
                    if L2:
                        square = measured(vv * vv, by_blend, 0, unit, inside, WHOLE)
                        v *= shrink(square, limit.to(tl.float64))[:, None]
                    else:
                        v = within(v, -limit[:, None], limit[:, None])
                    v = box(v, origin, which, offset, mask, low, high)
                    tl.store(before + offset, d.to(before.dtype.element_ty), mask=mask)
            if STAGE == _APPLY:
                tl.store(target + offset, v.to(target.dtype.element_ty), mask=mask)


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


@triton.jit(do_not_specialize=[*VARYING, "index"])
def _start(
    delta, origin, eps, eps_value, low, high, seed, index,
    first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, first_unit, first_sum,
    partial, by_square, units,
    STAGE: tl.constexpr, L2: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills delta; or with STAGE other than _APPLY sums the squares of the normal numbers."""
    which, column_block, blocks, wide, row, column, sample, place, inside = tile(
        tl.program_id(0), first_program, rows, width, row_group, packed, batch, cu_seqlens, seqused, steps, ROWS, BLOCK
    )
    mask = inside[:, None] & (column < wide)[None, :]
    offset = (row * wide)[:, None] + column[None, :]
    target = pick(delta, which)
    key = tl.load(seed)
    stream = pick(index, which) * 4
    element = place[:, None] * wide + column[None, :]
    word = (element & 3).to(tl.int32)
    limit = per_row(eps_value, eps, which, sample, inside)
    if L2:
        w0, w1, w2, w3 = _words(key, element >> 2, sample[:, None], stream + 1)
        u = _uniform(tl.where(word < 2, w0, w2)) + 5.9604644775390625e-08
        sine, cosine = _sine_cosine(_uniform(tl.where(word < 2, w1, w3)))
        z = tl.sqrt(-2.0 * tl.log(u)) * tl.where((word & 1) == 0, cosine, sine)
        z = tl.where(mask, z, 0.0)
        zz = z.to(tl.float64)
        if STAGE == _APPLY:
            unit = (row if TOKEN else sample) + pick(first_unit, which)
            square = measured(zz * zz, by_square, 0, unit, inside, WHOLE)
            count = tl.zeros([ROWS], tl.float64) + wide
            token = place
            if not TOKEN:
                token = place * 0
                if cu_seqlens is not None:
                    own = inside & (pick(packed, which) + row * 0 == 1)
                    if seqused is None:
                        cu = pick(cu_seqlens, which) + sample
                        length = tl.load(cu + 1, mask=own, other=1) - tl.load(cu, mask=own, other=0)
                    else:
                        length = tl.load(pick(seqused, which) + sample, mask=own, other=1)
                    count *= length
            words = _words(key, token, sample, stream + 2)
            u = _uniform(words[0]).to(tl.float64) + 5.9604644775390625e-08
            radius = limit.to(tl.float64) * tl.exp(tl.log(u) / count)
            radius /= tl.sqrt(tl.where(square > 0, square, 1.0))
            v = z * tl.where(square > 0, radius, 0.0).to(tl.float32)[:, None]
        else:
            line = pick(first_sum, which) + row * blocks + column_block
            tl.store(partial + line, tl.sum(zz * zz, 1), mask=row < pick(rows, which))
    else:
        w0, w1, w2, w3 = _words(key, element >> 2, sample[:, None], stream)
        u = _uniform(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))
        stored_limit = round_down(limit, target.dtype.element_ty)[:, None]
        v = within(limit[:, None] * (2 * u - 1), -stored_limit, stored_limit)
    if STAGE == _APPLY:
        v = box(v, origin, which, offset, mask, low, high)
        tl.store(target + offset, v.to(target.dtype.element_ty), mask=mask)


# Launchers


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
    arguments = (delta, cu_seqlens, seqused, token, l2, bool(momentum))

    def steps(launch, delta, momentum, previous):
        batch = launch.tiles["batch"]
        direction, sums = tuple(grad), {"by_l1": None, "by_l2": None, "by_blend": None}

        def run(stage, partial):
            _step[(launch.programs,)](
                delta=tuple(delta),
                grad=direction,
                origin=origins(origin, delta),
                momentum=tuple(momentum) if momentum and direction[0] is not momentum[0] else None,
                previous=tuple(previous) if previous else None,
                step_size=numbers(step_size, step_values, batch),
                eps=numbers(eps, eps_values, batch),
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

    def trial(config):
        steps(Launch(*arguments, config), *copies())

    copies = functools.cache(lambda: [[t.clone() for t in x] for x in (delta, momentum, previous)])
    launch = Launch(*arguments)
    config = fastest(("perturb", bool(previous), *launch.key), launch.config, launch.candidates, trial)
    steps(launch if config == launch.config else Launch(*arguments, config), delta, momentum, previous)


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
    arguments = (delta, cu_seqlens, seqused, token, l2, False)

    def fill(launch):
        def run(stage, partial, squares):
            _start[(launch.programs,)](
                delta=tuple(delta),
                origin=origins(origin, delta),
                eps=numbers(eps, eps_values, launch.tiles["batch"]),
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

    launch = Launch(*arguments)
    config = fastest(
        ("start", *launch.key), launch.config, launch.candidates, lambda config: fill(Launch(*arguments, config))
    )
    fill(launch if config == launch.config else Launch(*arguments, config))


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
        Example(
            "l2 bfloat16 tokens, all options", lambda: step([text], torch.bfloat16, True, True, True, True), quick=False
        ),
        Example(
            "linf bfloat16 three modalities", lambda: step([pixels, text, text], torch.bfloat16, False, False, True)
        ),
    ]
