"""Attention's gradients, without atomics: dk and dv by key tiles, dq by query tiles, both in a fixed order.

    delta = sum(dout * out), P = exp(S - lse), dV = drop(P)^T dO
    dS = P * (drop(dO V^T) - delta), dQ = dS K, dK = dS^T Q

(Dao 2023, arXiv 2307.08691, algorithm 2). The softcap multiplies dS by 1 - tanh^2. Programs that own keys loop over the
query heads of their group. Where programs are few, each shares its tiles among several, whose sums are added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import _attention_configs as configs
from mmfast.kernels._attention_plan import Side, mask_of, plan
from mmfast.kernels._attention_tiles import (
    LOG2E,
    Problem,
    aligned,
    dropout_keep,
    load_rows,
    other_rows,
    own_rows,
    read_record,
    strides,
    tanh,
    tile_of,
    visible,
    window_bounds,
    work_of,
)
from mmfast.kernels._common import OPTIONS, architecture


@triton.jit
def _base(lse, first, lines, exists, EXACT: tl.constexpr):
    """The exponent's base of some rows; infinite where nothing is seen, so that weights are 0."""
    log = tl.load(lse + first + lines, mask=exists, other=float("-inf"))
    if not EXACT:
        log = log * LOG2E
    return tl.where(log == float("-inf"), float("inf"), log)


