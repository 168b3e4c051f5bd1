"""Philox4x32-10 in plain PyTorch: the same numbers as csrc/include/mmfast/rng.h.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(seed: Tensor, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int) -> tuple[Tensor, ...]:
    """Four 32-bit numbers per counter.

    Args:
        seed: int64, one element; its 64 bits are the key.
        c0, c1, c2, c3: the counter's 32-bit words, integers or int64 tensors that broadcast.

    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    seed = seed.reshape(()).to(torch.int64)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64, device=seed.device) & _MASK for c in (c0, c1, c2, c3))
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, without leaving 63 bits."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return (high >> 16) & _MASK, ((high << 16) | (low & 0xFFFF)) & _MASK


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1) on a grid of 2**-24."""
    return (bits >> 8).to(torch.float32) * 2.0**-24
