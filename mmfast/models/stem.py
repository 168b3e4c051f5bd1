"""Stems: from pixels or frames to tokens of the model's width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

REGION_STRIDE = 16
FRAMES_PER_TOKEN = 8


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that passes an empty batch on, with zero gradients and untouched statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0]:
            return super().forward(x)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _Residual(nn.Module):
    """x = relu(x + bn(conv3(relu(bn(conv3(x)))))). Source: He et al. 2016, figure 2."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.norm1(self.conv1(x)), inplace=True)
        return relu(self.norm2(self.conv2(y)).add_(x), inplace=True)


class ConvStem(nn.Module):
    """Residual convolutions that turn 16 x 16 pixels into one token.

    conv5/2, conv3/2, residual, conv3/2, residual, conv3/2; batch norm after each. Images of any size are regions of
    one size, stacked as a batch, so that nothing is padded.

    Args:
        widths: channels after each of the four halvings.
        dim: width of the tokens; a linear layer follows where it is not the last width.
    """

    def __init__(self, widths: Sequence[int], dim: int):
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"ConvStem: widths must be the channels after 4 halvings, got {tuple(widths)}")
        a, b, c, d = widths
        self.layers = nn.Sequential(
            nn.Conv2d(3, a, 5, 2, 2, bias=False), BatchNorm(a), nn.ReLU(inplace=True),
            nn.Conv2d(a, b, 3, 2, 1, bias=False), BatchNorm(b), nn.ReLU(inplace=True), _Residual(b),
            nn.Conv2d(b, c, 3, 2, 1, bias=False), BatchNorm(c), nn.ReLU(inplace=True), _Residual(c),
            nn.Conv2d(c, d, 3, 2, 1, bias=False), BatchNorm(d),
        )  # fmt: skip
        self.proj = nn.Identity() if d == dim else nn.Linear(d, dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def forward(self, regions: Tensor) -> Tensor:
        """regions `[R, 3, S, S]` -> tokens `[R * (S / 16)^2, dim]`, row by row within a region."""
        size = regions.shape[-1]
        if regions.dim() != 4 or regions.shape[1] != 3 or regions.shape[2] != size or size % REGION_STRIDE:
            raise ValueError(
                f"ConvStem: regions must be [R, 3, S, S] with S a multiple of {REGION_STRIDE}, "
                f"got {list(regions.shape)}"
            )
        x = self.layers(regions.contiguous(memory_format=torch.channels_last))
        # Channels are last in memory: the rows of tokens are a view.
        return self.proj(x.permute(0, 2, 3, 1).flatten(0, 2))


class FrameStem(nn.Module):
    """Groups of 8 frames -> linear, GELU, linear. The last group of a clip is filled with zeros."""

    def __init__(self, bins: int, dim: int):
        super().__init__()
        self.bins = bins
        self.layers = nn.Sequential(nn.Linear(FRAMES_PER_TOKEN * bins, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, frames: Tensor, lengths: Tensor, groups: int | None = None) -> tuple[Tensor, Tensor]:
        """frames `[F, bins]`, lengths int32 `[B]` -> tokens `[N, dim]` and their lengths int32 `[B]`."""
        counts = (lengths + (FRAMES_PER_TOKEN - 1)) // FRAMES_PER_TOKEN
        groups = int(counts.sum()) if groups is None else groups
        clip = torch.repeat_interleave(counts, output_size=groups)
        first_token, first_frame = (x.cumsum(0) - x for x in (counts, lengths))
        in_clip = (torch.arange(groups, device=frames.device) - first_token[clip]) * FRAMES_PER_TOKEN
        in_clip = in_clip[:, None] + torch.arange(FRAMES_PER_TOKEN, device=frames.device)
        inside = in_clip < lengths[clip, None]
        rows = torch.where(inside, first_frame[clip, None] + in_clip, 0)
        grouped = torch.where(inside[..., None], frames[rows], 0)
        return self.layers(grouped.flatten(1)), counts.to(torch.int32)
