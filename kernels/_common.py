"""What all kernels share: the architecture they are compiled for, their launch, what is compiled in advance."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError

logger = logging.getLogger("mmfast")

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
    what is compiled. The kernels named in `wgmma` must use Hopper's matrix instructions. The tests compile the `quick`
    ones for sm_80 and sm_90, and the first one of each file for the other targets.
    """

    label: str
    run: Callable[[], object]
    wgmma: tuple[str, ...] = ()
    quick: bool = True


def architecture() -> str:
    """Of the current GPU: "sm_80", "sm_90", "gfx942", ...; "interpreter" where kernels are interpreted."""
    if INTERPRETED:
        return "interpreter"
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a fixed number where there is none, so that interpreted kernels split their work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


_AUTOTUNE = os.environ.get("MMFAST_AUTOTUNE") == "1" and not INTERPRETED
_UNFIT = (OutOfResources, PTXASError, CompilationError)
_fastest: dict[Hashable, Config] = {}


def fastest(
    key: Hashable, config: Config, candidates: Callable[[], list[Config]], trial: Callable[[Config], object]
) -> Config:
    """`config`; with MMFAST_AUTOTUNE=1 the fastest of it and the candidates.

    Candidates are timed at the first call with this key, which waits for the device; not while a graph is captured.

    Args:
        key: what else the choice depends on than the architecture; sizes by their `size_class`.
        trial: launches with a configuration; what it writes is not looked at, and it may be called any number of times.
    """
    if not _AUTOTUNE:
        return config
    key = (architecture(), key)
    if key not in _fastest and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        times = []
        for candidate in (config, *(c for c in candidates() if c != config)):
            with contextlib.suppress(*_UNFIT):
                times.append((_milliseconds(lambda c=candidate: trial(c)), candidate))
        _fastest[key] = min(times, key=lambda timed: timed[0])[1] if times else config
        logger.info("%s: %s", key, _fastest[key])
    return _fastest.get(key, config)


def size_class(*sizes: int) -> tuple[int, ...]:
    """Sizes that share a configuration: those between two powers of 2."""
    return tuple(size.bit_length() for size in sizes)


def _milliseconds(launch: Callable[[], object]) -> float:
    return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")
