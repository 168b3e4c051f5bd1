"""The cases of `mmfast.testing.cases` under pytest-benchmark: one group per case, one test per contestant."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from mmfast.testing.bench import set_allocator
from mmfast.testing.cases import Case, Contest


@functools.lru_cache(maxsize=1)
def contest_of(case: Case) -> Contest:
    """Built and checked once for all contestants of a case."""
    set_allocator(case.new_pages)
    contest = case.make(torch.device("cpu"))
    contest.check()
    return contest


def benchmarks_of(*modules: ModuleType) -> Callable:
    """A test function over every case and contestant of these modules."""
    cases = sorted((case for module in modules for case in module.cases()), key=lambda case: not case.new_pages)
    pairs = [(case, who) for case in cases for who in ("mmfast", *case.peers)]

    @pytest.mark.parametrize("case, who", [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}") for pair in pairs])
    def test(benchmark, case, who):
        contest = contest_of(case)
        benchmark.group = case.name
        benchmark(contest.ours if who == "mmfast" else contest.peers[who])
        if contest.work and benchmark.stats:
            benchmark.extra_info["unit"] = "GB/s" if case.ceiling == "memory" else "GFLOP/s"
            benchmark.extra_info["rate"] = round(contest.work / benchmark.stats.stats.median / 1e9, 1)

    return test
