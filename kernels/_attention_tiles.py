"""What the forward and the backward kernels of attention share: loads of tiles, visibility, softcap, dropout."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._attention_plan import (
    EXTENT,
    FIELDS,
    OFFSET,
    OTHER_BEGIN,
    OTHER_END,
    OTHER_POSITION,
    POSITION,
    ROW,
    SAMPLE,
    VALID,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Rules that a whole mask can consist of; 0: the rows' words say it, see _attention_plan.py.
FULL = tl.constexpr(1)
CAUSAL = tl.constexpr(2)
PAST = tl.constexpr(3)
SAME = tl.constexpr(4)


class Problem(NamedTuple):
    """What chooses a configuration and is compiled in."""

    dtype: torch.dtype
    dim: int
    group: int  # query heads that read one key head
    rule: int
    left: bool
    right: bool
    scale: float
    softcap: float
    dropout_p: float
    architecture: str

    @property
    def block_d(self) -> int:
        return max(16, triton.next_power_of_2(self.dim))

    def scales(self, natural: bool = False) -> tuple[float, float]:
        """Factor of q k, and of its tanh where there is one, for exponents of 2, or of e. The sign is in NEGATIVE."""
        unit = 1.0 if natural else LOG2E.value
        if self.softcap > 0:
            return abs(self.scale) / self.softcap, self.softcap * unit
        return abs(self.scale) * unit, 0.0

    def dropout(self) -> tuple[int, float]:
        """Least 24-bit number that keeps a weight, and the factor of the kept ones."""
        p = torch.tensor(self.dropout_p, dtype=torch.float32).item()  # as the other backends compare it
        return math.ceil(p * 2**24), 1 / (1 - self.dropout_p)

    def constants(self) -> dict[str, object]:
        return {
            "NEGATIVE": self.scale < 0,
            "RULE": self.rule,
            "LEFT": self.left,
            "RIGHT": self.right,
            "SOFTCAP": self.softcap > 0,
            "DROPOUT": self.dropout_p > 0,
            "D": self.dim,
            "BLOCK_D": self.block_d,
            # Float32: three tensor-core products where there are such, exact ones elsewhere; never plain TF32.
            "PRECISION": "tf32x3" if self.dtype == torch.float32 and self.architecture.startswith("sm_") else "ieee",
        }


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where rows cannot be read 8 elements at a time, or lie so far apart that the offsets within a tile
    of 256 do not fit into 32 bits."""
    fits = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits and x.stride(0) < 2**23 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int]:
    """Of rows and heads, in units of 8 elements: the kernels multiply, so that the compiler knows the alignment."""
    return x.stride(0) // 8, x.stride(1) // 8


