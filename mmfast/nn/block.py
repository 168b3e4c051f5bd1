"""The pre-norm transformer on packed tokens (early fusion, and every encoder of `mmfast.models`).

x = x + W_o attention(norm(x)); x = x + W_2 gelu(W_1 norm(x)). Source: Xiong et al. 2020, "On Layer Normalization in
the Transformer Architecture", figure 1b; grouped key heads: Ainslie et al. 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfast.layout import Layout
from mmfast.mask import ModalityMask
from mmfast.nn._dropout import attention_dropout
from mmfast.ops.attention import attention
from mmfast.ops.rotary import rotary

_NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


def make_norm(norm: str, dim: int) -> nn.Module:
    """LayerNorm or RMSNorm by name, with eps 1e-5."""
    if norm not in _NORMS:
        raise ValueError(f"norm is {norm!r}; expected 'layer' or 'rms'")
    return _NORMS[norm](dim, eps=1e-5)


class PackedTransformerBlock(nn.Module):
    """One pre-norm layer: attention under a modality mask, then a GELU MLP. No row is padded.

    Args:
        dim: width of a token.
        heads: query heads; `dim / heads` must be a multiple of 8, at most 256.
        kv_heads: key and value heads, a divisor of `heads`; default: as many.
        mlp_ratio: hidden width of the MLP in units of `dim`.
        norm: "layer" or "rms".
        rotary_base: base of rotary position embeddings on q and k over the layout's positions; None: no rotary.
        dropout: on attention weights and on both branches' outputs, while training.

    Shapes: x `[T, dim]` -> `[T, dim]`. Rows outside the layout come out as the residual stream left them.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        mlp_ratio: float = 4,
        norm: str = "layer",
        rotary_base: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % heads or heads % kv_heads:
            raise ValueError(
                f"PackedTransformerBlock: heads {heads} must divide dim {dim}, "
                f"and kv_heads {kv_heads} must divide heads"
            )
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, dim // heads
        self.rotary_base, self.dropout = rotary_base, dropout
        hidden = int(dim * mlp_ratio)
        self.norm1 = make_norm(norm, dim)
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = make_norm(norm, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for linear in (self.qkv, self.out, self.mlp[0], self.mlp[2]):
            nn.init.zeros_(linear.bias)

    def _qkv(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        # Views of the fused projection: the kernels take strides, so nothing is copied.
        heads = self.qkv(self.norm1(x)).unflatten(-1, (self.heads + 2 * self.kv_heads, self.head_dim))
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.rotary_base is not None:
            q, k = rotary(q, k, layout, base=self.rotary_base)
        return q, k, v

    def queries_and_keys(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """q `[T, heads, D]` and k `[T, kv_heads, D]` of the attention, for `mmfast.nn.attention_map`."""
        return self._qkv(x, layout)[:2]

    def forward(self, x: Tensor, layout: Layout, mask: ModalityMask | None = None) -> Tensor:
        """
        Args:
            x: tokens `[T, dim]`.
            layout: whose rows they are, with the time that the mask needs.
            mask: who sees whom; None: every row of the sample.
        """
        q, k, v = self._qkv(x, layout)
        dropout = attention_dropout(self.dropout, self.training, q.device)
        mixed = self.out(attention(q, k, v, layout, mask=mask, **dropout).flatten(1))
        x = x + nn.functional.dropout(mixed, self.dropout, self.training)
        return x + nn.functional.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, rotary_base={self.rotary_base}"


class PackedTransformer(nn.Module):
    """`depth` blocks and a final norm.

    Args:
        depth: number of blocks.
        dim, heads, options: as for `PackedTransformerBlock`.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self, depth: int, dim: int, heads: int, *, norm: str = "layer", checkpointing: bool = False, **options
    ):
        super().__init__()
        self.blocks = nn.ModuleList(PackedTransformerBlock(dim, heads, norm=norm, **options) for _ in range(depth))
        self.norm = make_norm(norm, dim)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, layout: Layout, mask: ModalityMask | None = None) -> Tensor:
        """x `[T, dim]` -> `[T, dim]`; layout and mask are shared by all blocks."""
        for block in self.blocks:
            x = self._run(block, x, layout, mask)
        return self.norm(x)

    def _run(self, block: PackedTransformerBlock, x: Tensor, layout: Layout, mask: ModalityMask | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, layout, mask, use_reentrant=False)
        return block(x, layout, mask)

    def queries_and_keys(
        self, x: Tensor, layout: Layout, mask: ModalityMask | None = None, *, layer: int = -1
    ) -> tuple[Tensor, Tensor]:
        """q and k of one layer's attention, for `mmfast.nn.attention_map`; runs the layers before it."""
        layer = range(len(self.blocks))[layer]
        for block in self.blocks[:layer]:
            x = block(x, layout, mask)
        return self.blocks[layer].queries_and_keys(x, layout)
