"""What all kernels share: the architecture they are compiled for, their launch, what is compiled in advance."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from triton.runtime.driver import driver

INTERPRETED = triton.knobs.runtime.interpret

# Pinned, because Triton announces that the default will change.
OPTIONS = {"enable_fp_fusion": True}


class Config(NamedTuple):
    """How a kernel is compiled: its tile sizes and other constants, warps, and stages of its software pipeline."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


class Example(NamedTuple):
    """A launch that `python -m mmfast.testing.aot` compiles in advance: `examples()` of each file lists them.

    `run` calls a launcher with small tensors on the CPU, whose values nobody reads: dtypes, sizes and options choose
    what is compiled. The kernels named in `wgmma` must use Hopper's matrix instructions.
    """

    label: str
    run: Callable[[], object]
    wgmma: tuple[str, ...] = ()


def architecture() -> str:
    """Of the current GPU: "sm_80", "sm_90", "gfx942", ...; "interpreter" where kernels are interpreted."""
    if INTERPRETED:
        return "interpreter"
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a fixed number where there is none, so that interpreted kernels split their work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
