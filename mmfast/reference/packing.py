"""Packing in plain PyTorch: the oracle of mmfast.pack, unpack, to_padded and from_padded.

x[t] = norm(tokens[source[t]] + type_embedding[modality[t]] + sum over axes a of table[a][position[t, a]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_rows(
    tokens: Sequence[Tensor],
    source: Tensor,
    modality: Tensor,
    position: Tensor | None = None,
    type_embedding: Tensor | None = None,
    tables: Sequence[Sequence[Tensor]] | None = None,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """x `[T, D]` in the tokens' dtype.

    Args:
        tokens: P tensors `[Tm, D]`.
        source: int64 `[T]`, row in the concatenation of the parts.
        modality: uint8 `[T]`, part of each row.
        position: int32 `[T, A]`.
        type_embedding: `[P, D]`.
        tables: per part, position tables `[N_a, D]` of its first axes.
        norm: "none", "layer" (Ba, Kiros, Hinton 2016) or "rms" (Zhang, Sennrich 2019, arXiv 1910.07467).
        weight, bias: `[D]`.
    """
    x = torch.cat(list(tokens))[source]
    dtype = x.dtype
    if type_embedding is not None:
        x = x + type_embedding[modality.long()]
    for m, axes in enumerate(tables or ()):
        mine = modality == m
        for a, table in enumerate(axes):
            index = torch.where(mine, position[:, a].long(), 0)
            x = torch.where(mine[:, None], x + table[index], x)
    if norm == "layer":
        x = x - x.mean(1, keepdim=True)
    if norm != "none":
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight
    if bias is not None:
        x = x + bias
    return x.to(dtype)


def gather_rows(x: Tensor, index: Tensor, value: float = 0.0) -> Tensor:
    """out[i] = x[index[i]], or `value` where index[i] is negative."""
    if x.shape[0] == 0:
        return x.new_full((index.shape[0], *x.shape[1:]), value)
    inside = (index >= 0).view(-1, *[1] * (x.dim() - 1))
    return torch.where(inside, x[index.clamp(min=0)], torch.as_tensor(value, dtype=x.dtype, device=x.device))


def scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """out[index[i]] = x[i]; rows that no index names are zero, a negative index drops the row."""
    out = x.new_zeros(rows + 1, *x.shape[1:])
    return out.index_put((torch.where(index < 0, rows, index),), x)[:rows]
