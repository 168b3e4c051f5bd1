"""Measuring: all contestants in turn, round by round, so that a busy machine slows them alike."""

from __future__ import annotations

import ctypes
import random
import sys
import time
from collections.abc import Callable, Mapping

SAMPLE = 2e-3  # seconds: what is faster is repeated within one sample
WARM = 1e-2  # seconds: what is faster runs once before its sample
LONG = 5.0  # seconds: what is slower has its turn in the first LONG_ROUNDS rounds only
LONG_ROUNDS = 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (5, 101),
    clock: Callable[[], float] = time.perf_counter,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one number per round; in every round each has its turn, in a seeded order.

    What takes longer than LONG has its turn in the first LONG_ROUNDS only, or one case would take minutes.

    What is quick runs once before the clock starts, and so finds the caches as it leaves them itself. Otherwise its
    time would hold what the one before left to do: to write back an output from the cache, to read its own code again.

    Args:
        functions: name -> what to run; each runs before the measurement.
        seconds: aim for the whole measurement.
        rounds: never fewer and never more than these.
        clock: `time.process_time` on a shared machine with one thread.
        timer: runs a function once and returns its seconds (`mmfast.testing.gpu.clock`); then `clock` is not used.
    """

    def sample(function, calls):
        return timer(function) if timer else _sample(function, calls, clock)

    calls, warm, long, cost = {}, set(), set(), 0.0
    for name, function in functions.items():
        once = sample(function, 1)
        if once < 10 * SAMPLE:  # the first call of a quick one tells little
            once = sample(function, 1)
        calls[name] = 1 if timer else max(1, round(SAMPLE / max(once, 1e-7)))
        if once < WARM and not timer:
            warm.add(name)
        if once > LONG:
            long.add(name)
        cost += once * (calls[name] + (name in warm))
    count = min(max(int(seconds / cost), rounds[0]), rounds[1])
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(count):
        for name in random.Random(i).sample(sorted(functions), len(functions)):
            if i >= LONG_ROUNDS and name in long:
                continue
            if name in warm:
                functions[name]()
            times[name].append(sample(functions[name], calls[name]))
    return times


def set_allocator(new_pages: bool) -> None:
    """Makes glibc behave the same for everybody: blocks of 1 MiB and more always get new pages, or never.

    By itself it does either, as the blocks before happened to lie, and new pages can cost more than the work on them.
    True can only come before False, which lets the heap grow. Other allocators are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    mallopt(M_MMAP_MAX, 1 << 16 if new_pages else 0)
    mallopt(M_TRIM_THRESHOLD, 1 << 20 if new_pages else (1 << 31) - 1)


def _sample(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    begin = clock()
    for _ in range(calls):
        function()
    return (clock() - begin) / calls
