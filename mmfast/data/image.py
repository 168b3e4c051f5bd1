"""Images to ragged patches, and augmentation of batches of equal size; uint8 in, plain PyTorch, seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def patch_positions(shapes: torch.Tensor, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of every patch of a batch of images of different size, images one after the other, row by row.

    Args:
        shapes: integer [B, 2], height and width of each image in pixels; a part of a patch at the edge counts as one.
        patch: side of a patch in pixels.

    Returns:
        positions int32 [sum of lengths, 2] and lengths int32 [B], patches of each image.
    """
    if shapes.ndim != 2 or shapes.shape[1] != 2 or patch < 1:
        raise ValueError(
            f"patch_positions: shapes is {list(shapes.shape)}, patch {patch}; expected [B, 2] and 1 or more"
        )
    grid = (shapes.long() + patch - 1) // patch
    lengths = grid[:, 0] * grid[:, 1]
    columns = torch.repeat_interleave(grid[:, 1], lengths)
    begin = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    index = torch.arange(len(columns), device=shapes.device) - begin
    positions = torch.stack([index.div(columns, rounding_mode="floor"), index % columns], dim=1)
    return positions.int(), lengths.int()


def patchify(images: Sequence[torch.Tensor], patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut images of different size into patches without resizing; edges are filled up with white.

    Args:
        images: uint8 tensors [3, h, w].
        patch: side of a patch in pixels.

    Returns:
        patches uint8 [P, 3 * patch * patch] (channel, row, column), positions int32 [P, 2], lengths int32 [B].
    """
    shapes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).view(-1, 2)
    positions, lengths = patch_positions(shapes, patch)
    parts = [torch.empty(0, 3 * patch * patch, dtype=torch.uint8)]
    for image in images:
        height, width = image.shape[1:]
        image = F.pad(image, (0, -width % patch, 0, -height % patch), value=255)
        cut = image.unfold(1, patch, patch).unfold(2, patch, patch)  # [3, rows, columns, patch, patch]
        parts.append(cut.permute(1, 2, 0, 3, 4).reshape(-1, 3 * patch * patch))
    return torch.cat(parts), positions, lengths


def augment(
    images: torch.Tensor,
    *,
    shift: float = 0.06,
    degrees: float = 10.0,
    scale: float = 0.1,
    colour: float = 0.15,
    grey: float = 0.15,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Random shift, rotation, scale, colours and grey for each image of a batch, on the images' device.

    What comes in from outside is white. Colours: x' = M x + b with M = I + colour * N(0, 1), each row of M scaled to
    keep white white, and b = colour / 2 * N(0, 1); a share `grey` of the images keeps its luma (BT.601) only.

    Args:
        images: uint8 [B, 3, H, W].
        shift: largest shift, as a share of the side.
        degrees: largest rotation.
        scale: largest change of size; sizes are between 1 / (1 + scale) and 1 + scale.
        colour: strength of the colour change, 0 for none.
        grey: probability of grey.
        generator: for the random numbers, which are drawn on its own device; torch's default otherwise.

    Returns:
        float32 [B, 3, H, W] between 0 and 1.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"augment: images is {images.dtype} {list(images.shape)}, expected uint8 [B, 3, H, W]")
    count, _, height, width = images.shape
    where = generator.device if generator is not None else torch.device("cpu")

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator, device=where) * 2 - 1).to(images.device)

    # Everything is drawn in any case, so that one strength does not change the numbers of the next.
    angle = uniform(count) * math.radians(degrees)
    size = torch.exp(uniform(count) * math.log1p(scale))
    offset = uniform(count, 2) * shift * 2  # the sampling grid spans -1 to 1
    noise = torch.randn(count, 3, 4, generator=generator, device=where).to(images.device) * colour
    is_grey = torch.rand(count, generator=generator, device=where).to(images.device) < grey

    # The rotation is one of pixels, not of the -1 to 1 grid, whose steps differ where H and W do.
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    theta = torch.stack(
        [
            torch.stack([cos, -sin * height / width, offset[:, 0]], dim=1),
            torch.stack([sin * width / height, cos, offset[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, [count, 3, height, width], align_corners=False)
    # Zero padding is white for the inverted picture.
    inverted = F.grid_sample((255 - images).float(), grid, padding_mode="zeros", align_corners=False)

    eye = torch.eye(3, device=images.device)
    matrix = eye + noise[:, :, :3]
    matrix = matrix - (noise[:, :, :3].sum(2) / 3)[:, :, None]  # each row sums to 1
    luma = torch.tensor(_LUMA, device=images.device).expand(3, 3)
    matrix = torch.where(is_grey[:, None, None], luma, matrix)
    bias = torch.where(is_grey[:, None], noise[:, :1, 3], noise[:, :, 3]) / 2
    # The rows of M sum to 1, so M (1 - x) + b = (1 + b) - M x: the inversion and the division by 255 cost no pass.
    pixels = torch.baddbmm((1 + bias)[:, :, None], matrix, inverted.flatten(2), alpha=-1 / 255)
    return pixels.view(count, 3, height, width).clamp_(0, 1)
