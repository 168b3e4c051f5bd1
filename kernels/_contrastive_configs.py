"""Tile sizes, warps and pipeline stages of the contrastive kernels, per architecture, dtype and size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.kernels._common import Config, architecture, fastest, size_class

# Tiles (M, N, K), warps and stages for 16-bit features and batches that fill a GPU. `masked`: equal ids are left out,
# or it is the sigmoid loss: more registers are needed for each score.
_TUNED = {
    "sm_80": {
        "statistics": (128, 128, 32, 8, 3),
        "statistics masked": (128, 128, 32, 8, 3),
        "derivatives": (128, 128, 32, 8, 3),
        "derivatives masked": (128, 64, 32, 8, 3),
        "multiply": (128, 128, 32, 8, 4),
    },
    "sm_90": {
        "statistics": (256, 64, 64, 8, 3),
        "statistics masked": (128, 64, 32, 8, 3),
        "derivatives": (128, 128, 64, 8, 3),
        "derivatives masked": (128, 64, 64, 8, 3),
        "multiply": (128, 256, 64, 8, 3),
    },
}
_TUNED["sm_100"] = {**_TUNED["sm_90"], "statistics": (128, 64, 64, 8, 3)}
_SMALL = (64, 64, 64, 4, 3)  # few pairs: more tiles
_FLOAT32 = (64, 32, 32, 4, 2)  # three passes of TF32, whose operands take more registers


def _config(kernel: str, x: Tensor, n: int, m: int, masked: bool = False) -> Config:
    gpu = architecture()
    if x.dtype == torch.float32:
        numbers = _FLOAT32
    elif gpu == "interpreter" or n * m < 132 * 128 * 128:
        numbers = _SMALL
    else:
        numbers = _TUNED.get(gpu, _TUNED["sm_80"])[f"{kernel} masked" if masked else kernel]
    block_m, block_n, block_k, warps, stages = numbers
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    constants["PRECISION"] = "ieee" if gpu.startswith("gfx") else "tf32x3"
    return Config(constants, warps, stages)


def choose(
    kernel: str, trial: Callable[[Config], object], x: Tensor, m: int, masked: bool = False, variant: bool = False
) -> Config:
    """For x `[n, D]` and m columns; with MMFAST_AUTOTUNE=1 the fastest of several, for each `variant` by itself."""
    n, dim = x.shape
    key = ("contrastive", kernel, x.dtype, masked, variant, size_class(n, m, dim))
    return fastest(key, _config(kernel, x, n, m, masked), lambda: candidates(x), trial)


def candidates(x: Tensor) -> list[Config]:
    """Tiles of at most 128 columns, of which a panel of derivatives has a whole number."""
    precision = "ieee" if architecture().startswith("gfx") else "tf32x3"
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PRECISION": precision}, warps, stages)
        for m, n in ((64, 32), (64, 64), (128, 64), (64, 128), (128, 128), (256, 64))
        for k in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if m * n <= (64 * 64 if x.dtype == torch.float32 else 128 * 128)
    ]
