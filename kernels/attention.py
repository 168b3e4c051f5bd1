"""Attention over packed samples with a modality mask: FlashAttention-2's loop over the tiles that a plan lists.

out_i = sum_j drop_ij softmax_j(rule(softcap(scale * q_i k_j))) v_j (Vaswani et al. 2017, arXiv 1706.03762;
Dao 2023, arXiv 2307.08691). A program owns BLOCK_M rows of queries: of one head, or of all heads that read one key head
where queries are few. Full tiles are computed without bounds, partial ones with the rule. Where programs are few, each
shares its keys among several, whose results are combined in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import _attention_configs as configs
from mmfast.kernels._attention_backward import backward as backward
from mmfast.kernels._attention_plan import Side, mask_of, plan
from mmfast.kernels._attention_tiles import (
    LN2,
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
from mmfast.kernels._common import OPTIONS, Example, architecture


@triton.jit
def _loop(
    acc, total, peak, q, k, v, k_tile, v_tile, step_k, step_v, dims, list, direction, first, last, begin_k, end_k,
    position_k, head, sample, row_in_sample, word, time, low, high, modality_k, time_k, seed, scale, softcap, limit,
    PARTIAL: tl.constexpr, LISTED: tl.constexpr, RULE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Entries first..last of a list of key tiles, into the running output, sum and peak (scores count powers of 2)."""
    columns = tl.arange(0, BLOCK_N)
    tile = first
    if LISTED:
        tile = tl.load(list + first * direction, mask=first < last, other=0).to(tl.int32)
    for i in range(first, last):
        offset = tile * BLOCK_N
        at = (begin_k + offset).to(tl.int64)
        left = end_k - begin_k - offset
        keys = load_rows(k + at * step_k + k_tile, dims, left, BLOCK_N, D, BLOCK_D, PARTIAL)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        if LISTED:  # the next entry is on its way while this tile is computed
            tile = tl.load(list + (i + 1) * direction, mask=i + 1 < last, other=0).to(tl.int32)
        else:
            tile = i + 1
        if SOFTCAP:
            scores = tanh(scores * scale, q.dtype == tl.float32) * softcap
        elif PARTIAL:
            scores = scores * scale
        if PARTIAL:
            exists = columns < left
            position = position_k + offset + columns
            t, m = other_rows(modality_k, time_k, at, columns, position, exists, RULE)
            seen = visible(
                exists[None, :], word[:, None], m[None, :], time[:, None], t[None, :], low[:, None], high[:, None],
                position[None, :], RULE, LEFT, RIGHT,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weights = tl.exp2(scores - base[:, None])
        elif SOFTCAP:
            new_peak = tl.maximum(peak, tl.max(scores, 1))
            base = new_peak
            weights = tl.exp2(scores - base[:, None])
        else:  # scale is not negative, so that it can wait for the exponent's multiply-add
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
            base = new_peak
            weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        peak = new_peak
        if DROPOUT:
            keep = dropout_keep(seed, head[:, None], sample, row_in_sample[:, None], offset, limit, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        values = load_rows(v + at * step_v + v_tile, dims, left, BLOCK_N, D, BLOCK_D, PARTIAL)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, total, peak


@triton.jit(do_not_specialize=["rows_q", "capacity", "parts", "left", "right", "limit"])
def _forward(
    q, k, v, out, lse, records, lists, counts, order, words, time_q, modality_k, time_k, seed,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    rows_q, capacity, parts, scale, softcap, left, right, limit, keep_scale,
    GROUP: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr, NEGATIVE: tl.constexpr, RULE: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BLOCK_M // PACK queries, heads // PACK, parts); out `[parts, Tq, H, D]`, lse `[parts, H, Tq]`."""
    tile, record, extent = tile_of(records, order)
    if extent == 0:
        return
    part = tl.program_id(2)
    lines = tl.arange(0, BLOCK_M)
    row = lines // PACK
    head = tl.program_id(1) * PACK + lines % PACK
    head_k = (tl.program_id(1) * PACK // GROUP).to(tl.int64)
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
    step_q, step_k, step_v = stride_qt.to(tl.int64) * 8, stride_kt.to(tl.int64) * 8, stride_vt.to(tl.int64) * 8
    queries = at[:, None] * step_q + head.to(tl.int64)[:, None] * (stride_qh * 8) + dims[None, :]
    query = tl.load(q + queries, mask=exists[:, None] & (dims < D)[None, :], other=0.0)
    if NEGATIVE:
        query = -query
    k, v = k + head_k * (stride_kh * 8), v + head_k * (stride_vh * 8)
    columns = tl.arange(0, BLOCK_N)[:, None]
    k_tile = columns * (stride_kt * 8) + dims[None, :]
    v_tile = columns * (stride_vt * 8) + dims[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    LISTED: tl.constexpr = counts is not None
    acc, total, peak = _loop(
        acc, total, peak, query, k, v, k_tile, v_tile, step_k, step_v, dims, front, 1, full_low, full_high, begin_k,
        end_k, position_k, head, sample, row_in_sample, word, time, low, high, modality_k, time_k, seed, scale, softcap,
        limit, False, LISTED, RULE, LEFT, RIGHT, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, total, peak = _loop(
        acc, total, peak, query, k, v, k_tile, v_tile, step_k, step_v, dims, back, -1, partial_low, partial_high,
        begin_k, end_k, position_k, head, sample, row_in_sample, word, time, low, high, modality_k, time_k, seed, scale,
        softcap, limit, True, LISTED, RULE, LEFT, RIGHT, SOFTCAP, DROPOUT, D, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip

    # Rows that exist outside the layout, or see nothing: zeros.
    sees = exists & (total != 0)
    total = tl.where(sees, total, 1.0)
    acc = tl.where(sees[:, None], acc * (keep_scale / total)[:, None], 0.0)
    owned = row < extent
    at_out = part.to(tl.int64) * rows_q + at
    outs = at_out[:, None] * (stride_ot.to(tl.int64) * 8) + head.to(tl.int64)[:, None] * (stride_oh * 8) + dims[None, :]
    tl.store(out + outs, acc.to(out.dtype.element_ty), mask=owned[:, None] & (dims < D)[None, :])
    heads = tl.num_programs(1) * PACK
    log = tl.where(sees, (peak + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse + (part * heads + head).to(tl.int64) * rows_q + at, log, mask=owned)


@triton.jit(do_not_specialize=["rows", "parts"])
def _combine(
    parts_out, parts_lse, out, lse, rows, parts, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts' outputs, weighted by their share of the softmax's denominator, in order. Grid (rows / BLOCK, H)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    inside = row < rows
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for p in range(parts):
        log = tl.load(parts_lse + (p * H + head) * rows + row, mask=inside, other=float("-inf"))
        peak = tl.maximum(peak, log)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    dims = tl.arange(0, BLOCK_D)
    columns = inside[:, None] & (dims < D)[None, :]
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for p in range(parts):
        log = tl.load(parts_lse + (p * H + head) * rows + row, mask=inside, other=float("-inf"))
        weight = tl.exp2((log - base) * LOG2E)
        total += weight
        at = ((p * rows + row) * H + head) * D
        acc += weight[:, None] * tl.load(parts_out + at[:, None] + dims[None, :], mask=columns, other=0.0)
    sees = total != 0
    total = tl.where(sees, total, 1.0)
    acc = tl.where(sees[:, None], acc / total[:, None], 0.0)
    at = (row * H + head) * D
    tl.store(out + at[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=columns)
    tl.store(lse + head * rows + row, tl.where(sees, base + tl.log2(total) * LN2, peak), mask=inside)


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: tuple, keys: tuple, rules: tuple[int, ...],
    left: int, right: int, scale: float, softcap: float, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """Fills out `[Tq, H, D]` and lse `[H, Tq]`, both contiguous.

    Args:
        q, k, v: as `mmfast.attention`, of one dtype.
        queries, keys: cu_seqlens, seqused, modality, time, start of each side.
        rules, left, right: 16 numbers with 3 bits per key modality, and the window.
        scale, softcap, dropout_p, seed: as `mmfast.attention`.
    """
    rows, heads, dim = q.shape
    if rows == 0:
        return
    q, k, v = aligned(q), aligned(k), aligned(v)
    queries, keys = Side(*queries, rows), Side(*keys, k.shape[0])
    mask = mask_of(tuple(rules), left, right)
    problem = Problem(
        q.dtype, dim, heads // k.shape[1], mask.rule, left >= 0, right >= 0, scale, softcap, dropout_p, architecture()
    )
    pack, config = configs.forward(problem, queries)

    def run(config):
        block_q, block_k = config.constants["BLOCK_M"] // pack, config.constants["BLOCK_N"]
        programs = queries.tiles(block_q) * (heads // pack)
        parts = configs.parts(programs, keys.rows // max(queries.batch, 1) // block_k, q.device)
        todo = plan(queries, keys, mask, block_q, block_k, "queries", configs.sorted_first(programs * parts, q.device))
        outs, logs = out, lse
        if parts > 1:
            outs = torch.empty((parts, *out.shape), dtype=torch.float32, device=q.device)
            logs = torch.empty((parts, *lse.shape), dtype=torch.float32, device=q.device)
        _forward[(todo.records.shape[0], heads // pack, parts)](
            q, k, v, outs, logs, todo.records, todo.lists, todo.counts, todo.order, todo.words, queries.time,
            keys.modality, keys.time, seed, *strides(q), *strides(k), *strides(v), heads * dim // 8, dim // 8,
            rows, todo.capacity, parts, *problem.scales(), left, right, *problem.dropout(),
            GROUP=problem.group, PACK=pack, SPLIT=parts > 1, **problem.constants(),
            **config.options(),
        )  # fmt: skip
        if parts > 1:
            block = configs.rows_per_program(problem.block_d)
            _combine[(triton.cdiv(rows, block), heads)](
                outs, logs, out, lse, rows, parts, H=heads, D=dim, BLOCK_D=problem.block_d, BLOCK=block, num_warps=4,
                **OPTIONS,
            )  # fmt: skip

    configs.run("forward", problem, config, queries, keys, run, pack)


def examples() -> list[Example]:
    """The shape classes that configurations exist for, and each option once."""

    def example(
        label, rules, dim=128, dtype=torch.bfloat16, group=1, length=4096, window=-1, softcap=0.0, p=0.0, quick=False
    ):
        def run():
            heads, lengths = 16, torch.arange(5, dtype=torch.int32)
            q, out, dout = (torch.empty(4 * length, heads, dim, dtype=dtype) for _ in range(3))
            k, v = (torch.empty(4 * 4096, heads // group, dim, dtype=dtype) for _ in range(2))
            fields = [(None, None), (None, None)]
            if rules == mixed:
                fields = [(torch.empty(x.shape[0]).byte(), torch.empty(x.shape[0]).int()) for x in (q, k)]
            sides = [(lengths, None, *field, None) for field in fields]
            seed = torch.empty(1, dtype=torch.int64) if p else None
            rest = (*sides, rules, window, -1, dim**-0.5, softcap, p, seed)
            lse = torch.empty(heads, q.shape[0])
            forward(q, k, v, out, lse, *rest)
            if length > 64:
                backward(dout, q, k, v, out, lse, *(torch.empty_like(x) for x in (q, k, v)), *rest)

        matrix = ()
        if dtype != torch.float32 and length > 64:
            matrix = ("forward", "backward_dq", "backward_dkdv") if dim <= 128 else ("forward", "backward_dq")
        return Example(label, run, matrix, quick)

    full, causal, mixed = (
        (sum(rule << 3 * n for n, rule in enumerate(row)),) * 16 for row in ([1] * 16, [2] * 16, [1] + [2] * 15)
    )
    return [
        example("bf16 D128 causal", causal, quick=True),
        example("bf16 D64 causal", causal, 64),
        example("bf16 D256 causal", causal, 256),
        example("bf16 D128 full", full),
        example("bf16 D64 full", full, 64),
        example("bf16 D128 table, group of 4", mixed, group=4, quick=True),
        example("bf16 D64 table", mixed, 64),
        example("bf16 D80 table", mixed, 80),
        example("fp16 D128 causal window softcap", causal, dtype=torch.float16, window=512, softcap=30.0),
        example("bf16 D64 causal dropout", causal, 64, p=0.1),
        example("bf16 D64 full, 32 queries", full, 64, length=32),
        example("bf16 D128 full, 1 query, group of 8", full, group=8, length=1, quick=True),
        example("fp32 D64 causal", causal, 64, torch.float32),
        example("fp32 D128 table", mixed, 128, torch.float32),
    ]
