"""The benchmark suite: every case is right at small sizes, and the command writes what it says."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

from mmfast import cli
from mmfast.testing import cases, ceilings, machine, memory, picture, report, suite, train_step
from mmfast.testing.bench import interleaved
from mmfast.testing.cases import Case, Contest, agree


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torch.compile takes ten seconds a peer; what it compiles is the eager peer."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.parametrize("case", cases.all_cases(small=True), ids=lambda case: case.name)
def test_every_case_is_right(case):
    contest = case.make(torch.device("cpu"))
    assert tuple(contest.peers) == case.peers
    assert (contest.work > 0) == bool(case.ceiling or case.op == "call")
    assert case.ceiling != "memory" or 2 * sum(contest.fresh) <= contest.work
    contest.check()


def test_names_are_unique_and_only_two_dtypes_are_used():
    for small in (False, True):
        names = [case.name for case in cases.all_cases(small)]
        assert len(set(names)) == len(names)
    assert {case.dtype_name for case in cases.all_cases()} == {"fp32", "bf16"}


@pytest.mark.parametrize("wrong", ["mmfast", "peer"])
def test_a_wrong_contestant_is_noticed(wrong):
    x = torch.randn(100)
    right, bad = [x.sin()], [x.sin() + 1e-3 * (x > 1)]
    with pytest.raises(AssertionError, match=wrong):
        agree(bad if wrong == "mmfast" else right, [x.double().sin()], right, {"peer": bad})
    with pytest.raises(AssertionError):
        agree([x.sin() * float("nan")], [x.double().sin()], right, {})


def test_interleaving_repeats_what_is_quick_and_keeps_every_round():
    calls = {"quick": 0, "slow": 0}

    def count(name):
        calls[name] += 1

    now = iter(range(10**6))
    times = interleaved({name: lambda name=name: count(name) for name in calls}, rounds=(4, 4), clock=lambda: next(now))
    assert {name: len(t) for name, t in times.items()} == {"quick": 4, "slow": 4}
    assert calls == {"quick": 5, "slow": 5}  # each tick of this clock is a second: nothing is repeated
    times = interleaved({"quick": lambda: count("quick")}, seconds=0, rounds=(2, 2))
    assert calls["quick"] > 100 and len(times["quick"]) == 2
    calls["quick"], now = 0, iter(range(10**6))
    interleaved({"quick": lambda: count("quick")}, rounds=(4, 4), clock=lambda: next(now) * 1e-3)
    assert calls["quick"] == 2 + 4 * (1 + 2)  # a tick is a millisecond: two calls a sample, one before it
    now = iter(range(0, 10**6, 6))
    times = interleaved({"long": lambda: count("slow")}, rounds=(5, 5), clock=lambda: next(now))
    assert times == {"long": [6, 6]}


class Clock:
    """Seconds pass where a contestant says so, and a little with each look."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


CLOCK = Clock()


def toy(name: str, ours: float, peer: float, *, wrong: bool = False, broken: bool = False) -> Case:
    """A case that takes as many seconds as it is told."""

    def sleep(seconds):
        CLOCK.now += seconds

    def make(device):
        def check():
            assert not wrong, "3 is not 4"

        def refuse():
            raise RuntimeError("this peer needs a moon")

        peers = {"them": lambda: sleep(peer), "others": refuse if broken else lambda: sleep(2 * peer)}
        return Contest(lambda: sleep(ours), peers, check, work=1e6)

    return Case("toy", name, "forward", torch.float32, ("them", "others"), make, "memory")


@pytest.fixture
def toys(monkeypatch):
    made = [toy("wins", 1e-3, 3e-3), toy("loses", 3e-3, 1e-3, broken=True), toy("lies", 1e-3, 1e-3, wrong=True)]
    made.append(dataclasses.replace(made[0], workload="long", quick=False))
    monkeypatch.setattr(cases, "all_cases", lambda small=False: made)
    monkeypatch.setattr(suite, "interleaved", functools.partial(interleaved, clock=CLOCK))
    monkeypatch.setattr(ceilings, "matrix_products", functools.partial(ceilings.matrix_products, size=64))
    monkeypatch.setattr(suite, "QUICK", suite.Effort(0.0, (2, 2)))
    monkeypatch.setattr(
        memory, "measure", lambda contrastive: [{"name": "toy", "grows_by": 2**21, "tensors": 2**20, "peak": 2**22}]
    )


