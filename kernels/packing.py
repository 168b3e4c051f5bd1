"""Packing: rows of several parts into one sequence, with embeddings and norm; one pass forward, one backward.

    x[t] = norm(tokens[source[t]] + type_embedding[modality[t]] + sum over axes a of table[a][position[t, a]])

A row is held in registers between its sum and its norm. Backward, rows are taken in the order of their embedding
row (part, then position): rows that share one are neighbours, and their gradients are added up in registers. A run of
such rows that crosses the border of two chunks leaves its pieces in `carry`, which a second kernel adds in order. So
there are no atomics, and no sum depends on timing. A second and third position axis take one more pass each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import Config, Example, fastest, size_class
from mmfast.kernels._packing_runs import Runs, add_to_run
from mmfast.kernels._rows import alignment, row_of, scatter_rows

MAX_DIM = 16384  # a row is held by one program
_LAYER = tl.constexpr(1)


@triton.jit
def _row_sum(
    tokens, token_row, first, size, tables, table_part, table_axis, table_row, table_size, type_embedding,
    position, axes, row, exists, part, source, column, D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The sum before the norm, float32 `[R, BLOCK_D]`."""
    wide = (column < D)[None, :]
    line, there = row_of(tokens, token_row, first, size, source, exists, ALIGN)
    x = tl.load(line[:, None] + column[None, :], mask=there[:, None] & wide, other=0.0).to(tl.float32)
    if type_embedding is not None:
        line = type_embedding + part.to(tl.int64) * D
        x += tl.load(line[:, None] + column[None, :], mask=there[:, None] & wide, other=0.0).to(tl.float32)
    for i in tl.static_range(len(tables)):
        mine = there & (part == table_part[i])
        place = tl.load(position + row * axes + table_axis[i], mask=mine, other=0).to(tl.int64)
        mine = mine & (place >= 0) & (place < table_size[i])
        line = tables[i] + place * table_row[i]
        x += tl.load(line[:, None] + column[None, :], mask=mine[:, None] & wide, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows", "first", "size"])
def _forward(
    tokens, token_row, first, size, source, modality, position, axes, type_embedding,
    tables, table_part, table_axis, table_row, table_size, weight, bias, eps, x, mean, rstd, rows,
    D: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (column < D)[None, :]
    part = tl.load(modality + row, mask=exists, other=0).to(tl.int32)
    y = _row_sum(
        tokens, token_row, first, size, tables, table_part, table_axis, table_row, table_size, type_embedding,
        position, axes, row, exists, part, tl.load(source + row, mask=exists, other=0), column, D, ALIGN,
    )  # fmt: skip
    if NORM:
        if NORM == _LAYER:
            center = tl.sum(y, 1) / D
            tl.store(mean + row, center, mask=exists)
            y = tl.where(mask, y - center[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(y * y, 1) / D + eps)
        tl.store(rstd + row, scale, mask=exists)
        y *= scale[:, None]
        if weight is not None:
            y *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    tl.store(x + (row * D)[:, None] + column[None, :], y.to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "first", "size", "dtoken_size", "chunk_rows"])
def _backward(
    dx, dx_row, tokens, token_row, first, size, source, modality, position, axes, type_embedding,
    tables, table_part, table_axis, table_row, table_size, weight, mean, rstd,
    dtokens, dtoken_row, dtoken_size, dweight, dbias,
    order, type_key, dtype_embedding, type_carry, table_key, dtable, table_carry, rows, chunk_rows,
    D: tl.constexpr, NORM: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of rows. Everything from `dtokens` on but `order` is an output, or what it needs, or None."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    column = tl.arange(0, BLOCK_D)
    line = tl.arange(0, ROWS)
    weight_total = tl.zeros([BLOCK_D], tl.float32)
    bias_total = tl.zeros([BLOCK_D], tl.float32)
    type_total = tl.zeros([BLOCK_D], tl.float32)
    table_total = tl.zeros([BLOCK_D], tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    for i in range(begin, end, ROWS):
        row = i + line
        exists = row < end
        if order is not None:
            row = tl.load(order + row, mask=exists, other=0)
        mask = exists[:, None] & (column < D)[None, :]
        part = tl.load(modality + row, mask=exists, other=0).to(tl.int32)
        at = tl.load(source + row, mask=exists, other=0)
        d = tl.load(dx + (row * dx_row)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORM:
            y = _row_sum(
                tokens, token_row, first, size, tables, table_part, table_axis, table_row, table_size,
                type_embedding, position, axes, row, exists, part, at, column, D, ALIGN,
            )  # fmt: skip
            scale = tl.load(rstd + row, mask=exists, other=0.0)[:, None]
            if NORM == _LAYER:
                y -= tl.load(mean + row, mask=exists, other=0.0)[:, None]
            y = tl.where(mask, y * scale, 0.0)
            if dweight is not None:
                weight_total += tl.sum(d * y, 0)
            if dbias is not None:
                bias_total += tl.sum(d, 0)
            if weight is not None:
                d *= w
            along = tl.sum(d * y, 1) / D
            if NORM == _LAYER:
                d -= (tl.sum(d, 1) / D)[:, None]
            d = tl.where(mask, (d - y * along[:, None]) * scale, 0.0)
        if dtokens is not None:
            pointer, there = row_of(dtokens, dtoken_row, first, dtoken_size, at, exists, ALIGN)
            tl.store(
                pointer[:, None] + column[None, :],
                d.to(pointer.dtype.element_ty),
                mask=there[:, None] & (column < D)[None, :],
            )
        if type_key is not None or table_key is not None:
            for r in range(tl.minimum(end - i, ROWS)):
                one = tl.sum(tl.where((line == r)[:, None], d, 0.0), 0)
                if type_key is not None:
                    type_total = add_to_run(
                        type_total,
                        one,
                        type_key,
                        i + r,
                        begin,
                        end,
                        rows,
                        dtype_embedding,
                        type_carry,
                        chunk,
                        column,
                        D,
                    )
                if table_key is not None:
                    table_total = add_to_run(
                        table_total, one, table_key, i + r, begin, end, rows, dtable, table_carry, chunk, column, D
                    )
    if dweight is not None:
        tl.store(dweight + chunk * D + column, weight_total, mask=column < D)
    if dbias is not None:
        tl.store(dbias + chunk * D + column, bias_total, mask=column < D)


# Launchers


def _described(tokens, sizes, position, tables, table_first) -> dict:
    """What both passes say of the parts and their tables."""
    parts = [m for m in range(len(sizes)) for _ in range(table_first[m], table_first[m + 1])]
    return {
        "tokens": tuple(tokens),
        "token_row": tuple(t.stride(0) for t in tokens),
        "first": tuple(sum(sizes[:m]) for m in range(len(sizes))),
        "size": tuple(sizes),
        "axes": 0 if position is None else position.shape[1],
        "tables": tuple(tables),
        "table_part": tuple(parts),
        "table_axis": tuple(i - table_first[m] for i, m in enumerate(parts)),
        "table_row": tuple(t.stride(0) for t in tables),
        "table_size": tuple(t.shape[0] for t in tables),
    }


def _config(dim: int, elements: int) -> Config:
    """Small rows share a warp; longer ones get a warp for so many elements."""
    block = triton.next_power_of_2(dim)
    return Config({"ROWS": max(1, elements // block), "BLOCK_D": block}, min(32, max(1, block // elements)))


# Elements of a warp: backward keeps up to four sums over rows as well. Bound by memory: the same on every architecture.
_FORWARD, _BACKWARD = 512, 256
_CANDIDATES = (128, 256, 512, 1024, 2048)


def pack_forward(
    tokens: Sequence[Tensor],
    source: Tensor,
    modality: Tensor,
    position: Tensor | None,
    type_embedding: Tensor | None,
    tables: Sequence[Tensor],
    table_first: Sequence[int],
    norm: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """Fills x, mean (layer norm) and rstd (any norm). Arguments as the CPU kernel's."""
    rows, dim = x.shape
    if rows == 0 or dim == 0:
        return
    described = _described(tokens, [t.shape[0] for t in tokens], position, tables, table_first)

    def launch(config: Config) -> None:
        _forward[(triton.cdiv(rows, config.constants["ROWS"]),)](
            source=source,
            modality=modality,
            position=position,
            type_embedding=type_embedding,
            weight=weight,
            bias=bias,
            eps=eps,
            x=x,
            mean=mean,
            rstd=rstd,
            rows=rows,
            D=dim,
            NORM=norm,
            ALIGN=alignment(tokens),
            **described,
            **config.options(),
        )

    key = ("pack", dim, x.dtype, norm, len(tokens), len(tables), size_class(rows))
    launch(fastest(key, _config(dim, _FORWARD), lambda: [_config(dim, n) for n in _CANDIDATES], launch))


def pack_backward(
    dx: Tensor,
    tokens: Sequence[Tensor],
    source: Tensor,
    modality: Tensor,
    position: Tensor | None,
    type_embedding: Tensor | None,
    tables: Sequence[Tensor],
    table_first: Sequence[int],
    norm: int,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dtokens: Sequence[Tensor | None],
    dtype_embedding: Tensor | None,
    dtables: Sequence[Tensor | None],
    dweight: Tensor | None,
    dbias: Tensor | None,
    sizes: Sequence[int],
) -> None:
    """Fills the gradients that are not None. Arguments as the CPU kernel's; without a norm `tokens` are empty."""
    rows, dim = dx.shape
    if rows == 0 or dim == 0:
        for g in (*dtokens, dtype_embedding, *dtables, dweight, dbias):
            if g is not None:
                g.zero_()
        return
    described = _described(tokens, sizes, position, tables, table_first)
    wanted = [axis for i, axis in enumerate(described["table_axis"]) if dtables[i] is not None]
    # A part whose gradient is not wanted has no rows, and borrows a pointer.
    given = [g for g in dtokens if g is not None]
    pointers = tuple(given[0] if g is None else g for g in dtokens) if given else None

    def launch(config: Config) -> None:
        chunk_rows = max(config.constants["ROWS"], triton.next_power_of_2(triton.cdiv(rows, _CHUNKS)))
        chunks = triton.cdiv(rows, chunk_rows)
        weight_partial, bias_partial = (
            None if g is None else dx.new_empty(chunks, dim, dtype=torch.float32) for g in (dweight, dbias)
        )
        for axis in sorted(set(wanted)) or [None]:
            first_pass = axis is None or axis == min(wanted)
            of_type = dtype_embedding if first_pass else None
            runs = Runs(modality, position, described, axis, dtables, of_type, chunks, dim)
            _backward[(chunks,)](
                dx=dx,
                dx_row=dx.stride(0),
                source=source,
                modality=modality,
                position=position,
                type_embedding=type_embedding,
                weight=weight,
                mean=mean,
                rstd=rstd,
                dtokens=pointers if first_pass else None,
                dtoken_row=tuple(dim for _ in dtokens),
                dtoken_size=tuple(0 if g is None else g.shape[0] for g in dtokens),
                dweight=weight_partial if first_pass else None,
                dbias=bias_partial if first_pass else None,
                order=runs.order,
                type_key=runs.type_key,
                dtype_embedding=runs.type_total,
                type_carry=runs.type_carry,
                table_key=runs.table_key,
                dtable=runs.table_total,
                table_carry=runs.table_carry,
                rows=rows,
                chunk_rows=chunk_rows,
                D=dim,
                NORM=norm,
                ALIGN=alignment([*tokens, *given]),
                **described,
                **config.options(),
            )
            runs.finish(chunk_rows)
        for g, p in ((dweight, weight_partial), (dbias, bias_partial)):
            if g is not None:
                g.copy_(p.sum(0))

    key = ("pack backward", dim, dx.dtype, norm, len(sizes), len(tables), len(wanted), size_class(rows))
    launch(fastest(key, _config(dim, _BACKWARD), lambda: [_config(dim, n) for n in _CANDIDATES], launch))


_CHUNKS = 1024  # of the backward pass, at most: about eight on each multiprocessor


def examples() -> list[Example]:
    def run(dtype, dim, norm, param_dtype):
        rows, tokens = 512, [torch.empty(256, dim, dtype=dtype) for _ in range(2)]
        source, modality = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.uint8)
        position = torch.zeros(rows, 1, dtype=torch.int32)
        types, *tables = (torch.empty(n, dim, dtype=param_dtype) for n in (2, 64, 64))
        weight = torch.empty(dim, dtype=param_dtype)
        x, statistic = torch.empty(rows, dim, dtype=dtype), torch.empty(rows)
        call = (source, modality, position, types, tables, [0, 1, 2], norm, weight)
        pack_forward(tokens, *call, weight, 1e-5, x, statistic, statistic)
        pack_backward(
            x, tokens, *call, statistic, statistic, tokens, types, tables, weight, weight, [256, 256]
        )  # fmt: skip
        pack_backward(
            x, tokens, source, modality, None, None, [], [0, 0, 0], 0, None, statistic, statistic, tokens, None, [],
            None, None, [256, 256],
        )  # fmt: skip

    def rows(dtype, width):
        x, index = torch.empty(256, width, dtype=dtype), torch.zeros(256, dtype=torch.int64)
        scatter_rows(x, index, [torch.empty_like(x)])

    return [
        Example("bfloat16 D=1024 layer norm", lambda: run(torch.bfloat16, 1024, 1, torch.bfloat16)),
        Example("bfloat16 D=768 layer norm", lambda: run(torch.bfloat16, 768, 1, torch.float32), quick=False),
        Example("bfloat16 D=128 rms norm", lambda: run(torch.bfloat16, 128, 2, torch.float32)),
        Example("bfloat16 D=4096 rms norm", lambda: run(torch.bfloat16, 4096, 2, torch.float32), quick=False),
        Example("float32 D=1024 layer norm", lambda: run(torch.float32, 1024, 1, torch.float32), quick=False),
        Example("rows bfloat16 W=1024", lambda: rows(torch.bfloat16, 1024)),
    ]
