"""Several encoders, one space: pooled vectors for contrastive learning, joint tokens for fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfast.layout import Layout
from mmfast.mask import ModalityMask
from mmfast.nn.pooling import segment_mean
from mmfast.ops.packing import pack


class MultimodalModel(nn.Module):
    """Encoders by modality, projections into a shared space, and optionally a backbone over all tokens.

    Args:
        encoders: modality name -> encoder; `encoder(input)` gives (tokens `[T, dim]`, Layout).
        dim: width of all tokens.
        embed_dim: width of the shared space.
        backbone: module (tokens, layout, mask) -> tokens over the packed tokens of all modalities of a sample, such
            as `mmfast.nn.PackedTransformer`; None: no `forward_joint`.
        mask: of the backbone; None: all tokens of a sample see each other.
        time_modalities: modalities that the mask's time speaks of (`Layout.with_time`), e.g. ("image",) for
            `ModalityMask.early_fusion()`.
        temperature: first value of `logit_scale.exp()`.

    A modality that a batch lacks runs on zero rows: its parameters get zero gradients, never None.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        dim: int,
        embed_dim: int,
        backbone: nn.Module | None = None,
        *,
        mask: ModalityMask | None = None,
        time_modalities: tuple[str, ...] = (),
        temperature: float = 20.0,
    ):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.dim, self.embed_dim, self.mask, self.time_modalities = dim, embed_dim, mask, tuple(time_modalities)
        self.projections = nn.ModuleDict({name: nn.Linear(dim, embed_dim, bias=False) for name in encoders})
        self.logit_scale = nn.Parameter(torch.tensor(math.log(temperature)))
        self.backbone = backbone
        if backbone is not None:
            self.type_embedding = nn.Parameter(torch.randn(len(self.encoders), dim) * 0.02)

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in the order of their ids in the backbone's layout."""
        return tuple(self.encoders)

    def encode(self, inputs: Mapping[str, object]) -> dict[str, tuple[Tensor, Layout]]:
        """Tokens `[T, dim]` and layout of every modality of the model.

        Args:
            inputs: modality name -> input, all with the same number of samples; a missing name is absent everywhere.
        """
        unknown = [name for name in inputs if name not in self.encoders]
        if unknown or not inputs:
            what = f"no encoder for {', '.join(unknown)}" if unknown else "no inputs"
            raise ValueError(f"MultimodalModel: {what}; its modalities are {', '.join(self.names)}")
        sizes = {name: x.batch for name, x in inputs.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"MultimodalModel: all inputs must have the same number of samples, got {sizes}")
        first = next(iter(inputs.values()))
        encoded = {}
        for name, encoder in self.encoders.items():
            x = inputs[name] if name in inputs else encoder.empty(first.batch, device=first.lengths.device)
            encoded[name] = encoder(x)
        return encoded

    def forward(self, inputs: Mapping[str, object]) -> dict[str, Tensor]:
        """Modality name -> mean of a sample's tokens `[B, dim]`, float32; zeros where the modality is absent."""
        return {name: _widen(segment_mean(*tokens)) for name, tokens in self.encode(inputs).items()}

    def fuse(self, encoded: Mapping[str, tuple[Tensor, Layout]]) -> tuple[Tensor, Layout]:
        """The backbone over the tokens of `encode`, all modalities of a sample in one sequence."""
        if self.backbone is None:
            raise ValueError("MultimodalModel: forward_joint needs a backbone; pass one to the constructor")
        dtype = torch.bfloat16
        for tokens, _ in encoded.values():
            dtype = torch.promote_types(dtype, tokens.dtype)
        parts = {name: (tokens.to(dtype), layout.lengths(), None) for name, (tokens, layout) in encoded.items()}
        tokens, layout = pack(parts, type_embedding=self.type_embedding)
        if self.time_modalities:
            layout = layout.with_time(self.mask.time, modalities=self.time_modalities)
        return self.backbone(tokens, layout, self.mask), layout

    def forward_joint(self, inputs: Mapping[str, object]) -> Tensor:
        """Mean of a sample's fused tokens, all modalities, `[B, dim]`, float32."""
        return _widen(segment_mean(*self.fuse(self.encode(inputs))))

    def project(self, name: str, pooled: Tensor) -> Tensor:
        """Pooled `[B, dim]` of a modality -> unit vectors `[B, embed_dim]` in float32; zeros stay zeros."""
        x = _widen(self.projections[name](pooled))
        # The floor keeps an absent modality's gradient finite; it is far below any real vector's norm.
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=1e-8))


def _widen(x: Tensor) -> Tensor:
    """In float32 at least: float64 models stay in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
