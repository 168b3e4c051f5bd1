"""Attention weights, recomputed for chosen heads and samples: the fused kernels never store them.

weights[h, i, j] = softmax over the visible j of scale * <q_i, k_j>; a row that sees nothing is zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, rule_holds


@dataclasses.dataclass(frozen=True)
class AttentionMap:
    """The weights of one sample.

    Args:
        sample: its number in the batch.
        weights: float `[heads, Lq, Lk]`; rows sum to 1, or are zero where a query sees nothing.
        modality_q: uint8 `[Lq]`, modality of each row.
        modality_k: uint8 `[Lk]`, modality of each column.
        names_q, names_k: names of the modalities, by id.
    """

    sample: int
    weights: Tensor
    modality_q: Tensor
    modality_k: Tensor
    names_q: tuple[str, ...] = ()
    names_k: tuple[str, ...] = ()

    def between(self, query: str | int, key: str | int) -> Tensor:
        """The block of one modality's rows and another's columns, `[heads, lq, lk]`."""
        row = self.modality_q == _id(query, self.names_q)
        column = self.modality_k == _id(key, self.names_k)
        return self.weights[:, row][:, :, column]


def attention_map(
    queries_and_keys: tuple[Tensor, Tensor],
    layout_q: Layout,
    layout_k: Layout | None = None,
    mask: ModalityMask | None = None,
    *,
    samples: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> list[AttentionMap]:
    """The attention weights of chosen samples and heads.

    Args:
        queries_and_keys: q `[Tq, H, D]` and k `[Tk, Hk, D]`, as `mmfast.attention` takes them; the modules of
            `mmfast.nn` give them by `.queries_and_keys(...)`.
        layout_q, layout_k, mask, softmax_scale, softcap: as for `mmfast.attention`.
        samples, heads: which; default all. Memory grows with samples * heads * Lq * Lk.

    Returns:
        one `AttentionMap` per sample, in the order of `samples`. Differentiable.
    """
    layout_k = layout_q if layout_k is None else layout_k
    chosen = list(range(layout_q.batch) if samples is None else samples)
    for sample in chosen:
        if not 0 <= sample < layout_q.batch:
            raise IndexError(f"attention_map: sample {sample} is out of range; the batch has {layout_q.batch} samples")
    weights = attention_weights(
        *queries_and_keys,
        layout_q,
        layout_k,
        mask,
        samples=chosen,
        heads=heads,
        softmax_scale=softmax_scale,
        softcap=softcap,
    )
    q, k = queries_and_keys
    modality_q, modality_k = layout_q.modalities(q.shape[0]), layout_k.modalities(k.shape[0])
    first_q, first_k = layout_q.cu_seqlens.tolist(), layout_k.cu_seqlens.tolist()
    length_q, length_k = layout_q.lengths().tolist(), layout_k.lengths().tolist()
    return [
        AttentionMap(
            sample=b,
            weights=weights[i, :, : length_q[b], : length_k[b]],
            modality_q=modality_q[first_q[b] : first_q[b] + length_q[b]],
            modality_k=modality_k[first_k[b] : first_k[b] + length_k[b]],
            names_q=layout_q.names,
            names_k=layout_k.names,
        )
        for i, b in enumerate(chosen)
    ]


def attention_weights(
    q: Tensor,
    k: Tensor,
    layout_q: Layout,
    layout_k: Layout,
    mask: ModalityMask | None = None,
    *,
    samples: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """The same as one tensor `[samples, heads, max Lq, max Lk]`, zero beyond each sample's lengths."""
    chosen = torch.arange(layout_q.batch) if samples is None else torch.as_tensor(samples, dtype=torch.int64)
    chosen = chosen.to(layout_q.device)
    group = q.shape[1] // k.shape[1]
    head = torch.arange(q.shape[1]) if heads is None else torch.as_tensor(heads, dtype=torch.int64)
    head = head.to(q.device)
    rows_q, inside_q = _rows(layout_q, chosen)
    rows_k, inside_k = _rows(layout_k, chosen)
    # Rows that do not exist may hold anything, NaN too: they are replaced, not multiplied by zero.
    queries = q[rows_q][:, :, head].masked_fill(~inside_q[..., None, None], 0)
    keys = k[rows_k][:, :, head // group].masked_fill(~inside_k[..., None, None], 0)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    table = (ModalityMask.full() if mask is None else mask).table(layout_q.names, layout_k.names)
    seen = rule_holds(
        table,
        (-1, -1) if mask is None else mask.window,
        *(f(q.shape[0])[rows_q][:, :, None] for f in (layout_q.modalities, layout_q.times, layout_q.positions)),
        *(f(k.shape[0])[rows_k][:, None, :] for f in (layout_k.modalities, layout_k.times, layout_k.positions)),
    )
    seen = (seen & inside_q[:, :, None] & inside_k[:, None, :])[:, None]
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~seen, lowest), dim=-1).masked_fill(~seen, 0)


def _rows(layout: Layout, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Row of each (sample, place), int64 `[n, L]`, and whether it exists, bool `[n, L]`."""
    lengths = layout.lengths()[samples]
    longest = layout.max_seqlen
    if longest is None or layout.seqused is not None:
        longest = int(lengths.max()) if lengths.numel() else 0
    place = torch.arange(longest, device=layout.device)
    inside = place < lengths[:, None]
    return torch.where(inside, layout.cu_seqlens[samples][:, None] + place, 0).long(), inside


def _id(modality: str | int, names: tuple[str, ...]) -> int:
    if isinstance(modality, int):
        return modality
    if modality not in names:
        raise ValueError(f"AttentionMap: {modality!r} is no modality here; it has {', '.join(names) or 'no names'}")
    return names.index(modality)
