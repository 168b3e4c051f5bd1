"""`nn.MultiheadAttention` on fused kernels: the same constructor, weights and call, without a dense mask.

out = W_o concat_h softmax(q_h k_h^T / sqrt(D)) v_h + b_o, q = W_q query + b_q, k and v likewise.
Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mmfast.layout import Layout
from mmfast.mask import ModalityMask
from mmfast.nn._dropout import attention_dropout
from mmfast.nn.attention_map import attention_weights
from mmfast.ops.attention import attention


class CrossModalAttention(nn.MultiheadAttention):
    """A drop-in for `nn.MultiheadAttention`: state dicts load both ways; `forward_packed` takes packed tokens.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as for `nn.MultiheadAttention`;
            `embed_dim / num_heads` must be a multiple of 8, at most 256.
        add_bias_kv, add_zero_attn: must be False.

    Differs from it in three ways: a query that may see nothing gives zeros before the output projection, where it
    gives NaN; masked keys are never read, so that NaN there does not spread; weights are returned before dropout.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ):
        if add_bias_kv or add_zero_attn:
            raise ValueError(
                "CrossModalAttention: add_bias_kv and add_zero_attn are not supported; "
                "append the extra token to key and value instead"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Padded call, as of `nn.MultiheadAttention`.

        Args:
            query: `[L, N, E]`, with batch_first `[N, L, E]`, or `[L, E]` without a batch.
            key, value: the same with S instead of L, widths kdim and vdim.
            key_padding_mask: `[N, S]`, True (or -inf) where a key is padding. Padding on the right costs nothing;
                any other is moved to the right first.
            need_weights: also return the weights; recomputed in plain PyTorch, so pass False while training.
            attn_mask: None or the square causal mask; other masks are what `ModalityMask` and `forward_packed` are for.
            average_attn_weights: weights averaged over the heads.
            is_causal: query i sees keys up to i.

        Returns:
            output shaped like query, and weights `[N, L, S]` (`[N, heads, L, S]` where not averaged) or None.
        """
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "CrossModalAttention: query, key and value must all be [L, N, E] ([N, L, E] with batch_first) or all "
                f"[L, E], got {query.dim()}, {key.dim()} and {value.dim()} dimensions"
            )
        single = query.dim() == 2
        if single:
            query, key, value = _each(lambda x: x[None], query, key, value)
            key_padding_mask = key_padding_mask[None] if key_padding_mask is not None else None
        elif not self.batch_first:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        batch, length, _ = query.shape
        keys = key.shape[1]
        if key.shape[0] != batch or value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"CrossModalAttention: query has {batch} samples; key is {list(key.shape)} and value "
                f"{list(value.shape)} (batch first): samples must agree, and key and value have the same length"
            )
        mask = ModalityMask.causal() if is_causal or _is_causal(attn_mask, length, keys) else ModalityMask.full()
        layout_q = Layout.padded(batch, length).to(query.device)
        order = None
        if key_padding_mask is None:
            layout_k = Layout.padded(batch, keys).to(query.device)
        else:
            layout_k, order = _keys_to_the_left(_as_bool(key_padding_mask, batch, keys))
            if order is not None:
                same = value is key
                key = key.take_along_dim(order[..., None], 1)
                value = key if same else value.take_along_dim(order[..., None], 1)
        q, k, v = self._project(*_each(lambda x: x.flatten(0, 1), query, key, value))
        out = self._attend(q, k, v, layout_q, layout_k, mask).unflatten(0, (batch, length))
        weights = None
        if need_weights:
            weights = attention_weights(q, k, layout_q, layout_k, mask)
            weights = nn.functional.pad(weights, (0, keys - weights.shape[-1]))
            if order is not None:
                weights = torch.zeros_like(weights).scatter(-1, order[:, None, None].expand_as(weights), weights)
            weights = weights.mean(1) if average_attn_weights else weights
        if single:
            return out[0], weights[0] if weights is not None else None
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def forward_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout_q: Layout,
        layout_k: Layout | None = None,
        mask: ModalityMask | None = None,
    ) -> Tensor:
        """The same on packed tokens.

        Args:
            query: `[Tq, embed_dim]`.
            key, value: `[Tk, kdim]` and `[Tk, vdim]`.
            layout_q, layout_k: their layouts, with the same samples; layout_k defaults to layout_q.
            mask: who sees whom; None: every key of the sample.

        Returns:
            `[Tq, embed_dim]`.
        """
        q, k, v = self._project(query, key, value)
        return self._attend(q, k, v, layout_q, layout_q if layout_k is None else layout_k, mask)

    def queries_and_keys(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """q `[Tq, H, D]` and k `[Tk, H, D]` of packed tokens, for `mmfast.nn.attention_map`."""
        wq, wk, _ = self._weights()
        bq, bk, _ = self._biases()
        return self._heads(linear(query, wq, bq)), self._heads(linear(key, wk, bk))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._qkv_same_embed_dim:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _biases(self) -> tuple[Tensor | None, ...]:
        return (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[T, H, D]`; inputs that are the same tensor share one matrix product, whose parts are views."""
        if self._qkv_same_embed_dim and query is key and key is value:
            return (
                linear(query, self.in_proj_weight, self.in_proj_bias)
                .unflatten(-1, (3, self.num_heads, self.head_dim))
                .unbind(1)
            )
        wq, wk, wv = self._weights()
        bq, bk, bv = self._biases()
        q = self._heads(linear(query, wq, bq))
        if self._qkv_same_embed_dim and key is value:
            bias = None if self.in_proj_bias is None else self.in_proj_bias[self.embed_dim :]
            kv = linear(key, self.in_proj_weight[self.embed_dim :], bias)
            return q, *kv.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(1)
        return q, self._heads(linear(key, wk, bk)), self._heads(linear(value, wv, bv))

    def _attend(self, q, k, v, layout_q: Layout, layout_k: Layout, mask: ModalityMask | None) -> Tensor:
        dropout = attention_dropout(self.dropout, self.training, q.device)
        return self.out_proj(attention(q, k, v, layout_q, layout_k, mask, **dropout).flatten(1))


def _each(function, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The function of each; the same tensor stays the same tensor, which `_project` looks for."""
    new_query = function(query)
    new_key = new_query if key is query else function(key)
    return new_query, new_key, new_key if value is key else function(value)


def _as_bool(mask: Tensor, batch: int, keys: int) -> Tensor:
    if mask.shape != (batch, keys):
        raise ValueError(
            f"CrossModalAttention: key_padding_mask must be [N, S] = [{batch}, {keys}], got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or (mask.device.type == "cpu" and bool(((mask != 0) & (mask != -torch.inf)).any())):
        raise ValueError("CrossModalAttention: key_padding_mask must be bool, or float with 0 and -inf only")
    return mask == -torch.inf


def _keys_to_the_left(padding: Tensor) -> tuple[Layout, Tensor | None]:
    """The keys' layout and, where real keys stand behind padding, the order [N, S] that puts them in front."""
    batch, keys = padding.shape
    used = (keys - padding.sum(1)).to(torch.int32)
    # Looking at the mask costs nothing on the CPU; elsewhere, and in a graph, always ordering avoids a wait.
    look = padding.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and not bool((padding[:, :-1] & ~padding[:, 1:]).any()):
        return Layout.padded(batch, keys, used), None
    order = padding.to(torch.uint8).argsort(dim=1, stable=True)
    # The causal rule compares times: a moved key keeps its own.
    return Layout.padded(batch, keys, used, time=order.flatten().to(torch.int32)), order


def _is_causal(attn_mask: Tensor | None, length: int, keys: int) -> bool:
    """Whether a mask is the square causal one; any other mask is refused."""
    if attn_mask is None:
        return False
    if attn_mask.shape == (length, keys) and length == keys:
        blocked = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        future = torch.ones_like(blocked).triu(1)
        clean = attn_mask.dtype == torch.bool or not bool(attn_mask.masked_fill(future, 0).any())
        if clean and torch.equal(blocked, future):
            return True
    raise ValueError(
        f"CrossModalAttention: attn_mask {list(attn_mask.shape)} is not the square causal mask. Dense masks are not "
        "taken: say who sees whom with a ModalityMask (rules between modalities, times and windows) and call "
        "forward_packed, or pass is_causal=True"
    )