@triton.jit
def load_rows(pointers, dims, left, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr):
    """A tile `[ROWS, BLOCK_D]`; rows from `left` on, if BOUND, and columns from D on are zero and not read."""
    if BOUND:
        inside = tl.arange(0, ROWS)[:, None] < left
        if BLOCK_D != D:
            inside = inside & (dims < D)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif BLOCK_D != D:
        tile = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def window_bounds(position, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """First and last key position that a query at `position` sees, within 32 bits."""
    low = position
    high = position
    if LEFT:
        low = tl.maximum(position.to(tl.int64) - left, -2147483648).to(tl.int32)
    if RIGHT:
        high = tl.minimum(position.to(tl.int64) + right, 2147483647).to(tl.int32)
    return low, high


@triton.jit
def visible(
    seen, word, modality, time_q, time_k, low, high, position_k,
    RULE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """`seen`, and the rule, and the window. `word` is of one side's rows, `modality` of the other's; all broadcast."""
    if RULE == 0:
        half = tl.where(time_k > time_q, (word >> 32).to(tl.int32), word.to(tl.int32))
        seen = seen & (((half >> (modality + tl.where(time_k == time_q, 16, 0))) & 1) != 0)
    elif RULE == CAUSAL:
        seen = seen & (time_k <= time_q)
    elif RULE == PAST:
        seen = seen & (time_k < time_q)
    elif RULE == SAME:
        seen = seen & (time_k == time_q)
    if LEFT:
        seen = seen & (position_k >= low)
    if RIGHT:
        seen = seen & (position_k <= high)
    return seen


@triton.jit
def own_rows(words, time, first, lines, position, exists, RULE: tl.constexpr):
    """Time and word of some rows of the side that programs own."""
    word = position
    if RULE == 0:
        word = tl.load(words + first + lines, mask=exists, other=0)
    t = position
    if RULE != FULL and time is not None:
        t = tl.load(time + first + lines, mask=exists, other=0)
    return t, word


@triton.jit
def other_rows(modality, time, first, lines, position, exists, RULE: tl.constexpr):
    """Time and modality of some rows of the other side."""
    m = position * 0
    if RULE == 0 and modality is not None:
        m = tl.load(modality + first + lines, mask=exists, other=0).to(tl.int32)
    t = position
    if RULE != FULL and time is not None:
        t = tl.load(time + first + lines, mask=exists, other=0)
    return t, m


@triton.jit
def tile_of(records, order):
    """The tile of this program, its record, and how many rows it owns."""
    tile = tl.program_id(0)
    if order is not None:
        tile = tl.load(order + tile)
    record = records + tile.to(tl.int64) * FIELDS
    return tile, record, tl.load(record + EXTENT)


@triton.jit
def read_record(record):
    """Rows that exist, first row, its sample, its place in the sample, its position; the other side's rows of the same
    sample, and the position of their first."""
    return (
        tl.load(record + VALID), tl.load(record + ROW).to(tl.int64), tl.load(record + SAMPLE), tl.load(record + OFFSET),
        tl.load(record + POSITION), tl.load(record + OTHER_BEGIN), tl.load(record + OTHER_END),
        tl.load(record + OTHER_POSITION),
    )  # fmt: skip


@triton.jit
def work_of(
    records, lists, counts, tile, rows, part, parts, capacity, BLOCK: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """The tiles of the other side that a program visits: the list of full ones, the list of partial ones, which runs
    backwards, and their first and last entries. Where nothing is listed, tiles count, and all are full but the last."""
    if counts is None:
        full = rows // BLOCK
        partial = tl.where(rows % BLOCK > 0, 1, 0)
    else:
        full = tl.load(counts + 2 * tile)
        partial = tl.load(counts + 2 * tile + 1)
    low = 0 * full
    high = full + partial
    if SPLIT:
        share = (high + parts - 1) // parts
        low = tl.minimum(part * share, high)
        high = tl.minimum(low + share, high)
    partial_low = tl.maximum(low - full, 0)
    partial_high = tl.maximum(high - full, 0)
    if counts is None:
        front = records
        back = records
        partial_low += full
        partial_high += full
    else:
        front = lists + tile.to(tl.int64) * capacity
        back = front + capacity - 1
    return front, back, tl.minimum(low, full), tl.minimum(high, full), partial_low, partial_high


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """1 - 2 / (e^2x + 1); EXACT: by its series where that formula cancels."""
    y = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    if EXACT:
        z = x * x
        series = 62.0 / 2835 - z * (1382.0 / 155925)
        series = x - x * z * (1.0 / 3 - z * (2.0 / 15 - z * (17.0 / 315 - z * series)))
        y = tl.where(tl.abs(x) < 0.3, series, y)
    return y


@triton.jit
def dropout_keep(seed, head, sample, row, key, limit, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """bool `[ROWS, KEYS]`: the weights that dropout keeps.

    Key j takes word j % 64 // 16 of Philox(seed; head, sample, row, j // 64 * 16 + j % 16), as in
    mmfast/reference/attention.py. `head` and `row` are `[ROWS, 1]`; `key`, the first one, and KEYS are multiples of 64.
    """
    tl.static_assert(KEYS % 64 == 0, "dropout needs tiles of 64 keys")
    zero = tl.zeros([ROWS, KEYS // 4], tl.int32)
    counter = key // 4 + tl.arange(0, KEYS // 4)[None, :]
    a, b, c, d = tl.philox(tl.load(seed), head + zero, sample + zero, row + zero, counter + zero)
    a, b = ((a >> 8) >= limit).to(tl.int8), ((b >> 8) >= limit).to(tl.int8)
    c, d = ((c >> 8) >= limit).to(tl.int8), ((d >> 8) >= limit).to(tl.int8)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, KEYS // 64, 16, 4])
    return tl.reshape(tl.permute(words, (0, 1, 3, 2)), [ROWS, KEYS]) != 0
