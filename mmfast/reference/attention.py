"""Attention over packed samples in plain PyTorch: one sample after the other, differentiable twice, any float dtype.

out_i = sum_j drop_ij softmax_j(rule(softcap(scale * q_i k_j))) v_j, over the keys j of the same sample that i sees
(Vaswani et al. 2017; the softcap is Gemma 2's: `c * tanh(s / c)`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, Rule, unpack_table
from mmfast.reference.philox import philox, uniform


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: Layout,
    layout_k: Layout,
    mask: ModalityMask,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out as q, and lse float32 (float64 for float64 inputs) `[H, Tq]`; arguments as `mmfast.attention`."""
    heads = q.shape[1]
    group = heads // k.shape[1]
    # Zeros that depend on q, k and v, so that a batch without visible keys has zero gradients instead of none.
    out = torch.zeros_like(q, memory_format=torch.contiguous_format) + sum(x[:0].sum() for x in (q, k, v))
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((heads, q.shape[0]), -torch.inf, dtype=lse_dtype, device=q.device)
    for sample, rows_q, rows_k in _samples(layout_q, layout_k):
        values = v[rows_k].transpose(0, 1).repeat_interleave(group, 0)
        weights, lse_sample = _weights(
            q, k, layout_q, layout_k, mask, sample, rows_q, rows_k, range(heads), softmax_scale, softcap
        )
        if dropout_p > 0:
            keep = dropout_keep(dropout_seed, dropout_p, sample, range(heads), weights.shape[1], weights.shape[2])
            weights = torch.where(keep, weights / (1 - dropout_p), 0)
        out[rows_q] = (weights @ values).transpose(0, 1)
        lse[:, rows_q] = lse_sample.detach()
    return out, lse


def dropout_keep(
    seed: Tensor, p: float, sample: int, heads: Sequence[int], rows_q: int, rows_k: int, first_row: int = 0
) -> Tensor:
    """bool `[heads, rows_q, rows_k]`: the weights that dropout keeps, the same on every backend.

    Key j takes word `j % 64 // 16` of `Philox(seed; head, sample, row, j // 64 * 16 + j % 16)`: kernels use all four
    words of a counter, for keys whose distance is a vector's width.
    """
    head = torch.tensor(list(heads), device=seed.device)[:, None, None]
    row = torch.arange(first_row, first_row + rows_q, device=seed.device)[:, None]
    key = torch.arange(rows_k, device=seed.device)
    words = torch.stack(philox(seed, head, sample, row, key // 64 * 16 + key % 16), -1)
    word = (key % 64 // 16)[:, None].expand(*words.shape[:-1], 1)
    # float32 as in the kernels: the comparison must not depend on the precision of p.
    limit = torch.tensor(p, dtype=torch.float32, device=seed.device)
    return uniform(words.gather(-1, word)[..., 0]) >= limit


def _rows(layout: Layout, sample: int) -> slice:
    begin, end = layout.cu_seqlens[sample : sample + 2].tolist()
    return slice(begin, end if layout.seqused is None else begin + int(layout.seqused[sample]))


def _samples(layout_q: Layout, layout_k: Layout):
    """The samples with queries and keys: number and rows."""
    begins_q, begins_k = layout_q.cu_seqlens.tolist(), layout_k.cu_seqlens.tolist()
    lengths_q, lengths_k = layout_q.lengths().tolist(), layout_k.lengths().tolist()
    for sample, (nq, nk) in enumerate(zip(lengths_q, lengths_k)):
        if nq and nk:
            begin_q, begin_k = begins_q[sample], begins_k[sample]
            yield sample, slice(begin_q, begin_q + nq), slice(begin_k, begin_k + nk)


def _visible(layout_q: Layout, layout_k: Layout, mask: ModalityMask, sample: int, rows_q: slice, rows_k: slice):
    """bool `[Lq, Lk]` of one sample."""

    def side(layout: Layout, rows: slice):
        start = 0 if layout.start is None else int(layout.start[sample])
        position = torch.arange(start, start + rows.stop - rows.start, device=layout.device)
        time = position if layout.time is None else layout.time[rows].long()
        modality = torch.zeros_like(position) if layout.modality is None else layout.modality[rows].long()
        return position, time, modality

    (position_q, time_q, modality_q), (position_k, time_k, modality_k) = side(layout_q, rows_q), side(layout_k, rows_k)
    rules = torch.tensor(unpack_table(mask.table(layout_q.names, layout_k.names)), device=layout_q.device)
    rule = rules[modality_q[:, None], modality_k]
    time_q, distance = time_q[:, None], position_q[:, None] - position_k
    seen = (rule == Rule.FULL) | ((rule == Rule.CAUSAL) & (time_k <= time_q))
    seen |= ((rule == Rule.PAST) & (time_k < time_q)) | ((rule == Rule.SAME) & (time_k == time_q))
    left, right = mask.window
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    return seen


def _weights(q, k, layout_q, layout_k, mask, sample, rows_q, rows_k, heads, softmax_scale, softcap):
    """Softmax weights `[heads, Lq, Lk]` and lse `[heads, Lq]` of one sample, before dropout."""
    heads = list(heads)
    group = q.shape[1] // k.shape[1]
    queries = q[rows_q][:, heads].transpose(0, 1)
    keys = k[rows_k][:, [h // group for h in heads]].transpose(0, 1)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    scores = queries @ keys.transpose(1, 2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seen = _visible(layout_q, layout_k, mask, sample, rows_q, rows_k)
    # A row that sees nothing takes the softmax of zeros and is then zeroed, so that no NaN reaches a gradient.
    some = seen.any(1, keepdim=True)
    weights = torch.where(some, torch.softmax(torch.where(some, scores.masked_fill(~seen, -torch.inf), 0), -1), 0)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return weights, torch.logsumexp(scores.detach().to(lse_dtype).masked_fill(~seen, -torch.inf), -1)
