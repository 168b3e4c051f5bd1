"""Which tiles of keys a tile of queries visits: made on the device, of shapes that the host knows, for all heads.

A tile is BLOCK consecutive rows of one segment: the rows before the first sample, each sample, the rows after the last
one. Segment s begins at row `bound(s)` and owns the tiles from `bound(s) // BLOCK + s` on, so that its first tile needs
no prefix sum and at most T // BLOCK + B + 2 tiles exist. The kernels see every row of a tensor in exactly one tile.

What a rule says of two rows depends on the order of their times, so a rule is three bits: visible where the key is
earlier, at the same time, later. A word holds them for one modality of the own side and all of the other's: bits 0..15
earlier, 16..31 same, 32..47 later. The classification is that of csrc/include/mmfast/mask.h.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._common import OPTIONS

# Fields of a tile's record, int32 each. The other side is the keys of a query tile, the queries of a key tile.
FIELDS = tl.constexpr(13)
SAMPLE = tl.constexpr(0)
ROW = tl.constexpr(1)  # first row
VALID = tl.constexpr(2)  # rows that exist
EXTENT = tl.constexpr(3)  # rows that the tile owns, existing or not
MODALITIES = tl.constexpr(4)  # bit m: some row has modality m
TIME_MIN = tl.constexpr(5)
TIME_MAX = tl.constexpr(6)
POSITION = tl.constexpr(7)  # of the first row
OFFSET = tl.constexpr(8)  # of the first row in its sample
OTHER_BEGIN = tl.constexpr(9)  # rows of the same sample on the other side
OTHER_END = tl.constexpr(10)
OTHER_POSITION = tl.constexpr(11)
OTHER_TILE = tl.constexpr(12)

_ORDERS = {0: 0, 1: 7, 2: 3, 3: 1, 4: 2}  # rule -> earlier | same << 1 | later << 2
_MARK = 1 << 48  # set in every word: numbers that need 64 bits are passed as such, by the interpreter too
_CHUNK = 128
_SORTED_TILES = 8192  # more are not sorted: the sort is quadratic


class Side(NamedTuple):
    """A layout's fields, and the rows of its tokens."""

    cu_seqlens: Tensor
    seqused: Tensor | None
    modality: Tensor | None
    time: Tensor | None
    start: Tensor | None
    rows: int

    @property
    def batch(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def tiles(self, block: int) -> int:
        """Most tiles that there can be."""
        return self.rows // block + self.cu_seqlens.shape[0] + 1


class Mask(NamedTuple):
    """16 words by the modality of queries, 16 by that of keys; the rule that all pairs share, or 0; the window."""

    words_q: tuple[int, ...]
    words_k: tuple[int, ...]
    rule: int
    left: int
    right: int


@functools.lru_cache(maxsize=256)
def mask_of(rules: tuple[int, ...], left: int, right: int) -> Mask:
    """The mask from 16 numbers with 3 bits per key modality, as `ModalityMask.table` gives them."""
    table = [[(row >> (3 * n)) & 7 for n in range(16)] for row in rules]
    kinds = {rule for row in table for rule in row}
    return Mask(_words(table), _words(zip(*table)), kinds.pop() if len(kinds) == 1 else 0, left, right)


def _words(table: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(
        _MARK
        + sum(((_ORDERS[rule] >> order) & 1) << (16 * order + n) for n, rule in enumerate(row) for order in range(3))
        for row in table
    )


class Plan(NamedTuple):
    """Tiles of the own side and what they visit of the other side.

    Args:
        records: int32 `[tiles, FIELDS]`.
        lists: `[tiles, capacity]`, tiles of the other side counted from the sample's first: full ones from the front,
            partial ones from the back. None: all full but the last.
        counts: int32 `[tiles, 2]`, how many full and partial ones; None likewise.
        order: int32 `[tiles]`, tiles with most work first; None: as they are.
        words: int64 `[T]` of the own side, each row's word; None where one rule holds for all.
    """

    records: Tensor
    lists: Tensor | None
    counts: Tensor | None
    order: Tensor | None
    words: Tensor | None

    @property
    def capacity(self) -> int:
        return 0 if self.lists is None else self.lists.shape[1]


def plan(queries: Side, keys: Side, mask: Mask, block_q: int, block_k: int, own: str, sort: bool) -> Plan:
    """The plan of one kernel whose programs own the tiles of one side, "queries" or "keys", and visit the other's."""
    device = queries.cu_seqlens.device
    tiles_q, tiles_k = queries.tiles(block_q), keys.tiles(block_k)
    listed = mask.rule != 1 or mask.left >= 0 or mask.right >= 0
    records = torch.empty((tiles_q + tiles_k, FIELDS.value), dtype=torch.int32, device=device)
    by_queries = own == "queries"
    side, tiles, words = (queries, tiles_q, mask.words_q) if by_queries else (keys, tiles_k, mask.words_k)
    tile_words = torch.empty((tiles, 2), dtype=torch.int64, device=device) if listed else None
    row_words = torch.empty(side.rows, dtype=torch.int64, device=device) if mask.rule == 0 else None
    _summarize[(tiles_q + tiles_k,)](
        records, tile_words, row_words, *queries, *keys, queries.batch, tiles_q, *words, BLOCK_Q=block_q,
        BLOCK_K=block_k, TABLE=mask.rule == 0, OWN_QUERIES=by_queries, num_warps=4, **OPTIONS,
    )  # fmt: skip
    records_q, records_k = records[:tiles_q], records[tiles_q:]
    mine, other = (records_q, records_k) if by_queries else (records_k, records_q)
    capacity = other.shape[0]
    if not listed:
        return Plan(mine, None, None, None, row_words)
    lists = torch.empty((tiles, capacity), dtype=torch.int16 if capacity < 2**15 else torch.int32, device=device)
    counts = torch.empty((tiles, 2), dtype=torch.int32, device=device)
    _list[(tiles,)](
        mine, other, tile_words, lists, counts, capacity, mask.left, mask.right, OWN_QUERIES=by_queries,
        OTHER_BLOCK=block_k if by_queries else block_q, CHUNK=_CHUNK, num_warps=4, **OPTIONS,
    )  # fmt: skip
    order = None
    if sort and tiles <= _SORTED_TILES:
        order = torch.empty(tiles, dtype=torch.int32, device=device)
        _sort[(tiles,)](counts, order, tiles, CHUNK=1024, num_warps=4, **OPTIONS)
    return Plan(mine, lists, counts, order, row_words)


@triton.jit
def _bound(cu_seqlens, segment, batch, rows):
    """First row of a segment; never outside the tensor, whatever cu_seqlens holds."""
    row = tl.load(cu_seqlens + tl.minimum(tl.maximum(segment - 1, 0), batch))
    row = tl.minimum(tl.maximum(row, 0), rows)
    return tl.where(segment == 0, 0, tl.where(segment > batch + 1, rows, row))


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _and(a, b):
    return a & b


@triton.jit
def _summarize_tile(
    record, words, row_words, tile, cu, seqused, modality, time, start, rows, cu_o, seqused_o, start_o, rows_o, batch,
    w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
    BLOCK: tl.constexpr, OTHER_BLOCK: tl.constexpr, TABLE: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    low = 0 * batch  # the last segment whose first tile is not behind this one
    high = batch + 1
    while low < high:
        middle = (low + high + 1) // 2
        behind = _bound(cu, middle, batch, rows) // BLOCK + middle > tile
        low = tl.where(behind, low, middle)
        high = tl.where(behind, middle - 1, high)
    sample = low - 1
    inside = (sample >= 0) & (sample < batch)
    first = _bound(cu, low, batch, rows)
    end = _bound(cu, low + 1, batch, rows)
    row = first + (tile - first // BLOCK - low) * BLOCK
    extent = tl.minimum(tl.maximum(end - row, 0), BLOCK)
    begin_o = _bound(cu_o, low, batch, rows_o)
    end_o = tl.maximum(_bound(cu_o, low + 1, batch, rows_o), begin_o)
    tile_o = begin_o // OTHER_BLOCK + low
    if seqused is not None:
        end = tl.minimum(end, first + tl.load(seqused + sample, mask=inside, other=0))
    if seqused_o is not None:
        end_o = tl.minimum(end_o, begin_o + tl.maximum(tl.load(seqused_o + sample, mask=inside, other=0), 0))
    valid = tl.where(inside, tl.minimum(tl.maximum(end - row, 0), BLOCK), 0)
    position = row - first
    position_o = 0 * batch
    if start is not None:
        position += tl.load(start + sample, mask=inside, other=0)
    if start_o is not None:
        position_o += tl.load(start_o + sample, mask=inside, other=0)

    offsets = tl.arange(0, BLOCK)
    exists = offsets < valid
    at = row.to(tl.int64) + offsets
    if time is not None:
        t = tl.load(time + at, mask=exists, other=0)
        time_min = tl.min(tl.where(exists, t, 2147483647), 0)
        time_max = tl.max(tl.where(exists, t, -2147483648), 0)
    else:
        time_min = position
        time_max = position + valid - 1
    modalities = 1 + 0 * batch
    if TABLE:
        m = tl.zeros([BLOCK], tl.int32)
        if modality is not None:
            m = tl.load(modality + at, mask=exists, other=0).to(tl.int32)
        modalities = tl.reduce(tl.where(exists, 1 << m, 0), 0, _or)
        if OWN:
            word = tl.where(m == 1, w1, w0)
            word = tl.where(m == 2, w2, tl.where(m == 3, w3, word))
            word = tl.where(m == 4, w4, tl.where(m == 5, w5, word))
            word = tl.where(m == 6, w6, tl.where(m == 7, w7, word))
            word = tl.where(m == 8, w8, tl.where(m == 9, w9, word))
            word = tl.where(m == 10, w10, tl.where(m == 11, w11, word))
            word = tl.where(m == 12, w12, tl.where(m == 13, w13, word))
            word = tl.where(m == 14, w14, tl.where(m == 15, w15, word))
            tl.store(row_words + at, word, mask=exists)
            tl.store(words + 2 * tile, tl.reduce(tl.where(exists, word, 0), 0, _or))
            tl.store(words + 2 * tile + 1, tl.reduce(tl.where(exists, word, -1), 0, _and))
    elif OWN and words is not None:
        tl.store(words + 2 * tile, w0)
        tl.store(words + 2 * tile + 1, w0)

    tl.store(record + SAMPLE, sample)
    tl.store(record + ROW, row)
    tl.store(record + VALID, valid)
    tl.store(record + EXTENT, extent)
    tl.store(record + MODALITIES, modalities)
    tl.store(record + TIME_MIN, time_min)
    tl.store(record + TIME_MAX, time_max)
    tl.store(record + POSITION, position)
    tl.store(record + OFFSET, row - first)
    tl.store(record + OTHER_BEGIN, begin_o)
    tl.store(record + OTHER_END, end_o)
    tl.store(record + OTHER_POSITION, position_o)
    tl.store(record + OTHER_TILE, tile_o)


_UNSPECIALIZED = ["rows_q", "rows_k", "batch", "tiles_q", *(f"w{i}" for i in range(16))]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _summarize(
    records, words, row_words, cu_q, seqused_q, modality_q, time_q, start_q, rows_q, cu_k, seqused_k, modality_k,
    time_k, start_k, rows_k, batch, tiles_q,
    w0: tl.int64, w1: tl.int64, w2: tl.int64, w3: tl.int64, w4: tl.int64, w5: tl.int64, w6: tl.int64, w7: tl.int64,
    w8: tl.int64, w9: tl.int64, w10: tl.int64, w11: tl.int64, w12: tl.int64, w13: tl.int64, w14: tl.int64,
    w15: tl.int64, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TABLE: tl.constexpr,
    OWN_QUERIES: tl.constexpr,
):  # fmt: skip
    """One tile's record per program, the queries' tiles first."""
    tile = tl.program_id(0)
    record = records + tile.to(tl.int64) * FIELDS
    if tile < tiles_q:
        _summarize_tile(
            record, words, row_words, tile, cu_q, seqused_q, modality_q, time_q, start_q, rows_q, cu_k, seqused_k,
            start_k, rows_k, batch, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
            BLOCK_Q, BLOCK_K, TABLE, OWN_QUERIES,
        )  # fmt: skip
    else:
        _summarize_tile(
            record, words, row_words, tile - tiles_q, cu_k, seqused_k, modality_k, time_k, start_k, rows_k, cu_q,
            seqused_q, start_q, rows_q, batch, w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15,
            BLOCK_K, BLOCK_Q, TABLE, not OWN_QUERIES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["capacity", "left", "right"])
def _list(
    own, other, words, lists, counts, capacity, left, right,
    OWN_QUERIES: tl.constexpr, OTHER_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the tile of this program visits of the other side, CHUNK tiles at once."""
    tile = tl.program_id(0)
    record = own + tile.to(tl.int64) * FIELDS
    row_of_list = lists + tile.to(tl.int64) * capacity
    valid = tl.load(record + VALID)
    some = tl.load(words + 2 * tile)
    every = tl.load(words + 2 * tile + 1)
    time_min = tl.load(record + TIME_MIN)
    time_max = tl.load(record + TIME_MAX)
    position = tl.load(record + POSITION).to(tl.int64)
    rows = tl.load(record + OTHER_END) - tl.load(record + OTHER_BEGIN)
    tiles = tl.where(valid > 0, (rows + OTHER_BLOCK - 1) // OTHER_BLOCK, 0)
    first = tl.load(record + OTHER_TILE)
    unlimited = 1 << 40
    most = tl.where(left < 0, unlimited, left.to(tl.int64))  # of the query's position minus the key's
    least = tl.where(right < 0, -unlimited, -right.to(tl.int64))
    full = 0 * tiles
    partial = 0 * tiles
    for begin in range(0, tiles, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        exists = index < tiles
        they = other + (first + index).to(tl.int64) * FIELDS
        valid_o = tl.load(they + VALID, mask=exists, other=1)
        modalities_o = tl.load(they + MODALITIES, mask=exists, other=0)
        time_min_o = tl.load(they + TIME_MIN, mask=exists, other=0)
        time_max_o = tl.load(they + TIME_MAX, mask=exists, other=0)
        position_o = tl.load(they + POSITION, mask=exists, other=0).to(tl.int64)
        theirs = modalities_o.to(tl.int64)
        if OWN_QUERIES:
            earlier = time_min_o < time_max
            later = time_max_o > time_min
            nearest = position - (position_o + valid_o - 1)
            farthest = position + valid - 1 - position_o
        else:
            earlier = time_min < time_max_o
            later = time_max > time_min_o
            nearest = position_o - (position + valid - 1)
            farthest = position_o + valid_o - 1 - position
        same = (time_min_o <= time_max) & (time_min <= time_max_o)
        seen = (earlier & ((some & theirs) != 0)) | (same & (((some >> 16) & theirs) != 0))
        seen = seen | (later & (((some >> 32) & theirs) != 0))
        lacks = (earlier & ((~every & theirs) != 0)) | (same & ((~(every >> 16) & theirs) != 0))
        lacks = lacks | (later & ((~(every >> 32) & theirs) != 0))
        seen = seen & exists & (nearest <= most) & (farthest >= least)
        # The loop over full tiles reads without bounds.
        lacks = lacks | (farthest > most) | (nearest < least) | (valid_o < OTHER_BLOCK)
        whole = seen & (lacks == 0)
        mixed = seen & lacks
        # Counted from the list's two ends.
        place = full + tl.cumsum(whole.to(tl.int32), 0) - 1
        tl.store(row_of_list + place, index.to(lists.dtype.element_ty), mask=whole)
        place = capacity - partial - tl.cumsum(mixed.to(tl.int32), 0)
        tl.store(row_of_list + place, index.to(lists.dtype.element_ty), mask=mixed)
        full += tl.sum(whole.to(tl.int32), 0)
        partial += tl.sum(mixed.to(tl.int32), 0)
    tl.store(counts + 2 * tile, full)
    tl.store(counts + 2 * tile + 1, partial)


@triton.jit(do_not_specialize=["tiles"])
def _sort(counts, order, tiles, CHUNK: tl.constexpr):
    """A tile's place is the number of tiles with more work, or as much and a lower number."""
    tile = tl.program_id(0)
    work = tl.load(counts + 2 * tile) + tl.load(counts + 2 * tile + 1)
    place = 0 * tiles
    for begin in range(0, tiles, CHUNK):
        index = begin + tl.arange(0, CHUNK)
        exists = index < tiles
        other = tl.load(counts + 2 * index, mask=exists, other=-1)
        other += tl.load(counts + 2 * index + 1, mask=exists, other=0)
        place += tl.sum(((other > work) | ((other == work) & (index < tile))).to(tl.int32), 0)
    tl.store(order + place, tile)
