"""Encoders of one modality: packed input -> packed tokens and their layout. No loop over samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from mmfast.layout import Layout
from mmfast.models.inputs import AudioInput, ImageInput, TextInput
from mmfast.models.stem import ConvStem, FrameStem
from mmfast.nn.block import PackedTransformer
from mmfast.ops.packing import pack


class ImageEncoder(nn.Module):
    """Images of any size and aspect as regions: convolutional stem, row and column embeddings, transformer.

    Args:
        dim, depth, heads, mlp_ratio: of the transformer.
        stem_widths: channels after each halving of the stem.
        max_grid: rows and columns of tokens that have an embedding of their own; the last serves all beyond.
        norm, dropout, checkpointing: as for `PackedTransformer`.

    Source of regions without padding: Dehghani et al. 2023, "Patch n' Pack: NaViT", section 2.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 2,
        heads: int = 6,
        mlp_ratio: float = 3,
        stem_widths: Sequence[int] = (32, 64, 128, 192),
        max_grid: int = 64,
        **options,
    ):
        super().__init__()
        self.dim = dim
        self.stem = ConvStem(stem_widths, dim)
        self.row = nn.Parameter(torch.randn(max_grid, dim) * 0.02)
        self.column = nn.Parameter(torch.randn(max_grid, dim) * 0.02)
        self.transformer = PackedTransformer(depth, dim, heads, mlp_ratio=mlp_ratio, **options)

    def empty(self, batch: int, device: torch.device | str | None = None) -> ImageInput:
        """The input of B absent images."""
        return ImageInput.empty(batch, device=device)

    def forward(self, x: ImageInput) -> tuple[Tensor, Layout]:
        """Tokens `[R * g * g, dim]`, g = S / 16, and their layout, with (row, column) as position."""
        tokens = self.stem(x.regions)
        grid = x.regions.shape[-1] // 16
        places = torch.cartesian_prod(*[torch.arange(grid, dtype=torch.int32, device=x.regions.device)] * 2)
        positions = (x.positions[:, None] * grid + places).flatten(0, 1).clamp(max=self.row.shape[0] - 1)
        tables = {"image": (self.row, self.column)}
        tokens, layout = pack({"image": (tokens, x.lengths * grid**2, positions)}, position_embedding=tables)
        return self.transformer(tokens, layout), layout


class TextEncoder(nn.Module):
    """Texts whose tokens are sums of hashed embeddings (words and trigrams, or single bytes): transformer.

    Args:
        dim, depth, heads, mlp_ratio: of the transformer.
        vocab: rows of the embedding table.
        max_length: places that have an embedding of their own; the last serves all beyond.
        norm, dropout, checkpointing: as for `PackedTransformer`.

    Source of sums of hashed trigrams: Bojanowski et al. 2017, "Enriching Word Vectors with Subword Information".
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 1,
        heads: int = 6,
        vocab: int = 8192,
        mlp_ratio: float = 3,
        max_length: int = 512,
        **options,
    ):
        super().__init__()
        self.dim = dim
        self.embedding = nn.Parameter(torch.randn(vocab, dim) * 0.05)
        self.place = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        self.transformer = PackedTransformer(depth, dim, heads, mlp_ratio=mlp_ratio, **options)

    def empty(self, batch: int, device: torch.device | str | None = None) -> TextInput:
        """The input of B absent texts."""
        return TextInput.empty(batch, device=device)

    def forward(self, x: TextInput) -> tuple[Tensor, Layout]:
        """Tokens `[W, dim]` and their layout."""
        tokens = embedding_bag(x.ids, self.embedding, x.offsets, mode="sum")
        first = (x.lengths.cumsum(0) - x.lengths).to(torch.int64)
        text = torch.repeat_interleave(x.lengths.to(torch.int64), output_size=tokens.shape[0])
        places = (torch.arange(tokens.shape[0], device=text.device) - first[text]).clamp(max=self.place.shape[0] - 1)
        parts = {"text": (tokens, x.lengths, places[:, None].to(torch.int32))}
        tokens, layout = pack(parts, position_embedding={"text": (self.place,)})
        return self.transformer(tokens, layout), layout


class AudioEncoder(nn.Module):
    """Log-mel frames: one token per 8 frames, transformer with rotary positions, so that clips have no maximum.

    Args:
        dim, depth, heads, mlp_ratio: of the transformer.
        bins: mel bins of a frame.
        rotary_base, norm, dropout, checkpointing: as for `PackedTransformer`.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 2,
        heads: int = 6,
        bins: int = 80,
        mlp_ratio: float = 3,
        rotary_base: float = 10000.0,
        **options,
    ):
        super().__init__()
        self.dim = dim
        self.stem = FrameStem(bins, dim)
        self.transformer = PackedTransformer(depth, dim, heads, mlp_ratio=mlp_ratio, rotary_base=rotary_base, **options)

    def empty(self, batch: int, device: torch.device | str | None = None) -> AudioInput:
        """The input of B absent clips."""
        return AudioInput.empty(batch, bins=self.stem.bins, device=device)

    def forward(self, x: AudioInput) -> tuple[Tensor, Layout]:
        """Tokens, one per 8 frames, and their layout."""
        tokens, lengths = self.stem(x.frames, x.lengths, x.groups)
        tokens, layout = pack({"audio": (tokens, lengths, None)})
        return self.transformer(tokens, layout), layout
