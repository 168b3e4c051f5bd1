"""What all kernels share: the architecture they are compiled for, their launch, what is compiled in advance."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
import triton
from triton.runtime.driver import driver

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
_fastest: dict[Hashable, Config] = {}


def tuned(key: Hashable, config: Config, candidates: Iterable[Config], launch: Callable[[Config], None]) -> None:
    """Launches with `config`. With MMFAST_AUTOTUNE=1: with the fastest of it and the candidates, which are timed at the
    first call with this key (which waits for the device)."""
    if _AUTOTUNE and key not in _fastest:
        times = {}
        for number, candidate in enumerate([config, *candidates]):
            try:
                times[number] = triton.testing.do_bench(lambda c=candidate: launch(c), warmup=5, rep=20)
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
                continue
        _fastest[key] = [config, *candidates][min(times, key=times.get)]
        logger.info("%s: %s", key, _fastest[key])
    launch(_fastest.get(key, config))
