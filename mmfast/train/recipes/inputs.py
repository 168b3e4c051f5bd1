"""Data sets' pictures, words and sounds as the inputs of `mmfast.models`, packed, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data import Tokens, WordTokens
from mmfast.models import AudioInput, ImageInput, TextInput

TOKEN_PIXELS = 16
FRAMES_PER_TOKEN = 8


def normalise(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] to [-2, 0]: white, the usual background, is the zero of a convolution's border."""
    return 2 * pixels - 2


def square_images(pixels: Tensor) -> ImageInput:
    """Pictures of one size as one region each.

    Args:
        pixels: uint8 `[B, 3, S, S]`, or float in [0, 1].
    """
    if not pixels.is_floating_point():
        pixels = pixels.float() / 255
    count = len(pixels)
    return ImageInput(normalise(pixels), torch.ones(count, dtype=torch.int32), torch.zeros(count, 2, dtype=torch.int32))


def cut_regions(image: Tensor, size: int, longest: int) -> tuple[Tensor, Tensor]:
    """A picture resized so that both sides are multiples of `size`, cut into regions.

    The longer side becomes at most `longest`; the aspect is kept as near as multiples allow; nothing is padded.

    Args:
        image: uint8 `[3, h, w]`. size: side of a region. longest: a multiple of `size`.

    Returns:
        regions uint8 `[R, 3, size, size]`, row by row, and positions int32 `[R, 2]` (row, column).

    Source: Dehghani et al. 2023, "Patch n' Pack: NaViT", section 2.
    """
    if longest < size or longest % size:
        raise ValueError(f"cut_regions: longest is {longest}, expected a multiple of the region's side {size}")
    h, w = image.shape[1:]
    shrink = min(1.0, longest / max(h, w))
    rows, columns = (min(longest // size, max(1, round(side * shrink / size))) for side in (h, w))
    resized = F.interpolate(image[None].float(), (rows * size, columns * size), mode="bilinear", antialias=True)[0]
    cut = resized.round().clamp(0, 255).byte().view(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    return cut.reshape(-1, 3, size, size), places.int()


def text_input(tokens: WordTokens | Tokens) -> TextInput:
    """Words, or bytes, of several texts."""
    if isinstance(tokens, WordTokens):
        return TextInput(tokens.ids, tokens.offsets[:-1], tokens.lengths)
    return TextInput(tokens.ids, torch.arange(len(tokens.ids)), tokens.lengths)


def audio_input(clips: Sequence[Tensor]) -> AudioInput:
    """Clips of log-mel frames `[frames, 80]`; an empty clip is an absent one."""
    lengths = torch.tensor([len(clip) for clip in clips], dtype=torch.int32)
    frames = torch.cat([clip.float() for clip in clips]) if clips else torch.empty(0, 80)
    return AudioInput(frames, lengths, int(((lengths + FRAMES_PER_TOKEN - 1) // FRAMES_PER_TOKEN).sum()))


def count_tokens(inputs: dict) -> int:
    """Tokens that the encoders make of these inputs."""
    total = 0
    for x in inputs.values():
        if isinstance(x, ImageInput):
            total += x.regions.shape[0] * (x.regions.shape[-1] // TOKEN_PIXELS) ** 2
        elif isinstance(x, TextInput):
            total += x.offsets.shape[0]
        elif isinstance(x, AudioInput):
            total += x.groups
    return total