def test_the_command_end_to_end(toys, tmp_path, capsys):
    assert cli.main(["bench", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 1  # one case is wrong
    out = capsys.readouterr().out
    assert "toy/lies/forward/fp32: 3 is not 4" in out
    assert "What we lose:" in out and "slower than them, 0.33x" in out
    assert "peak memory, toy" in out and "grows by 2 MiB" in out
    assert "absent: flash-attn: " in out

    result = json.loads((tmp_path / "results.json").read_text())
    wanted = {
        "date",
        "machine",
        "versions",
        "commit",
        "suite",
        "quick",
        "only",
        "stopped",
        "absent",
        "cases",
        "ceilings",
        "memory",
    }
    assert set(result) == wanted
    wins, loses, lies = result["cases"]  # the long one is not quick
    assert (
        wins["best_peer"] == "them"
        and wins["best_ratio"] == pytest.approx(3, rel=0.01)
        and set(wins["rounds"]) >= {"mmfast", "them"}
    )
    assert all(len(times) == 2 for times in wins["rounds"].values())
    assert wins["share"] == pytest.approx(wins["rate"] / wins["ceiling"]["rate"])
    assert loses["refused"] == {"others": "RuntimeError: this peer needs a moon"} and set(loses["ratios"]) == {"them"}
    assert "seconds" not in lies
    assert result["ceilings"]["copy, in the cache"]["low"] <= result["ceilings"]["copy, in the cache"]["high"]

    table = (tmp_path / "results.md").read_text()
    assert "| toy | fp32 forward |" in table and "them **0.33x**" in table and "| lies | **wrong** |" in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert (tmp_path / "results.png").stat().st_size > 1000


@pytest.mark.parametrize("measured", [0, 1])
def test_what_was_measured_before_an_interrupt_is_written(measured, toys, tmp_path, capsys):
    def stop(device):
        os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[measured])

    made = cases.all_cases()
    made[measured] = dataclasses.replace(made[measured], make=stop)
    assert cli.main(["bench", "--out", str(tmp_path)]) == 130
    assert f"interrupted with {measured} of 4 cases measured" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert [row["workload"] for row in result["cases"]] == ["wins"][:measured] and result["memory"] == []
    table = (tmp_path / "results.md").read_text()
    assert f"Not a whole run: interrupted with {measured} of 4 cases measured." in table


def test_only_and_quick_choose_cases(toys):
    assert [case.workload for case in suite.choose()] == ["wins", "loses", "lies", "long"]
    assert [case.workload for case in suite.choose(["TOY/L"])] == ["loses", "lies", "long"]
    assert [case.workload for case in suite.choose(["long", "wins"], quick=True)] == ["wins"]
    assert suite.choose(["memory"]) == []
    with pytest.raises(ValueError, match=r"--only unicorn is part of no case's name.*ops are toy, memory"):
        suite.choose(["unicorn"])


def test_errors_are_one_sentence(toys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--suite", "gpu", "--out", str(tmp_path / "gpu")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["bench", "--only", "unicorn", "--out", str(tmp_path)]) == 1
    assert "unicorn" in capsys.readouterr().err
    assert cli.main(["bench", "--suite", "train", "--only", "x", "--out", str(tmp_path)]) == 1


def test_without_matplotlib_it_says_so(toys, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["bench", "--only", "toy/wins", "--out", str(tmp_path)]) == 0
    assert "no picture: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "results.png").exists()


def test_scaling_is_reported_and_drawn(tmp_path):
    rows = [
        {"op": "scaling", "workload": f"documents, {n}k tokens", "measured": "forward+backward", "dtype": "fp32"}
        | {"work": 14 * 64 * n, "seconds": {"mmfast": n * 1e-9 * slower}, "ratios": {"loop": 2.0}, "best_ratio": 2.0}
        for n, slower in ((1, 1.0), (4, 1.1))
    ]
    (text,) = report.scaling(rows)
    assert "1000 ps at 1k tokens" in text and "10% above the smallest" in text
    picture.draw({"cases": rows}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_every_aim_speaks_of_a_case_and_a_peer():
    path = Path(__file__).resolve().parents[1] / "benchmarks/aims.py"
    if not path.exists():
        pytest.skip("benchmarks are not part of this copy")
    aims = runpy.run_path(str(path))
    for name, against, *_ in aims["AIMS"]:
        fitting = [case for case in cases.all_cases() if fnmatch.fnmatchcase(case.name, name)]
        assert fitting, name
        if against not in ("best", "ceiling"):
            assert any(against in case.peers for case in fitting), (name, against)
    row = {"name": "pack/x/forward/fp32", "op": "pack", "dtype": "fp32", "ratios": {"torch chain": 2.5}, "share": 0.9}
    result = {"cases": [row | {"best_ratio": 2.5}], "memory": []}
    assert aims["missed"](result) == ["pack/x/forward/fp32: 2.50 of 3.00 (torch chain)"]


def test_peers_that_are_absent_have_a_reason():
    absent = machine.absent_peers()
    assert all(absent.values())
    if not torch.cuda.is_available():
        assert set(absent) == {"flash-attn", "xformers", "flex_attention, backward", "varlen_attn"}


def test_peak_memory_grows_with_the_tokens():
    small, large = memory._run("attention", 4096, 16384)
    assert large["tensors"] == pytest.approx(4 * small["tensors"], rel=0.01)
    assert large["grows_by"] < 1.5 * large["tensors"]
    (failed,) = memory._run("nothing", 1)
    assert "nothing" in failed["failed"]


def test_train_step_compares_and_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_step, "PEERS", {name: train_step.PEERS[name] for name in ("padded, SDPA", "4 buckets, bmm")}
    )
    one, two = train_step.run("ragged", samples=4, rounds=1, steps=3, bf16=(False, True))
    assert one["losses_agree"]["worst_relative_difference"] <= 1e-5
    assert {name: len(curve) for name, curve in one["losses_agree"]["losses"].items()} == dict.fromkeys(one["step"], 3)
    assert two["dtype"] == "bf16 autocast"
    text = train_step.markdown([one, two])
    assert text.count("| 4 samples, ragged lengths") == 2 and "agree over 3 steps" in text

    class Off:
        def step(self, i):
            return 1.0 + 1e-4 * i

    class Right:
        def step(self, i):
            return 1.0

    with pytest.raises(AssertionError, match=r"step 1: loss of mmfast is 1.0001"):
        train_step.check_agreement({"mmfast": Off(), "padded, SDPA": Right()}, 3)
