"""Augmentation of batches of equal size; uint8 in, plain PyTorch, seeded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


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
