"""What the CUDA kernels of attention need from Python: memory, and among how many blocks a tile's work is divided."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import _native
from mmfast.ops import _dispatch

TILE = 64  # rows; csrc/include/mmfast/attention_schedule.h
_MOST_PARTS = 32
_DTYPES = (torch.bfloat16, torch.float16)


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None."""
    reason = _dispatch.cuda_refusal(q, k, v, dtypes=_DTYPES)
    if reason is None and q.shape[2] not in (dims := _native.cuda().attention_dims):
        reason = f"D is {q.shape[2]}, and there are CUDA kernels for {' and '.join(map(str, dims))} only"
    return reason


def parts(rows: int, heads: int, other_rows: int, batch: int, device: torch.device) -> int:
    """Among how many blocks the other side of each tile is divided, by shapes only.

    Few enough that the blocks run at the same time, two to a multiprocessor, and that each has two tiles on average.

    Args:
        rows: of the side whose tiles the blocks own, over all samples.
        heads: that have tiles of their own.
        other_rows: of the other side, over all samples.
    """
    blocks = max(-(-rows // TILE), min(rows, batch)) * heads
    tiles = -(-other_rows // (TILE * max(batch, 1)))
    return max(1, min(2 * _multiprocessors(device) // max(blocks, 1), tiles // 2, _MOST_PARTS))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def aligned(x: Tensor) -> Tensor:
    """`x`, or a copy where its rows cannot be read 16 bytes at a time."""
    fits = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


def _summaries(q: Tensor, k: Tensor, batch: int) -> Tensor:
    tiles = _native.cuda().attention_tiles
    size = tiles(q.shape[0], batch, q.shape[1] // k.shape[1]) + tiles(k.shape[0], batch, 1)
    return torch.empty((size, 5), dtype=torch.int32, device=q.device)


def _key_parts(q: Tensor, k: Tensor, batch: int) -> int:
    return parts(q.shape[0] * (q.shape[1] // k.shape[1]), k.shape[1], k.shape[0], batch, q.device)


def _part_rows(count: int, x: Tensor) -> Tensor | None:
    return x.new_empty((count, *x.shape), dtype=torch.float32) if count > 1 else None


def forward(q, k, v, out, lse, layout_q, layout_k, *options) -> None:
    """Writes out and lse. `layout_q`, `layout_k`: cu_seqlens, seqused, modality, time, start."""
    batch = layout_q[0].shape[0] - 1
    count = _key_parts(q, k, batch)
    _native.cuda().attention_forward(
        aligned(q), aligned(k), aligned(v), out, lse, layout_q, layout_k, *options, count, _summaries(q, k, batch),
        _part_rows(count, out), _part_rows(count, lse), _native.stream_of(q),
    )  # fmt: skip


def backward(dout, q, k, v, out, lse, dq, dk, dv, layout_q, layout_k, *options) -> None:
    """Writes dq, dk and dv."""
    batch = layout_q[0].shape[0] - 1
    by_keys = _key_parts(q, k, batch)
    by_queries = parts(k.shape[0], k.shape[1], q.shape[0] * (q.shape[1] // k.shape[1]), batch, q.device)
    _native.cuda().attention_backward(
        aligned(dout), aligned(q), aligned(k), aligned(v), out, lse, dq, dk, dv, layout_q, layout_k, *options,
        by_keys, by_queries, _summaries(q, k, batch), torch.empty_like(lse),
        _part_rows(by_keys, dq), _part_rows(by_queries, dk), _part_rows(by_queries, dv), _native.stream_of(q),
    )  # fmt: skip
