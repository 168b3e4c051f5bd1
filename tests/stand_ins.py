"""Stand-ins for other libraries' attention, in plain PyTorch: signatures and behaviour as their documentation says.

Like the real ones they leave rows outside the samples as memory was: NaN here.
"""

from __future__ import annotations

import types

import torch


def sample_attention(q, k, v, seen, scale, softcap=0.0):
    """out and lse of one sample, computed in float32; a row that sees nothing gives zeros and +inf."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    some = seen.any(1)[:, None]
    scores = torch.where(some, scores.masked_fill(~seen, -torch.inf), 0)
    out = torch.where(some, scores.softmax(-1) @ v, 0).transpose(0, 1)
    return out, torch.where(some[:, 0], scores.logsumexp(-1), torch.inf).detach()


def from_bottom_right(n, m, left, right):
    """bool `[n, m]`: row i sees the keys from i + m - n - left to i + m - n + right; None: unlimited."""
    distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
    seen = torch.ones(n, m, dtype=torch.bool)
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= -distance <= right
    return seen


def _flash(q, k, v, ends_q, ends_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap):
    ends_q, ends_k = ends_q.tolist(), ends_k.tolist()
    out, lse = torch.full(q.shape, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    out = out + sum(x[:0].sum() for x in (q, k, v))  # differentiable without a sample, too
    for x, ends in ((q, ends_q), (k, ends_k), (v, ends_k)):
        if x.requires_grad:
            unwritten = torch.ones(x.shape[0], 1, 1, dtype=torch.bool)
            unwritten[ends[0] : ends[-1]] = False
            x.register_hook(lambda grad, unwritten=unwritten: grad.masked_fill(unwritten, torch.nan))
    for i, j, a, b in zip(ends_q, ends_q[1:], ends_k, ends_k[1:]):
        assert j - i <= max_seqlen_q and b - a <= max_seqlen_k, "max_seqlen is no bound"
        if j > i:
            seen = from_bottom_right(j - i, b - a, left, right)
            out[i:j], lse[:, i:j] = sample_attention(q[i:j], k[a:b], v[a:b], seen, scale, softcap)
    return out.to(q.dtype), lse


def flash_attn_2(version="2.8.3"):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert deterministic and dropout_p == 0 and max_seqlen_q > 1  # with 1 it takes row b for sample b
        left, right = (None if side < 0 or side >= max_seqlen_k else side for side in window_size)
        right = 0 if causal else right
        if left is not None and right is None:
            right = max_seqlen_k
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _flash(q, k, v, *lengths, softmax_scale or q.shape[-1] ** -0.5, left, right, softcap)
        return (out, lse, None) if return_attn_probs else out

    return types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __version__=version)


def flash_attn_4():
    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
    ):
        assert deterministic and q.shape[-1] <= 128
        left, right = window_size
        right = 0 if causal else right
        if left is not None and right is not None and left + right < 0:
            left = right = None
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _flash(q, k, v, *lengths, softmax_scale or q.shape[-1] ** -0.5, left, right, softcap)
        return out, lse if return_lse or q.requires_grad else None

    return types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


class BlockDiagonalMask:
    """xformers' masks of lengths: the base class sees everything of its block."""

    def __init__(self, lengths_q, lengths_k, device, left=None, right=None):
        self.lengths_q, self.lengths_k, self.device, self.left, self.right = lengths_q, lengths_k, device, left, right
        for n, m in zip(lengths_q, lengths_k):
            if right == 0 and m < n:
                raise ValueError("Expected num_keys >= num_queries")

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert isinstance(q_seqlen, list) and (kv_seqlen is None or isinstance(kv_seqlen, list))
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen, device)

    def make_causal_from_bottomright(self):
        return BlockDiagonalMask(self.lengths_q, self.lengths_k, self.device, None, 0)

    def make_local_attention_from_bottomright(self, window_size):
        if window_size <= 0:
            raise ValueError("Expected window_size > 0")
        return BlockDiagonalMask(self.lengths_q, self.lengths_k, self.device, window_size - 1, 0)

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        assert shape == (sum(self.lengths_q), sum(self.lengths_k))
        blocks = [from_bottom_right(n, m, self.left, self.right) for n, m in zip(self.lengths_q, self.lengths_k)]
        return torch.zeros(shape, dtype=dtype).masked_fill(~torch.block_diag(*blocks).bool(), -torch.inf)


def fmha():
    """xformers.ops.fmha"""

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.dim() == key.dim() in (4, 5) and query.shape[0] == 1 and p == 0
        assert query.shape[2:] == key.shape[2:] == value.shape[2:] and key.shape == value.shape
        assert query.dim() == 4 or not query.requires_grad, "no backward pass of grouped heads"
        assert all(x.stride(-1) == 1 for x in (query, key, value)) and attn_bias.device == query.device
        seen = attn_bias.materialize((query.shape[1], key.shape[1])) == 0
        assert seen.any(1).all(), "softmax over nothing is not defined"
        q, k, v = (x[0].flatten(1, -2) for x in (query, key, value))
        out, _ = sample_attention(q, k, v, seen, scale)
        return out.to(query.dtype).view(query.shape)

    return types.SimpleNamespace(
        BlockDiagonalMask=BlockDiagonalMask, memory_efficient_attention=memory_efficient_attention
    )
