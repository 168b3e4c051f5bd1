"""What the encoders take: packed inputs of one modality, with one length per sample. Length 0: absent there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class _Moves:
    """Moving between devices; float tensors also change dtype."""

    __slots__ = ()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ):
        """The input on a device; `dtype` changes the float tensors only."""
        return self._make(_move(value, device, dtype, non_blocking) for value in self)

    def pin_memory(self):
        """The input in page-locked memory."""
        return self._make(value.pin_memory() if isinstance(value, Tensor) else value for value in self)

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.lengths.shape[0]


class _ImageFields(NamedTuple):
    regions: Tensor
    lengths: Tensor
    positions: Tensor


class ImageInput(_Moves, _ImageFields):
    """Images cut into square regions, without padding.

    Fields:
        regions: float `[R, 3, S, S]`, normalised; S a multiple of 16, and both sides of an image multiples of S.
        lengths: int32 `[B]`, regions of each image.
        positions: int32 `[R, 2]`, row and column of the region in its image, in regions.
    """

    __slots__ = ()

    @classmethod
    def empty(cls, batch: int, *, size: int = 32, device: torch.device | str | None = None) -> ImageInput:
        """B absent images."""
        return cls(
            torch.zeros(0, 3, size, size, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.zeros(0, 2, dtype=torch.int32, device=device),
        )


class _TextFields(NamedTuple):
    ids: Tensor
    offsets: Tensor
    lengths: Tensor


class TextInput(_Moves, _TextFields):
    """Texts as tokens that are sums of embeddings: a word is the sum of its own hash and its trigrams'.

    Fields:
        ids: int64 `[n]`, rows of the embedding table.
        offsets: int64 `[W]`, first id of each token; one id per token (bytes): `arange(n)`.
        lengths: int32 `[B]`, tokens of each text.
    """

    __slots__ = ()

    @classmethod
    def empty(cls, batch: int, *, device: torch.device | str | None = None) -> TextInput:
        """B absent texts."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(none, none, torch.zeros(batch, dtype=torch.int32, device=device))


class _AudioFields(NamedTuple):
    frames: Tensor
    lengths: Tensor
    groups: int | None = None


class AudioInput(_Moves, _AudioFields):
    """Log-mel frames of clips, behind each other.

    Fields:
        frames: float `[F, 80]`.
        lengths: int32 `[B]`, frames of each clip.
        groups: number of tokens of the batch, the sum of ceil(lengths / 8); where it is not given, it is counted,
            which waits for the device once.
    """

    __slots__ = ()

    @classmethod
    def empty(cls, batch: int, *, bins: int = 80, device: torch.device | str | None = None) -> AudioInput:
        """B absent clips."""
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(torch.zeros(0, bins, device=device), lengths, 0)


def _move(value, device, dtype, non_blocking: bool):
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None, non_blocking=non_blocking)
