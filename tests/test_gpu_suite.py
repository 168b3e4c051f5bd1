"""`benchmarks/gpu_suite.py` on the CPU, interpreted and tiny: a GPU's minutes are not spent on its mistakes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from pathlib import Path

import cuda_shim
import pytest
import torch

from mmfast.ops import _dispatch
from mmfast.testing import report, suite, train_step
from mmfast.testing.cases import Case, Contest, WrongPeer
from mmfast.testing.gpu import cases, checks, clock, peers, probes
from mmfast.testing.gpu.budget import Budget

FILE = Path(__file__).resolve().parents[1] / "benchmarks/gpu_suite.py"
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not _dispatch.interpreted or _dispatch.no_triton is not None, reason="kernels are compiled"),
    pytest.mark.skipif(not FILE.exists(), reason="benchmarks are not part of this copy"),
]


@pytest.fixture
def gpu_suite(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_suite", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return module


@pytest.fixture
def no_cuda_checks(monkeypatch):
    """Stand-ins for what only CUDA has."""
    monkeypatch.setattr(checks, "waiting_is_an_error", contextlib.nullcontext)
    monkeypatch.setattr(checks, "captured", lambda function: function)


def run(module, tmp_path, *arguments):
    status = module.main([*arguments, "--out", str(tmp_path)], device="cpu", small=True)
    part = arguments[arguments.index("--part") + 1]
    return status, json.loads((tmp_path / f"{part}.json").read_text()), (tmp_path / f"{part}.md").read_text()


@pytest.mark.parametrize("name", list(probes.probes(CPU, small=True)))
def test_every_probe_against_the_oracle(name):
    probe = probes.probes(CPU, small=True)[name]()
    checks.check_oracle(probe, "triton", torch.float16)
    assert bool(probe.leaves) != name.startswith(("perturb_", "random_start_"))


@pytest.mark.skipif(cuda_shim.refusal is not None, reason=str(cuda_shim.refusal))
def test_cuda_kernels_are_checked_and_timed_beside_triton(gpu_suite):
    """With the kernels that run on the CPU in place of those on a GPU."""
    assert not cases.has_cuda("pack", torch.float16, CPU)
    with cuda_shim.use():
        names = [name for name, _ in gpu_suite.plan(CPU, True) if "CUDA C++" in name]
        assert "oracle: perturb_, l2, CUDA C++, float32" in names and "CUDA graph: unpack, CUDA C++, float16" in names
        assert not [name for name in names if "rotary" in name or "attention, causal, CUDA C++, float32" in name]
        checks.check_oracle(probes.probes(CPU, small=True)["pack, layer norm"](), "cuda", torch.float16)
        found = {case.op: case for case in cases.gpu_cases(small=True) if case.measured in ("forward", "step")}
        for op in ("pack", "unpack", "perturb"):
            contest = cases.with_cuda(found[op]).make(CPU)
            contest.check()
            assert torch.is_tensor(contest.peers[cases.CUDA]()) or contest.peers[cases.CUDA]()
    assert cases.with_cuda(found["pack"]).peers[-1] == cases.CUDA


def test_part_test(gpu_suite, no_cuda_checks, tmp_path, monkeypatch):
    lines = ("tests/a.py::one[a b] PASSED [ 50%]", "tests/a.py::c SKIPPED (no [x]) [ 60%]")
    lines += ("[gw1] [ 99%] FAILED tests/b.py::two[x] ", "FAILED tests/b.py::two[x] - no")
    log = "\n".join(lines)

    def start(path):
        path.write_text(log)
        return type("Done", (), {"wait": lambda self, seconds: None, "returncode": 1})()

    monkeypatch.setattr(gpu_suite, "start_tests", start)
    monkeypatch.setitem(checks.CHECKS, "same bits 50 times", lambda *a: checks.check_same_bits(*a, repeats=2))
    kept = ("rotary", "perturb_, linf", "unpack")
    some = {name: build for name, build in probes.probes(CPU, small=True).items() if name in kept}
    monkeypatch.setattr(gpu_suite, "probes", lambda device, small: some)
    status, result, text = run(gpu_suite, tmp_path, "--part", "test")
    assert status == 1  # of pytest
    assert {row["result"] for row in result["checks"]} == {"passed"} and len(result["checks"]) == 3 * (4 + 1)
    assert result["pytest"]["counts"] == {"FAILED": 1, "PASSED": 1, "SKIPPED": 1} and result["pytest"]["failed"] == [
        "tests/b.py::two[x]"
    ]
    assert "| rotary, float16 | passed | passed | passed | passed |" in text and "1 failed" in text
    assert len((tmp_path / "test.jsonl").read_text().splitlines()) == 15


def test_wrong_kernels_are_noticed():
    count = iter(range(100))
    wrong = {
        "oracle": lambda backend, x: [x.sin() if backend == "reference" else x.sin() + 0.01 * x],
        "same bits 50 times": lambda backend, x: [x * (1 + 1e-3 * next(count))],
    }
    for name, function in wrong.items():
        with pytest.raises(AssertionError):
            checks.CHECKS[name](probes.Probe(function, [torch.randn(9, 4)], 1), "triton", torch.float32)
    frozen = torch.randn(9, 4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError, match="replayed graph"):
        patch.setattr(checks, "captured", lambda function: lambda: [frozen, frozen])
        checks.check_graph(probes.Probe(lambda b, x: [x.sin()], [frozen], 1), "triton", torch.float32)


def test_part_bench(gpu_suite, tmp_path):
    status, result, text = run(gpu_suite, tmp_path, "--part", "bench", "--only", "attention/documents", "L2")
    assert status == 0, [row.get("failed") for row in result["cases"]]
    first = result["cases"][0]
    assert set(first["ratios"]) == {"flex_attention"} and "varlen_attn" in first["refused"]  # which needs a GPU
    assert "| attention |" in text and "gpu_suite.py --part bench" in text
    assert "flash-attn-4" in result["absent"] and "liger-kernel" in result["absent"]


@pytest.mark.parametrize("case", cases.gpu_cases(small=True), ids=lambda case: case.name)
def test_every_case_is_right(case, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    contest = case.make(CPU)
    assert tuple(contest.peers) == case.peers
    refused = {}
    for name, peer in list(contest.peers.items()):
        try:
            peer()
        except Exception as error:
            refused[name] = suite.refusal(error)
            del contest.peers[name]
    suite.check(contest, refused)
    assert not any(why.startswith("wrong") for why in refused.values()), refused


def test_large_cases_have_names_of_their_own():
    names = [case.name for case in cases.all_cases()]
    assert len(set(names)) == len(names) > 100


def test_part_train(gpu_suite, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "PEERS", {"padded, SDPA": train_step.PEERS["padded, SDPA"]})
    status, result, text = run(gpu_suite, tmp_path, "--part", "train", "--only", "ragged")
    assert status == 0 and not result["failed"]
    assert [c["dtype"] for c in result["comparisons"]] == ["bf16 autocast", "fp32"]
    assert "| 3 samples, ragged lengths" in text


def test_the_budget_stops_in_time(gpu_suite, tmp_path):
    now = iter([0.0, 0, 0, 30, 30, 70, 70, 70, 70, 70]).__next__
    budget = Budget(100, now)
    assert budget.fits("a") and budget.fits("b") and not budget.fits("c") and not budget.fits("d")
    assert budget.left_out == ["c", "d"]
    _, result, text = run(gpu_suite, tmp_path, "--part", "bench", "--budget", "0", "--only", "attention/documents")
    assert not result["cases"] and len(result["left_out"]) == 2 and "Left out" in text


def test_without_a_gpu_it_says_so(gpu_suite, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_suite.main(["--part", "test"])
    assert "no GPU" in capsys.readouterr().err


def test_a_name_that_fits_nothing_is_an_error(gpu_suite, tmp_path, capsys):
    for part in ("test", "train"):
        with pytest.raises(SystemExit):
            run(gpu_suite, tmp_path, "--part", part, "--only", "unicorn")
        assert "unicorn" in capsys.readouterr().err


def test_a_wrong_peer_is_named_and_not_timed():
    def make(device):
        peers = {"right": lambda: 0, "wrong": lambda: 0}

        def check():
            if "wrong" in peers:
                raise WrongPeer("wrong", "wrong, result 0: error 1")

        return Contest(lambda: 0, peers, check)

    row = suite.run_case(Case("toy", "x", "forward", torch.float32, ("right", "wrong"), make), suite.QUICK, CPU)
    assert row["refused"] == {"wrong": "wrong: wrong, result 0: error 1"} and set(row["ratios"]) == {"right"}


def test_the_timer_reads_events_and_keeps_the_host_ahead(monkeypatch):
    slept = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    monkeypatch.setattr(clock, "CACHE", 8)
    timer = clock.Timer(CPU)
    work = lambda: time.sleep(2e-3)  # noqa: E731
    assert timer(work) == timer(work) == 3e-3
    assert slept[0] == 0 and slept[1] >= 1.5 * 2e-3 * clock.CYCLES
    assert clock.timer_of(CPU) is None


def test_the_report_says_where_the_host_is_slower():
    row = {"seconds": {"mmfast": 1e-5}, "host_seconds": {"mmfast": 5e-5}}
    assert report.host(row) == "; queued in 50 us"
    assert report.host(row | {"host_seconds": {"mmfast": 1e-6}}) == report.host({"seconds": {"mmfast": 1.0}}) == ""
    assert report.rate(6.5e14, "FLOP/s") == "650 TFLOP/s" and report.rate(4.3e12, "B/s") == "4.3 TB/s"


def test_peers_that_cannot_be_built_are_refused_when_run():
    load = cases.fusion(50, 32, 2, 16)
    function, inputs, _ = peers.BUILDERS["varlen_attn"](load, load.tensors(torch.float32))
    with pytest.raises(NotImplementedError, match="modality"):
        function(*inputs[:3])
