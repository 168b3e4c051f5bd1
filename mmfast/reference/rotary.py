"""Rotary embedding in plain PyTorch: the oracle of mmfast.rotary.

Su et al., RoFormer (arXiv 2104.09864), equation 34; sections as in Qwen2-VL's M-RoPE (arXiv 2409.12191, section 2.1):

    angle[t, j] = position[t, axis(j)] * base^(-2 j / D),   j < D / 2
    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)

where (x1, x2) is (x[j], x[j + D/2]), or (x[2 j], x[2 j + 1]) if interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(
    x: Tensor,
    position: Tensor,
    inside: Tensor,
    base: float,
    sections: Sequence[int],
    interleaved: bool = False,
    norm: bool = False,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """y `[T, H, D]` in the dtype of x.

    Args:
        x: `[T, H, D]`.
        position: int32 `[T, A]`.
        inside: bool `[T]`: rows of the layout; the others are zero and never read.
        sections: A numbers of frequencies; their sum is D / 2.
        norm, weight, eps: RMS norm over D before the rotation; weight `[D]` or None.
    """
    dtype, half = x.dtype, x.shape[2] // 2
    x = torch.where(inside[:, None, None], x, 0)
    if norm:
        x = x * torch.rsqrt(x.square().mean(2, keepdim=True) + eps)
        x = x if weight is None else x * weight
    exponent = torch.arange(half, dtype=torch.float64, device=x.device) * (-2.0 / x.shape[2])
    axis = torch.repeat_interleave(
        torch.arange(len(sections), device=x.device), torch.tensor(sections, device=x.device), output_size=half
    )
    angle = position.double()[:, axis] * base**exponent
    high = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(high)[:, None], angle.sin().to(high)[:, None]
    if interleaved:
        a, b = x.unflatten(2, (half, 2)).unbind(3)
        y = torch.stack([a * cos - b * sin, b * cos + a * sin], 3).flatten(2)
    else:
        a, b = x[:, :, :half], x[:, :, half:]
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
    return torch.where(inside[:, None, None], y, 0).to(dtype)
