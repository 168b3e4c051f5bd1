"""Runs the cases: correctness first, then all contestants and the ceiling in turn; `mmfast bench`."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence

import torch

from mmfast.testing import cases, ceilings, machine, memory
from mmfast.testing.bench import interleaved, set_allocator
from mmfast.testing.cases import Case, Contest, WrongPeer
from mmfast.testing.gpu.clock import timer_of

CEILING = "ceiling"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        seconds: aim for one case.
        rounds: of one case, never fewer and never more.
    """

    seconds: float = 4.0
    rounds: tuple[int, int] = (5, 51)


QUICK = Effort(0.6, (3, 21))


def choose(only: Sequence[str] = (), quick: bool = False, available: Iterable[Case] | None = None) -> list[Case]:
    """Cases whose name contains one of `only`, in any case; raises ValueError where a name fits none."""
    available = list(cases.all_cases() if available is None else available)
    for name in only:
        if not any(name.lower() in case.name.lower() for case in available) and name.lower() not in memory.NAME:
            ops = ", ".join(dict.fromkeys([*(case.op for case in available), memory.NAME]))
            raise ValueError(
                f"bench: --only {name} is part of no case's name, which is op/workload/measured/dtype; ops are {ops}"
            )
    fitting = [case for case in available if not only or any(name.lower() in case.name.lower() for name in only)]
    return [case for case in fitting if case.quick or not quick]


def head(case: Case) -> dict:
    """How a row begins."""
    names = ("name", "op", "workload", "measured")
    return {name: getattr(case, name) for name in names} | {"dtype": case.dtype_name}


def run_case(case: Case, effort: Effort, device: torch.device) -> dict:
    """One row of the results; with "failed" instead of times where ours is wrong."""
    row = head(case)
    set_allocator(case.new_pages)
    timer = timer_of(device)
    if timer:  # what a compiled peer of an earlier case left behind would count towards its limit of compilations
        torch.compiler.reset()
        torch.cuda.empty_cache()
    contest = case.make(device)
    refused = {}
    for name, peer in list(contest.peers.items()):
        try:
            peer()
            if timer:
                torch.cuda.synchronize(device)
        except Exception as error:  # a peer's failure is a finding, not ours
            refused[name] = refusal(error)
            del contest.peers[name]
    row["refused"] = refused
    try:
        check(contest, refused)
    except AssertionError as error:
        return {**row, "failed": str(error)}
    ways: dict[str, Callable[[], object]] = {"mmfast": contest.ours, **contest.peers}
    ceiling = ceilings.ceiling_of(case, contest, device)
    if ceiling:
        ways[CEILING] = ceiling[2]
    gc.collect()
    gc.disable()
    try:
        times = interleaved(ways, seconds=effort.seconds, rounds=effort.rounds, timer=timer)
    finally:
        gc.enable()
    limit = times.pop(CEILING, None)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    ratios = {name: seconds[name] / seconds["mmfast"] for name in contest.peers}
    best = min(ratios, key=ratios.get, default=None)
    row |= {"seconds": seconds, "ratios": ratios, "best_peer": best, "best_ratio": ratios[best] if best else None}
    row |= {"work": contest.work, "unit": "B/s" if case.ceiling == "memory" else "FLOP/s"}
    row["rate"] = contest.work / seconds["mmfast"] if contest.work else None
    row["spread"] = {name: _spread(t) for name, t in times.items()}
    if timer:
        row["host_seconds"] = {name: timer.host[way] for name, way in ways.items() if name != CEILING}
    row["ceiling"] = None
    if ceiling:
        name, work, _ = ceiling
        rates = [work / t for t in limit]
        row["ceiling"] = {"name": name, "rate": statistics.median(rates)}
        row["share"] = row["rate"] / row["ceiling"]["rate"]
        times[CEILING] = limit
    return {**row, "rounds": times}


