"""Fusion of one vector per modality into one vector per sample; modalities may be missing.

Every module takes a mapping modality name -> features `[B, D_m]`. A modality is missing where its key is absent, its
value is None, or `present[name]` is False for a sample: its features are then never read, and its parameters get zero
gradients, never None, so that all ranks of a distributed run take part in every reduction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.layout import Layout
from mmfast.nn._dropout import attention_dropout
from mmfast.ops.attention import attention


class _Fusion(nn.Module):
    """What all fusions share: names and widths, and features with zeros where a modality is missing."""

    def __init__(self, dims: Mapping[str, int], out_dim: int):
        super().__init__()
        if not dims:
            raise ValueError(f"{type(self).__name__}: dims names no modality; expected name -> width")
        self.dims, self.out_dim = dict(dims), out_dim

    def _gather(
        self, features: Mapping[str, Tensor | None], present: Mapping[str, Tensor] | None
    ) -> tuple[list[Tensor], Tensor]:
        """Features `[B, D_m]` in the order of `dims`, zero where missing, and bool `[B, M]`: present."""
        owner = type(self).__name__
        given = {name: x for name, x in features.items() if x is not None}
        unknown = [name for name in (*given, *(present or ())) if name not in self.dims]
        if unknown or not given:
            what = f"does not know {', '.join(unknown)}" if unknown else "got no features"
            raise ValueError(f"{owner}: {what}; its modalities are {', '.join(self.dims)}")
        first = next(iter(given.values()))
        batch = first.shape[0]
        columns, values = [], []
        for name, dim in self.dims.items():
            x = given.get(name)
            if x is None:
                columns.append(torch.zeros(batch, dtype=torch.bool, device=first.device))
                values.append(first.new_zeros(batch, dim))
                continue
            if x.shape != (batch, dim):
                raise ValueError(f"{owner}: {name} must be [{batch}, {dim}], got {list(x.shape)}")
            here = None if present is None else present.get(name)
            if here is None:
                columns.append(torch.ones(batch, dtype=torch.bool, device=x.device))
                values.append(x)
                continue
            if here.shape != (batch,) or here.dtype != torch.bool:
                raise ValueError(
                    f"{owner}: present[{name!r}] must be bool [{batch}], got {here.dtype} {list(here.shape)}"
                )
            columns.append(here)
            values.append(torch.where(here[:, None], x, 0))
        return values, torch.stack(columns, 1)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, out_dim={self.out_dim}"


class ConcatFusion(_Fusion):
    """out = W [x_1; ...; x_M] + b, with zeros for a missing x_m.

    Args:
        dims: modality name -> width D_m; the order is that of the concatenation.
        out_dim: width of the result.

    Source: Baltrusaitis et al. 2018, "Multimodal Machine Learning: A Survey and Taxonomy", section 6.1.
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int):
        super().__init__(dims, out_dim)
        self.proj = nn.Linear(sum(self.dims.values()), out_dim)

    def forward(self, features: Mapping[str, Tensor | None], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """features: name -> `[B, D_m]`; present: name -> bool `[B]`. Returns `[B, out_dim]`."""
        values, _ = self._gather(features, present)
        return self.proj(torch.cat(values, 1))


class WeightedFusion(_Fusion):
    """One learned scalar per modality, normalised over those that are present.

    w = softmax of `logits` over the modalities present in the sample;
    "concat": out = W [w_1 x_1; ...; w_M x_M] + b; "sum": out = sum_m w_m (W_m x_m + b_m).

    Args:
        dims: modality name -> width D_m.
        out_dim: width of the result.
        reduce: "concat" or "sum".
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int, reduce: str = "concat"):
        super().__init__(dims, out_dim)
        if reduce not in ("concat", "sum"):
            raise ValueError(f"WeightedFusion: reduce is {reduce!r}; expected 'concat' or 'sum'")
        self.reduce = reduce
        self.logits = nn.Parameter(torch.zeros(len(self.dims)))
        if reduce == "concat":
            self.proj = nn.Linear(sum(self.dims.values()), out_dim)
        else:
            self.proj = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in self.dims.items()})

    def weights(self, present: Tensor) -> Tensor:
        """The weights `[B, M]` for bool `[B, M]`; a sample without any modality gets zeros."""
        lowest = torch.finfo(self.logits.dtype).min
        return self.logits.masked_fill(~present, lowest).softmax(1) * present

    def forward(self, features: Mapping[str, Tensor | None], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """features: name -> `[B, D_m]`; present: name -> bool `[B]`. Returns `[B, out_dim]`."""
        values, here = self._gather(features, present)
        weights = self.weights(here).unsqueeze(-1).unbind(1)
        if self.reduce == "concat":
            return self.proj(torch.cat([w.to(x.dtype) * x for w, x in zip(weights, values)], 1))
        return sum(w * proj(x) for w, proj, x in zip(weights, self.proj.values(), values))


class AttentionFusion(_Fusion):
    """Modalities as tokens; a learned query attends over those that are present.

    t_m = W_m x_m + b_m; [k_m; v_m] = W_kv t_m + b_kv; out = W_o concat_h sum_m softmax_m(<q_h, k_mh> / sqrt(D)) v_mh
    + b_o. A sample without any modality gives b_o. The tokens are a packed layout: those present come first.

    Args:
        dims: modality name -> width D_m.
        out_dim: width of tokens, query and result.
        heads: attention heads; `out_dim / heads` must be a multiple of 8, at most 256.

    Source: Vaswani et al. 2017, section 3.2.2, with one learned query (Lee et al. 2019, "Set Transformer", PMA).
    """

    def __init__(self, dims: Mapping[str, int], out_dim: int, heads: int = 4, *, dropout: float = 0.0):
        super().__init__(dims, out_dim)
        if out_dim % heads:
            raise ValueError(f"AttentionFusion: heads {heads} must divide out_dim {out_dim}")
        self.heads, self.dropout = heads, dropout
        self.tokens = nn.ModuleDict({name: nn.Linear(dim, out_dim) for name, dim in self.dims.items()})
        self.query = nn.Parameter(torch.randn(out_dim) * out_dim**-0.5)
        self.kv = nn.Linear(out_dim, 2 * out_dim)
        self.out = nn.Linear(out_dim, out_dim)

    def forward(self, features: Mapping[str, Tensor | None], present: Mapping[str, Tensor] | None = None) -> Tensor:
        """features: name -> `[B, D_m]`; present: name -> bool `[B]`. Returns `[B, out_dim]`."""
        values, here = self._gather(features, present)
        batch, count = here.shape
        tokens = torch.stack([proj(x) for proj, x in zip(self.tokens.values(), values)], 1)
        order = (~here).to(torch.uint8).argsort(dim=1, stable=True)
        tokens = tokens.take_along_dim(order[..., None], 1).flatten(0, 1)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(1)
        q = self.query.to(k.dtype).expand(batch, -1).unflatten(-1, (self.heads, -1))
        one_each = Layout.padded(batch, 1).to(here.device)
        those_present = Layout.padded(batch, count, here.sum(1).to(torch.int32))
        dropout = attention_dropout(self.dropout, self.training, q.device)
        mixed = attention(q, k, v, one_each, those_present, **dropout)
        return self.out(mixed.flatten(1))
