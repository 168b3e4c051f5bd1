"""Which sample a packed row belongs to, found inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sample_of(row, exists, cu_seqlens, seqused, batch, steps):
    """Sample and place in it of rows, by binary search, and whether the layout holds them.

    Args:
        row: int64 `[R]`.
        exists: bool `[R]`, rows that may be looked up.
        cu_seqlens, seqused: int32 `[batch + 1]`, `[batch]` or None.
        steps: at least the number of binary digits of `batch`.
    """
    low = tl.zeros_like(row)
    high = low + batch
    for _ in range(steps):
        middle = (low + high) // 2
        open = low < high
        ended = tl.load(cu_seqlens + middle + 1, mask=open, other=0) <= row
        low = tl.where(open & ended, middle + 1, low)
        high = tl.where(open & (ended == 0), middle, high)
    inside = exists & (low < batch)
    place = row - tl.load(cu_seqlens + low, mask=inside, other=0)
    inside = inside & (place >= 0)
    if seqused is not None:
        inside = inside & (place < tl.load(seqused + low, mask=inside, other=0))
    return low, place, inside
