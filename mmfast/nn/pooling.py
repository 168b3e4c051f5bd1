"""Pooling of packed tokens: one vector per sample.

out[b] = sum of x[t] over the rows t of sample b / their number; an empty sample gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.layout import Layout


def segment_mean(x: Tensor, layout: Layout) -> Tensor:
    """Mean over the tokens of each sample.

    Args:
        x: tokens `[T, D]`, any float dtype.
        layout: whose rows they are; rows outside it are never read.

    Returns:
        `[B, D]` in x's dtype, summed in float32 at least; zeros for an empty sample. Equal from run to run: rows are
        added in order, without atomics. Differentiable, also twice.

    Raises:
        ValueError: x is no `[T, D]`.
    """
    if x.dim() != 2:
        raise ValueError(f"segment_mean: x must be [T, D], got {list(x.shape)}; flatten the leading dimensions")
    sample = layout.samples(x.shape[0])
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if x.device.type == "cpu":
        # Rows outside the layout fall into a last bucket, which is dropped.
        total = wide.new_zeros(layout.batch + 1, x.shape[1]).index_add(0, sample, wide)[: layout.batch]
    else:
        # index_add is atomic there. What segment_reduce sums must be one run of rows per sample.
        wide = torch.where((sample < layout.batch)[:, None], wide, 0)
        offsets = layout.cu_seqlens.to(torch.int64)
        total = torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)
    counts = layout.lengths().clamp(min=1).to(wide.dtype)
    return (total / counts[:, None]).to(x.dtype)
