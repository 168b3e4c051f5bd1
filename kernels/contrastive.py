"""Contrastive losses over all pairs. Formulas and sources: mmfast/reference/contrastive.py.

Scores are made in tiles. InfoNCE forward: a program has a chunk of rows and a chunk of columns, and leaves online
log-sum-exps of both; at most 16 x 16 chunks, so that these take O(N) memory. Gradients: the derivatives of the loss
by a band of scores are written in the features' dtype, then multiplied with the features; a band has a fixed size, and
its products are added band by band, in float32. Nothing is added by atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Config, Example
from mmfast.kernels._contrastive_configs import choose

PARTS = 16  # chunks of rows and of columns, at most
BAND = 1 << 26  # scores whose derivatives are held at a time: 128 MiB in bfloat16
_MASKED = tl.constexpr(-3e38)  # finite, so that differences of masked scores are numbers


@triton.jit
def _products(
    x, y, i, j, n, m, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j>, float32 `[BLOCK_M, BLOCK_N]`; rows and columns that do not exist repeat the last one."""
    k = tl.arange(0, BLOCK_K)
    a = x + (tl.minimum(i, n - 1).to(tl.int64) * D)[:, None] + k[None, :]
    b = y + (tl.minimum(j, m - 1).to(tl.int64) * D)[None, :] + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            total = tl.dot(tl.load(a), tl.load(b), total, input_precision=PRECISION)
        else:
            some = at + k < D
            total = tl.dot(
                tl.load(a, mask=some[None, :], other=0.0),
                tl.load(b, mask=some[:, None], other=0.0),
                total,
                input_precision=PRECISION,
            )
        a += BLOCK_K
        b += BLOCK_K
    return total


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1] by the series of 2 atanh(e / (2 + e)): right for small e too."""
    s = e / (2.0 + e)
    z = s * s
    p = 1.0 / 13 + z * (1.0 / 15)
    p = 1.0 / 9 + z * (1.0 / 11 + z * p)
    p = 1.0 / 5 + z * (1.0 / 7 + z * p)
    return 2.0 * s * (1.0 + z * (1.0 / 3 + z * p))


@triton.jit
def _counted(i, j, n, m, ids_x, ids_y, offset):
    """Which pairs are positive, and which count."""
    positive = j[None, :] == i[:, None] + offset
    counts = (i < n)[:, None] & (j < m)[None, :]
    if ids_x is not None:
        own = tl.load(ids_x + i, mask=i < n, other=0)
        other = tl.load(ids_y + j, mask=j < m, other=0)
        counts = counts & (positive | (own[:, None] != other[None, :]))
    return positive, counts


_VARYING = ["n", "m", "offset", "rows_per_part", "columns_per_part", "panels", "out_panels", "first", "rows"]


@triton.jit(do_not_specialize=_VARYING)
def _statistics(
    x, y, scale, ids_x, ids_y, offset, n, m, rows_per_part, columns_per_part, panels,
    row_partial, column_partial, diagonal, products,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Peak and total of the rows and columns of one chunk pair: partials `[parts, 2, n or m]`."""
    row_part, column_part = tl.program_id(0), tl.program_id(1)
    stride = panels * 64
    factor = tl.load(scale)
    row_peaks = row_partial + column_part.to(tl.int64) * 2 * n
    column_peaks = column_partial + row_part.to(tl.int64) * 2 * m
    row_begin = row_part * rows_per_part
    column_begin = column_part * columns_per_part
    for first_column in range(column_begin, tl.minimum(column_begin + columns_per_part, m), BLOCK_N):
        j = first_column + tl.arange(0, BLOCK_N)
        column_peak = tl.full([BLOCK_N], _MASKED, tl.float32)
        column_total = tl.zeros([BLOCK_N], tl.float32)
        for first_row in range(row_begin, tl.minimum(row_begin + rows_per_part, n), BLOCK_M):
            i = first_row + tl.arange(0, BLOCK_M)
            s = _products(x, y, i, j, n, m, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            positive, counts = _counted(i, j, n, m, ids_x, ids_y, offset)
            if products is not None:
                line = products + (i.to(tl.int64) * stride)[:, None] + j[None, :]
                tl.store(line, s, mask=(i < n)[:, None] & (j < m)[None, :])
            if (first_row + offset < first_column + BLOCK_N) & (first_row + BLOCK_M + offset > first_column):
                own = tl.sum(tl.where(positive, s, 0.0), 1) * factor
                tl.store(
                    diagonal + i,
                    own,
                    mask=(i < n) & (i + offset >= first_column) & (i + offset < first_column + BLOCK_N),
                )
            z = tl.where(counts, s * factor, _MASKED)
            peak = tl.maximum(column_peak, tl.max(z, 0))
            column_total = column_total * _exp(column_peak - peak) + tl.sum(_exp(z - peak[None, :]), 0)
            column_peak = peak
            # This program's rows so far; no other program touches them.
            known = (i < n) & (first_column + i * 0 > column_begin)
            before = tl.load(row_peaks + i, mask=known, other=_MASKED)
            total = tl.load(row_peaks + n + i, mask=known, other=0.0)
            peak = tl.maximum(before, tl.max(z, 1))
            total = total * _exp(before - peak) + tl.sum(_exp(z - peak[:, None]), 1)
            tl.debug_barrier()  # the next column block reads what other threads wrote
            tl.store(row_peaks + i, peak, mask=i < n)
            tl.store(row_peaks + n + i, total, mask=i < n)
            tl.debug_barrier()
        tl.store(column_peaks + j, column_peak, mask=j < m)
        tl.store(column_peaks + m + j, column_total, mask=j < m)


@triton.jit(do_not_specialize=["n", "parts"])
def _join(partial, out, n, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp of partial statistics `[parts, 2, n]`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    line = partial + (part.to(tl.int64) * 2 * n)[:, None] + i[None, :]
    mask = (part < parts)[:, None] & (i < n)[None, :]
    peaks = tl.load(line, mask=mask, other=_MASKED)
    totals = tl.load(line + n, mask=mask, other=0.0)
    peak = tl.max(peaks, 0)
    total = tl.sum(totals * _exp(peaks - peak[None, :]), 0)
    empty = (peak <= _MASKED) & (total == total)
    lse = tl.where(empty, float("-inf"), peak + tl.log(tl.where(empty, 1.0, total)))
    tl.store(out + i, lse, mask=i < n)


@triton.jit(do_not_specialize=_VARYING)
def _derivatives(
    x, y, scale, bias, ids_x, ids_y, offset, n, m, first, rows, panels, out_panels,
    row, column, grad_row, grad_column, grad_diagonal, unit, products, out, partial,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Derivatives by the scores of `rows` rows from `first` on, in `unit`s; per tile the sums for scale, bias, loss.

    Without `row` (log-sum-exps) it is the sigmoid loss. `out` None: the sums only.
    """
    stride = panels * 64
    first_row = first + tl.program_id(1) * BLOCK_M
    i = first_row + tl.arange(0, BLOCK_M)
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(scale)
    positive, counts = _counted(i, j, n, m, ids_x, ids_y, offset)
    if products is None:
        s = _products(x, y, i, j, n, m, D, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    else:
        exists = (i < n)[:, None] & (j < m)[None, :]
        s = tl.load(products + (i.to(tl.int64) * stride)[:, None] + j[None, :], mask=exists, other=0.0)
    tile = (first_row // BLOCK_M).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if row is None:
        z = s * factor + tl.load(bias)
        z = tl.where(positive, -z, z)
        e = _exp(-tl.abs(z))
        loss = tl.where(z > 0, z, 0.0) + _log1p(e)
        tl.store(partial + tile * 3 + 2, tl.sum(tl.sum(tl.where(counts, loss, 0.0), 1), 0))
        g = tl.where(z > 0, 1.0, e) / (1.0 + e)
        g = tl.where(positive, -g, g)
    else:
        inverse = 1.0 / tl.load(unit)
        z = s * factor
        row_lse = tl.load(row + i, mask=i < n, other=0.0)
        column_lse = tl.load(column + j, mask=j < m, other=0.0)
        up = tl.load(grad_row + i, mask=i < n, other=0.0) * inverse
        left = tl.load(grad_column + j, mask=j < m, other=0.0) * inverse
        own = tl.load(grad_diagonal + i, mask=i < n, other=0.0) * inverse
        g = up[:, None] * _exp(z - row_lse[:, None]) + left[None, :] * _exp(z - column_lse[None, :])
        g += tl.where(positive, own[:, None], 0.0)
    g = tl.where(counts, g, 0.0)
    tl.store(partial + tile * 3, tl.sum(tl.sum(g * s, 1), 0))
    tl.store(partial + tile * 3 + 1, tl.sum(tl.sum(g, 1), 0))
    if out is not None:
        # Columns that do not exist are zeros, so that products with them need no mask.
        width = out_panels * 128
        line = out + ((i - first).to(tl.int64) * width)[:, None] + j[None, :]
        tl.store(line, g.to(out.dtype.element_ty), mask=(i - first < rows)[:, None] & (j < width)[None, :])


@triton.jit(do_not_specialize=["rows", "depth", "panels"])
def _multiply(
    a, b, out, scale, unit, rows, depth, panels,
    WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[rows, WIDTH]` = scale * unit * a b, added to what it holds with ADD; b `[depth, WIDTH]`.

    a: `[rows, 128 panels]`, zeros from column `depth` on; or TRANSPOSED `[depth, 128 panels]`.
    """
    stride = (panels * 128).to(tl.int64)
    i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for at in range(0, depth, BLOCK_K):
        place = tl.minimum(at + k, depth - 1).to(tl.int64)
        if TRANSPOSED:
            left = tl.load(a + i[:, None] + (place * stride)[None, :], mask=(at + k < depth)[None, :], other=0.0)
        else:
            left = tl.load(a + (tl.minimum(i, rows - 1).to(tl.int64) * stride)[:, None] + (at + k)[None, :])
        right = tl.load(b + (place * WIDTH)[:, None] + d[None, :], mask=(d < WIDTH)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    total *= tl.load(scale) * tl.load(unit)
    mask = (i < rows)[:, None] & (d < WIDTH)[None, :]
    line = out + (i.to(tl.int64) * WIDTH)[:, None] + d[None, :]
    if ADD:
        total += tl.load(line, mask=mask, other=0.0)
    tl.store(line, total.to(out.dtype.element_ty), mask=mask)


# Launchers


def _per_part(total: int, block: int) -> int:
    """Rows of a chunk, of whole blocks."""
    return triton.cdiv(triton.cdiv(total, PARTS), block) * block


def _panels(products: Tensor | None) -> int:
    """Columns of the kept products, in panels of 64."""
    return 0 if products is None else products.stride(0) // 64


def infonce_forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    offset: int,
    row: Tensor,
    column: Tensor,
    diagonal: Tensor,
    products: Tensor | None,
) -> None:
    """Fills the log-sum-exps of rows `[n]` and columns `[m]` and the positive scores `[n]`; keeps the products."""
    (n, dim), m = x.shape, y.shape[0]

    def launch(config: Config) -> None:
        per_row, per_column = (_per_part(t, config.constants[b]) for t, b in ((n, "BLOCK_M"), (m, "BLOCK_N")))
        row_parts, column_parts = triton.cdiv(n, per_row), triton.cdiv(m, per_column)
        row_partial = torch.empty(column_parts, 2, n, dtype=torch.float32, device=x.device)
        column_partial = torch.empty(row_parts, 2, m, dtype=torch.float32, device=x.device)
        _statistics[(row_parts, column_parts)](
            x, y, scale, ids_x, ids_y, offset, n, m, per_row, per_column, _panels(products),
            row_partial, column_partial, diagonal, products, D=dim, **config.options(),
        )  # fmt: skip
        for partial, out in ((row_partial, row), (column_partial, column)):
            _join[(triton.cdiv(out.shape[0], 128),)](
                partial, out, out.shape[0], partial.shape[0], PARTS=PARTS, BLOCK=128, **Config({}, 4).options()
            )

    launch(choose("statistics", launch, x, m, ids_x is not None))


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    ids_x: Tensor | None,
    ids_y: Tensor | None,
    offset: int,
    row: Tensor | None,
    column: Tensor | None,
    products: Tensor | None,
    grads: Sequence[Tensor],
    dx: Tensor | None,
    dy: Tensor | None,
) -> Tensor:
    """Fills dx and dy where they are wanted; returns float32 `[3]`: derivatives by scale and bias, and the loss.

    Args:
        row, column: InfoNCE's log-sum-exps; None: the sigmoid loss, whose sum over all pairs is divided by n.
        grads: InfoNCE: gradients of row `[n]`, column `[m]`, diagonal `[n]`.
    """
    (n, dim), m = x.shape, y.shape[0]
    width, panels = triton.cdiv(m, 128), _panels(products)
    if row is None:
        unit = torch.full((), 1 / n, dtype=torch.float32, device=x.device)
    else:
        # The derivatives fit any dtype, whatever the size of the batch and a loss scale.
        unit = torch.stack([g.abs().amax() for g in grads]).amax()
        unit = torch.where(unit > 0, unit, 1.0)
    wanted = dx is not None or dy is not None

    def room(config: Config) -> tuple[int, Tensor | None, Tensor]:
        """Rows of a band, their derivatives, and the partial sums of all tiles."""
        block_m, block_n = config.constants["BLOCK_M"], config.constants["BLOCK_N"]
        band = min(n, max(block_m, BAND // (width * 128) // block_m * block_m))
        band = triton.cdiv(band, block_m) * block_m
        tiles = triton.cdiv(n, block_m) * (width * 128 // block_n)
        partial = torch.zeros(tiles, 3, dtype=torch.float32, device=x.device)
        return band, x.new_empty(min(band, n), width * 128) if wanted else None, partial

    def derive(config, first, rows, g, partial):
        columns = width * 128 // config.constants["BLOCK_N"]
        _derivatives[(columns, triton.cdiv(rows, config.constants["BLOCK_M"]))](
            x, y, scale, bias, ids_x, ids_y, offset, n, m, first, rows, panels, width,
            row, column, *(grads if row is not None else (None, None, None)), unit, products, g, partial,
            D=dim, **config.options(),
        )  # fmt: skip

    def first_band(config):
        band, g, partial = room(config)
        derive(config, 0, min(band, n), g, partial)

    config = choose("derivatives", first_band, x, m, ids_x is not None or row is None)
    band, g, partial = room(config)
    bands = triton.cdiv(n, band)
    total_y = torch.zeros(y.shape, dtype=torch.float32, device=y.device) if dy is not None and bands > 1 else dy

    def multiply(b, out, rows, depth, transposed, add):
        def launch(config, out):
            grid = (triton.cdiv(dim, config.constants["BLOCK_N"]), triton.cdiv(rows, config.constants["BLOCK_M"]))
            _multiply[grid](
                g,
                b,
                out,
                scale,
                unit,
                rows,
                depth,
                width,
                WIDTH=dim,
                TRANSPOSED=transposed,
                ADD=add,
                **config.options(),
            )

        config = choose("multiply", lambda config: launch(config, torch.empty_like(out)), x, m, variant=transposed)
        launch(config, out)

    for first in range(0, n, band):
        rows = min(band, n - first)
        derive(config, first, rows, g, partial)
        if dx is not None:
            multiply(y, dx[first : first + rows], rows, m, False, False)
        if dy is not None:
            multiply(x[first : first + rows], total_y, m, rows, True, bands > 1)
    if total_y is not dy:
        dy.copy_(total_y)
    return (partial.sum(0, dtype=torch.float64) * unit).float()


def examples() -> list[Example]:
    def run(dtype, n, dim, with_ids, kept):
        x = torch.empty(n, dim, dtype=dtype)
        number, row = torch.ones(()), torch.empty(n)
        ids = torch.zeros(n, dtype=torch.int32) if with_ids else None
        products = torch.empty(n, n) if kept else None
        infonce_forward(x, x, number, ids, ids, 0, row, row, row, products)
        gradients(x, x, number, None, ids, ids, 0, row, row, products, [row] * 3, x, x)
        gradients(x, x, number, number, ids, ids, 0, None, None, None, [], x, x)

    kernels = ("statistics", "derivatives", "multiply")
    cases = [
        (torch.bfloat16, 2048, 768, False, False),
        (torch.bfloat16, 2048, 768, True, True),
        (torch.float16, 256, 512, False, False),
        (torch.float32, 256, 512, True, False),
    ]
    return [
        Example(
            f"{str(c[0])[6:]} N={c[1]} D={c[2]}{' ids' * c[3]}{' kept' * c[4]}",
            lambda c=c: run(*c),
            wgmma=() if c[0] == torch.float32 or c[4] else kernels,
            quick=c[0] == torch.bfloat16,
        )
        for c in cases
    ]
