"""The seconds that a GPU spends on a run, by device events: cold cache, and no waiting for the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

CACHE = 256 << 20  # bytes, more than any L2 cache
CYCLES = 2e9  # of a GPU in a second, at most
LONGEST = 0.02  # seconds that the device sleeps


class Timer:
    """`timer(function)` runs the function once and returns the device's seconds; `host` keeps the host's of each."""

    def __init__(self, device: torch.device):
        self.other = torch.empty(CACHE, dtype=torch.int8, device=device)
        self.host: dict[Callable, float] = {}

    def __call__(self, function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()
        # The device waits until the host has queued the whole run: gaps between launches are the host's time.
        torch.cuda._sleep(int(CYCLES * min(1.5 * self.host.get(function, 0.0), LONGEST)))
        begin.record()
        start = time.perf_counter()
        function()
        self.host[function] = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def timer_of(device: torch.device) -> Timer | None:
    """None on a CPU, where the host's clock does."""
    return Timer(device) if device.type == "cuda" else None
