"""Contrastive losses over all pairs, in plain PyTorch, with the matrix of scores.

    z_ij = scale * <x_i, y_j> + bias
    InfoNCE: 1 / (2 N) * sum_i (lse_j z_ij - z_ii) + (lse_j z_ji - z_ii)        (CLIP: Radford et al. 2021, figure 3)
    sigmoid: -1 / N * sum_ij log sigmoid(l_ij z_ij), l_ii = 1, else -1          (SigLIP: Zhai et al. 2023, eq. 1)

Pairs (i, j != i) with equal ids count neither in a log-sum-exp nor in the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """z `[N, M]`, at least float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = scale.to(dtype) * (x @ y.T).to(dtype)
    return z if bias is None else z + bias.to(dtype)


def counted(n: int, m: int, ids_x: Tensor | None, ids_y: Tensor | None, offset: int, device) -> tuple[Tensor, Tensor]:
    """bool `[N, M]`: the positive pairs (i, i + offset), and all pairs that count."""
    positive = torch.arange(n, device=device)[:, None] + offset == torch.arange(m, device=device)
    if ids_x is None:
        return positive, torch.ones_like(positive)
    return positive, positive | (ids_x[:, None] != ids_y[None, :])


def infonce_statistics(
    x: Tensor, y: Tensor, scale: Tensor, ids_x: Tensor | None = None, ids_y: Tensor | None = None, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the rows `[N]`, of the columns `[M]`, and the scores of the positive pairs `[N]`."""
    z = scores(x, y, scale)
    positive, counts = counted(*z.shape, ids_x, ids_y, offset, z.device)
    masked = z.masked_fill(~counts, float("-inf"))
    # A column that no row of this block counts for: -inf, without a NaN in its gradient.
    column = torch.where(counts.any(0), masked.where(counts.any(0), 0).logsumexp(0), float("-inf"))
    return masked.logsumexp(1), column, (z * positive).sum(1)


def sigmoid_rows(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    ids_x: Tensor | None = None,
    ids_y: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """The sigmoid loss summed over each row, `[N]`."""
    z = scores(x, y, scale, bias)
    positive, counts = counted(*z.shape, ids_x, ids_y, offset, z.device)
    losses = -torch.nn.functional.logsigmoid(torch.where(positive, z, -z))
    return losses.masked_fill(~counts, 0).sum(1)