@triton.jit
def _weights(scores, base, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """Softmax weights from products of queries and keys, and the softcap's derivative.

    Powers of 2, or EXACT, for float32: of e, since large scores lose fewer bits before the subtraction.
    """
    slope = 1.0
    scores = scores * scale
    if SOFTCAP:
        capped = tanh(scores, EXACT)
        slope = 1.0 - capped * capped
        scores = capped * softcap
    if EXACT:
        weights = tl.exp(scores - base)
    else:
        weights = tl.exp2(scores - base)
    return weights, slope


@triton.jit
def _loop_keys(
    acc, q, do, base, delta, k, v, k_tile, v_tile, step_k, step_v, dims, list, direction, first, last, begin_k, end_k,
    position_k, head, sample, row_in_sample, word, time, low, high, modality_k, time_k, seed, scale, softcap, limit,
    keep_scale, PARTIAL: tl.constexpr, LISTED: tl.constexpr, RULE: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS K over the entries first..last of a list of key tiles."""
    columns = tl.arange(0, BLOCK_N)
    tile = first
    if LISTED:
        tile = tl.load(list + first * direction, mask=first < last, other=0).to(tl.int32)
    for i in range(first, last):
        offset = tile * BLOCK_N
        at = (begin_k + offset).to(tl.int64)
        left = end_k - begin_k - offset
        keys = load_rows(k + at * step_k + k_tile, dims, left, BLOCK_N, D, BLOCK_D, PARTIAL)
        values = load_rows(v + at * step_v + v_tile, dims, left, BLOCK_N, D, BLOCK_D, PARTIAL)
        if LISTED:
            tile = tl.load(list + (i + 1) * direction, mask=i + 1 < last, other=0).to(tl.int32)
        else:
            tile = i + 1
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        weights, slope = _weights(scores, base[:, None], scale, softcap, SOFTCAP, q.dtype == tl.float32)
        if PARTIAL:
            exists = columns < left
            position = position_k + offset + columns
            t, m = other_rows(modality_k, time_k, at, columns, position, exists, RULE)
            seen = visible(
                exists[None, :], word[:, None], m[None, :], time[:, None], t[None, :], low[:, None], high[:, None],
                position[None, :], RULE, LEFT, RIGHT,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        if DROPOUT:
            keep = dropout_keep(
                seed, head + row_in_sample[:, None] * 0, sample, row_in_sample[:, None], offset, limit, BLOCK_M, BLOCK_N
            )
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - delta[:, None]) * slope
        acc = tl.dot(dscores.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows_q", "capacity", "parts", "left", "right", "limit"])
def _backward_dq(
    q, k, v, do, lse, delta, dq, records, lists, counts, order, words, time_q, modality_k, time_k, seed,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    rows_q, capacity, parts, scale, softcap, softmax_scale, left, right, limit, keep_scale,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, RULE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of queries, heads, parts); dq `[parts, Tq, H, D]`."""
    tile, record, extent = tile_of(records, order)
    if extent == 0:
        return
    head = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.arange(0, BLOCK_M)
    valid, first, sample, offset, position, begin_k, end_k, position_k = read_record(record)
    exists = row < valid
    at = first + row
    row_in_sample = offset + row
    position += row
    time, word = own_rows(words, time_q, first, row, position, exists, RULE)
    low, high = window_bounds(position, left, right, LEFT, RIGHT)
    keys = tl.where(valid > 0, end_k - begin_k, 0)
    front, back, full_low, full_high, partial_low, partial_high = work_of(
        records, lists, counts, tile, keys, part, parts, capacity, BLOCK_N, SPLIT
    )  # fmt: skip

    dims = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (dims < D)[None, :]
    head64, head_k = head.to(tl.int64), (head // GROUP).to(tl.int64)
    step_k, step_v = stride_kt.to(tl.int64) * 8, stride_vt.to(tl.int64) * 8
    q_tile = q + head64 * (stride_qh * 8) + at[:, None] * (stride_qt.to(tl.int64) * 8) + dims[None, :]
    do_tile = do + head64 * (stride_doh * 8) + at[:, None] * (stride_dot.to(tl.int64) * 8) + dims[None, :]
    query = tl.load(q_tile, mask=inside, other=0.0)
    dout = tl.load(do_tile, mask=inside, other=0.0)
    base = _base(lse + head64 * rows_q, first, row, exists, q.dtype.element_ty == tl.float32)
    row_delta = tl.load(delta + head64 * rows_q + at, mask=exists, other=0.0)
    k, v = k + head_k * (stride_kh * 8), v + head_k * (stride_vh * 8)
    columns = tl.arange(0, BLOCK_N)[:, None]
    k_tile = columns * (stride_kt * 8) + dims[None, :]
    v_tile = columns * (stride_vt * 8) + dims[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    LISTED: tl.constexpr = counts is not None
    acc = _loop_keys(
        acc, query, dout, base, row_delta, k, v, k_tile, v_tile, step_k, step_v, dims, front, 1, full_low, full_high,
        begin_k, end_k, position_k, head, sample, row_in_sample, word, time, low, high, modality_k, time_k, seed, scale,
        softcap, limit, keep_scale, False, LISTED, RULE, LEFT, RIGHT, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_M, BLOCK_N,
        PRECISION,
    )  # fmt: skip
    acc = _loop_keys(
        acc, query, dout, base, row_delta, k, v, k_tile, v_tile, step_k, step_v, dims, back, -1, partial_low,
        partial_high, begin_k, end_k, position_k, head, sample, row_in_sample, word, time, low, high, modality_k,
        time_k, seed, scale, softcap, limit, keep_scale, True, LISTED, RULE, LEFT, RIGHT, SOFTCAP, DROPOUT, D, BLOCK_D,
        BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc = tl.where(exists[:, None], acc * softmax_scale, 0.0)
    heads = tl.num_programs(1)
    to = ((part.to(tl.int64) * rows_q + at) * heads + head) * D
    owned = (row < extent)[:, None] & (dims < D)[None, :]
    tl.store(dq + to[:, None] + dims[None, :], acc.to(dq.dtype.element_ty), mask=owned)


@triton.jit
def _loop_queries(
    dk, dv, k, v, q, do, q_tile, do_tile, lse, delta, first_row, step_q, step_do, dims, list, direction, first, last,
    begin_q, end_q, position_q, head, sample, first_key, t, word, position, modality_q, time_q, seed, scale, softcap,
    left, right, limit, keep_scale, PARTIAL: tl.constexpr, LISTED: tl.constexpr, RULE: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS^T Q and P^T dO over the entries first..last of a list of query tiles; tiles of scores are keys x queries."""
    rows = tl.arange(0, BLOCK_M)
    tile = first
    if LISTED:
        tile = tl.load(list + first * direction, mask=first < last, other=0).to(tl.int32)
    for i in range(first, last):
        offset = tile * BLOCK_M
        at = (begin_q + offset).to(tl.int64)
        remaining = end_q - begin_q - offset
        exists = rows < remaining
        queries = load_rows(q + at * step_q + q_tile, dims, remaining, BLOCK_M, D, BLOCK_D, PARTIAL)
        douts = load_rows(do + at * step_do + do_tile, dims, remaining, BLOCK_M, D, BLOCK_D, PARTIAL)
        base = _base(lse, first_row + at, rows, exists, k.dtype == tl.float32)
        row_delta = tl.load(delta + (first_row + at) + rows, mask=exists, other=0.0)
        if LISTED:
            tile = tl.load(list + (i + 1) * direction, mask=i + 1 < last, other=0).to(tl.int32)
        else:
            tile = i + 1
        scores = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
        weights, slope = _weights(scores, base[None, :], scale, softcap, SOFTCAP, k.dtype == tl.float32)
        if PARTIAL:
            where = position_q + offset + rows
            time, m = other_rows(modality_q, time_q, at, rows, where, exists, RULE)
            low, high = window_bounds(where, left, right, LEFT, RIGHT)
            seen = visible(
                exists[None, :], word[:, None], m[None, :], time[None, :], t[:, None], low[None, :], high[None, :],
                position[:, None], RULE, LEFT, RIGHT,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        dropped = weights
        if DROPOUT:
            row = (offset + rows)[:, None]
            keep = dropout_keep(seed, head + row * 0, sample, row, first_key, limit, BLOCK_M, BLOCK_N)
            keep = tl.trans(keep.to(tl.int8)) != 0
            dropped = tl.where(keep, weights * keep_scale, 0.0)
        dv = tl.dot(dropped.to(douts.dtype), douts, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(douts), input_precision=PRECISION)
        if DROPOUT:
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - row_delta[None, :]) * slope
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["rows_q", "rows_k", "capacity", "parts", "left", "right", "limit"])
def _backward_dkdv(
    q, k, v, do, lse, delta, dk, dv, records, lists, counts, order, words, time_q, modality_q, time_k, seed,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    rows_q, rows_k, capacity, parts, scale, softcap, softmax_scale, left, right, limit, keep_scale,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, RULE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, key heads, parts); dk and dv `[parts, Tk, Hk, D]`."""
    tile, record, extent = tile_of(records, order)
    if extent == 0:
        return
    head_k = tl.program_id(1)
    part = tl.program_id(2)
    row = tl.arange(0, BLOCK_N)
    valid, first, sample, first_key, position, begin_q, end_q, position_q = read_record(record)
    exists = row < valid
    at = first + row
    position += row
    t, word = own_rows(words, time_k, first, row, position, exists, RULE)
    queries = tl.where(valid > 0, end_q - begin_q, 0)
    front, back, full_low, full_high, partial_low, partial_high = work_of(
        records, lists, counts, tile, queries, part, parts, capacity, BLOCK_M, SPLIT
    )  # fmt: skip

    dims = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (dims < D)[None, :]
    k_tile = k + head_k.to(tl.int64) * (stride_kh * 8) + at[:, None] * (stride_kt.to(tl.int64) * 8) + dims[None, :]
    v_tile = v + head_k.to(tl.int64) * (stride_vh * 8) + at[:, None] * (stride_vt.to(tl.int64) * 8) + dims[None, :]
    key = tl.load(k_tile, mask=inside, other=0.0)
    value = tl.load(v_tile, mask=inside, other=0.0)
    step_q, step_do = stride_qt.to(tl.int64) * 8, stride_dot.to(tl.int64) * 8
    rows = tl.arange(0, BLOCK_M)[:, None]
    q_tile = rows * (stride_qt * 8) + dims[None, :]
    do_tile = rows * (stride_dot * 8) + dims[None, :]
    dkey = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    LISTED: tl.constexpr = counts is not None
    for member in range(GROUP):
        head = head_k * GROUP + member
        head64 = head.to(tl.int64)
        q_head, do_head = q + head64 * (stride_qh * 8), do + head64 * (stride_doh * 8)
        first_row = head64 * rows_q
        dkey, dvalue = _loop_queries(
            dkey, dvalue, key, value, q_head, do_head, q_tile, do_tile, lse, delta, first_row, step_q, step_do, dims,
            front, 1, full_low, full_high, begin_q, end_q, position_q, head, sample, first_key, t, word, position,
            modality_q, time_q, seed, scale, softcap, left, right, limit, keep_scale, False, LISTED, RULE, LEFT, RIGHT,
            SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        dkey, dvalue = _loop_queries(
            dkey, dvalue, key, value, q_head, do_head, q_tile, do_tile, lse, delta, first_row, step_q, step_do, dims,
            back, -1, partial_low, partial_high, begin_q, end_q, position_q, head, sample, first_key, t, word, position,
            modality_q, time_q, seed, scale, softcap, left, right, limit, keep_scale, True, LISTED, RULE, LEFT, RIGHT,
            SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
    dkey = tl.where(exists[:, None], dkey * softmax_scale, 0.0)
    dvalue = tl.where(exists[:, None], dvalue, 0.0)
    to = ((part.to(tl.int64) * rows_k + at) * tl.num_programs(1) + head_k) * D
    owned = (row < extent)[:, None] & (dims < D)[None, :]
    tl.store(dk + to[:, None] + dims[None, :], dkey.to(dk.dtype.element_ty), mask=owned)
    tl.store(dv + to[:, None] + dims[None, :], dvalue.to(dv.dtype.element_ty), mask=owned)


@triton.jit(do_not_specialize=["rows"])
def _delta(
    out, do, delta, stride_ot, stride_oh, stride_dot, stride_doh, rows, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum(dout * out) of each row and head, float32 `[H, Tq]`. Grid (rows / BLOCK, H)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dims < D)[None, :]
    o_tile = out + head * (stride_oh * 8) + row[:, None] * (stride_ot.to(tl.int64) * 8) + dims[None, :]
    do_tile = do + head * (stride_doh * 8) + row[:, None] * (stride_dot.to(tl.int64) * 8) + dims[None, :]
    a = tl.load(o_tile, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(do_tile, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + head * rows + row, tl.sum(a * b, 1), mask=row < rows)


@triton.jit(do_not_specialize=["count", "parts"])
def _add(parts_of, total, count, parts, BLOCK: tl.constexpr):
    """The parts' sums, added in order. Grid (count / BLOCK)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for p in range(parts):
        acc += tl.load(parts_of + p * count.to(tl.int64) + at, mask=at < count, other=0.0)
    tl.store(total + at, acc.to(total.dtype.element_ty), mask=at < count)


def _added(parts: Tensor, totals: tuple[Tensor, ...]) -> None:
    for part, total in zip(parts, totals):
        if part is not total:
            grid = (triton.cdiv(total.numel(), 1024),)
            _add[grid](part, total, total.numel(), part.shape[0], BLOCK=1024, num_warps=4, **OPTIONS)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    queries: tuple, keys: tuple, rules: tuple[int, ...], left: int, right: int, scale: float, softcap: float,
    dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """Fills dq, dk and dv, contiguous and shaped as q, k and v; the rest as `attention.forward` took and gave it."""
    rows, heads, dim = q.shape
    rows_k, heads_k, _ = k.shape
    q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    queries, keys = Side(*queries, rows), Side(*keys, rows_k)
    mask = mask_of(tuple(rules), left, right)
    problem = Problem(
        q.dtype, dim, heads // heads_k, mask.rule, left >= 0, right >= 0, scale, softcap, dropout_p, architecture()
    )
    constants = problem.constants()
    negative = constants.pop("NEGATIVE")
    first, second = problem.scales(natural=q.dtype == torch.float32)
    options = (-first if negative else first, second, scale, left, right, *problem.dropout())
    delta = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    if rows:
        block = configs.rows_per_program(problem.block_d)
        _delta[(triton.cdiv(rows, block), heads)](
            out, dout, delta, *strides(out), *strides(dout), rows, D=dim, BLOCK_D=problem.block_d, BLOCK=block,
            num_warps=4, **OPTIONS,
        )  # fmt: skip

    def run(kernel, config, own, other, block_own, block_other, heads_own, gradients):
        programs = own.tiles(config.constants[block_own]) * heads_own
        tiles = other.rows // max(own.batch, 1) // config.constants[block_other]
        parts = configs.parts(programs, tiles, q.device)
        todo = plan(
            queries, keys, mask, config.constants["BLOCK_M"], config.constants["BLOCK_N"],
            "queries" if own is queries else "keys", configs.sorted_first(programs * parts, q.device),
        )  # fmt: skip
        partial = gradients
        if parts > 1:
            partial = tuple(torch.empty((parts, *x.shape), dtype=torch.float32, device=q.device) for x in gradients)
        row_counts = (rows,) if own is queries else (rows, rows_k)
        kernel[(todo.records.shape[0], heads_own, parts)](
            q, k, v, dout, lse, delta, *partial, todo.records, todo.lists, todo.counts, todo.order, todo.words,
            queries.time, other.modality, keys.time, seed, *strides(q), *strides(k), *strides(v), *strides(dout),
            *row_counts, todo.capacity, parts, *options, GROUP=problem.group, SPLIT=parts > 1, **constants,
            **config.options(),
        )  # fmt: skip
        _added(partial, gradients)

    if rows:
        config = configs.backward("dq", problem)
        configs.run(
            "dq", problem, config, queries, keys,
            lambda c: run(_backward_dq, c, queries, keys, "BLOCK_M", "BLOCK_N", heads, (dq,)),
        )  # fmt: skip
    if rows_k:
        config = configs.backward("dkdv", problem)
        configs.run(
            "dkdv", problem, config, queries, keys,
            lambda c: run(_backward_dkdv, c, keys, queries, "BLOCK_N", "BLOCK_M", heads_k, (dk, dv)),
        )  # fmt: skip