def refusal(error: Exception) -> str:
    """Why a peer does not run, on one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')[:200]}"


def check(contest: Contest, refused: dict[str, str]) -> None:
    """Raises AssertionError where ours is wrong; a wrong peer is taken out of the contest, and is not timed."""
    while True:
        try:
            return contest.check()
        except WrongPeer as error:
            refused[error.peer] = f"wrong: {error}"
            del contest.peers[error.peer]


def _spread(times: Sequence[float]) -> float:
    """Half of the rounds lie in a range that is this share of their median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle


def run(
    chosen: Sequence[Case],
    effort: Effort,
    *,
    only: Sequence[str] = (),
    quick: bool = False,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = print,
    fits: Callable[[str], bool] = lambda name: True,
    keep: Callable[[dict], None] = lambda row: None,
) -> dict:
    """All chosen cases that fit; returns the whole result, ready for JSON.

    An interrupt ends the measurement, not the run: the result then has the cases that were ready, and says so.

    Args:
        say: gets one line for each case.
        fits: whether there is time for the case of this name.
        keep: gets each row as soon as it is there.
    """
    from mmfast.testing.report import line

    device = torch.device(device)
    result = machine.describe() | {"suite": device.type, "quick": quick, "only": list(only)}
    result["absent"] = machine.absent_peers()
    result["stopped"] = None
    products: dict[str, list[float]] = {}

    def measure_products():
        found = ceilings.matrix_products(effort.seconds / 4) if device.type == "cpu" else ceilings.large_copy(device)
        for name, rates in found.items():
            products.setdefault(name, []).extend(rates)

    rows, result["memory"] = [], []
    try:
        with progress(len(chosen), say) as tell:
            for i, case in enumerate(sorted(chosen, key=lambda case: not case.new_pages)):
                if not fits(case.name):
                    continue
                if i % 25 == 0:
                    measure_products()
                try:
                    rows.append(run_case(case, effort, device))
                except Exception as error:
                    if device.type == "cpu":
                        raise
                    rows.append(head(case) | {"failed": refusal(error)})  # out of memory, say; a GPU's hour is not lost
                keep(rows[-1])
                tell(line(rows[-1]))
            measure_products()
        if device.type == "cpu" and (not only or any(name.lower() in memory.NAME for name in only)):
            result["memory"] = memory.measure(contrastive=not quick)
    except KeyboardInterrupt:
        result["stopped"] = f"interrupted with {len(rows)} of {len(chosen)} cases measured"
    place = {case.name: i for i, case in enumerate(chosen)}
    result["cases"] = rows = sorted(rows, key=lambda row: place[row["name"]])
    result["ceilings"] = summary(rows, products)
    return result


def summary(rows: Sequence[dict], products: dict[str, list[float]]) -> dict[str, dict]:
    """Ceilings through the run: the lowest, the median and the highest of what the cases measured beside them."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("ceiling"):
            size = f", {_size(row['work'])}" if row["unit"] == "B/s" else ""
            found.setdefault(row["ceiling"]["name"] + size, []).append(row["ceiling"]["rate"])
    return {
        name: {
            "unit": "B/s" if name.startswith(("copy", "clone")) else "FLOP/s",
            "low": min(rates),
            "median": statistics.median(rates),
            "high": max(rates),
            "measured": len(rates),
        }
        for name, rates in {**found, **products}.items()
    }


def _size(nbytes: float) -> str:
    return "beyond the cache" if nbytes > 3.2e7 else "in the cache"


class progress:
    """A tqdm bar on a terminal, where tqdm is installed; one line for each finished case everywhere."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say, self.count, self.bar = total, say, 0, None

    def __enter__(self) -> Callable[[str], None]:
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=self.total, unit="case", dynamic_ncols=True)
            except ImportError:
                pass
        return self.tell

    def tell(self, text: str) -> None:
        self.count += 1
        if self.bar is None:
            self.say(f"{self.count:3}/{self.total} {text}")
            return sys.stdout.flush()
        self.bar.clear()
        self.say(text)
        self.bar.update()

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
