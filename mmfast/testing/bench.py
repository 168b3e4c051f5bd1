"""Measuring: interleaved medians, so that a busy machine slows all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function; in every round each runs once.

    Args:
        functions: name -> what to run; each runs once before the measurement.
        rounds: how often each is measured.
        clock: `time.process_time` on a shared machine with one thread.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            begin = clock()
            function()
            times[name].append(clock() - begin)
    return {name: statistics.median(t) for name, t in times.items()}
