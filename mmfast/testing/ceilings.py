"""What this machine can do: the ceilings that cases are held to, timed beside them in every round.

arithmetic: multiply-adds on registers, in the dtype of the case; on a GPU a large matrix product. memory: a copy of as
many bytes as the case must move, of which as many go into fresh memory (`clone`) as the case allocates, the others into
memory that is there (`copy_`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from mmfast import _native
from mmfast.testing.bench import interleaved
from mmfast.testing.cases import Case, Contest
from mmfast.testing.gpu.clock import Timer

SECONDS = 4e-3  # of one arithmetic measurement


def ceiling_of(case: Case, contest: Contest, device: torch.device) -> tuple[str, float, Callable[[], object]] | None:
    """Name, work and function of the case's ceiling; None where there is none."""
    if case.ceiling == "memory":
        there = int(contest.work) // 2 - sum(contest.fresh)
        name = "copy" if not contest.fresh else "clone" if not there else "clone and copy"
        return name, contest.work, _copy(contest.fresh, there, device)
    if case.ceiling == "arithmetic" and device.type == "cpu" and _native.cpu_refusal is None:
        bf16 = case.dtype == torch.bfloat16
        rounds = _rounds(bf16)
        run = lambda: _native.cpu().multiply_adds(bf16, rounds)  # noqa: E731
        return f"multiply-adds {case.dtype_name}", run(), run
    if case.ceiling == "arithmetic" and device.type == "cuda":
        size = 4096 if case.dtype == torch.float32 else 8192
        a, b = (torch.randn(size, size, device=device).to(case.dtype) for _ in range(2))
        return f"torch matmul {case.dtype_name}, {size}", 2 * size**3, lambda: a @ b
    return None


def _copy(fresh: Sequence[int], there: int, device: torch.device) -> Callable[[], object]:
    *sources, other = (torch.ones(n, dtype=torch.uint8, device=device) for n in (*fresh, there))
    target = torch.ones_like(other)

    def run():
        if there:
            target.copy_(other)
        return [source.clone() for source in sources]

    return run


def _rounds(bf16: bool) -> int:
    """How many fill `SECONDS`."""
    rounds = 1000
    while True:
        begin = time.perf_counter()
        _native.cpu().multiply_adds(bf16, rounds)
        passed = time.perf_counter() - begin
        if passed > SECONDS / 4:
            return max(1, int(rounds * SECONDS / passed))
        rounds *= 4


def large_copy(device: torch.device, nbytes: int = 2 << 30) -> dict[str, list[float]]:
    """Bytes read and written per second by a copy on a GPU, one number per round."""
    copy = _copy((), nbytes, device)
    times = interleaved({"copy": copy}, seconds=0, rounds=(9, 9), timer=Timer(device))["copy"]
    return {f"copy, {nbytes >> 30} GiB": [2 * nbytes / t for t in times]}


def matrix_products(seconds: float = 0.5, size: int = 1024) -> dict[str, list[float]]:
    """FLOP/s of torch's matrix product of `size` x `size`, one number per round."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        times = interleaved({name: lambda a=a, b=b: a @ b}, seconds=seconds / 2, rounds=(2, 101))[name]
        found[f"torch matmul {name}, {size}"] = [2 * size**3 / t for t in times]
    return found
