"""Everything that only a GPU can tell, in parts of eight minutes, from a checkout without a build:

    PYTHONPATH=. python benchmarks/gpu_suite.py --part test  --out DIR   # tests, oracle, same bits, no waiting, graphs
    PYTHONPATH=. python benchmarks/gpu_suite.py --part bench --out DIR   # every op beside its peers and the ceilings
    PYTHONPATH=. python benchmarks/gpu_suite.py --part train --out DIR   # a whole train step beside padded PyTorch

Each part writes DIR/<part>.json and DIR/<part>.md; finished rows go to DIR/<part>.jsonl at once, so that a run that is
killed leaves what it found. What did not fit into the budget is named at the end. The CUDA kernels are checked and
timed beside the Triton kernels where they were built (`python setup.py build_ext --inplace`, with nvcc).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from mmfast.testing import machine, report, suite, train_step
from mmfast.testing.checkout import use_kernels
from mmfast.testing.gpu import cases, checks, peers
from mmfast.testing.gpu.budget import Budget
from mmfast.testing.gpu.probes import probes

ROOT = Path(__file__).resolve().parents[1]
EFFORT = suite.Effort(0.8, (7, 31))
PYTEST = "pytest"
WORDS = "(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
OUTCOMES = (  # a line of pytest -vv: by a worker, and without workers
    re.compile(rf"\[gw\d+\] \[ *\d+%\] {WORDS} (?P<name>tests/.*\S)"),
    re.compile(rf"(?P<name>tests/.*\S) {WORDS}( \(.*\))? *(\[ *\d+%\])?$"),
)


def said(row: dict) -> str:
    return f"{row['seconds']:6.1f} s  {row['name']}: {row['result']}"


def fits_only(name: str, only: Sequence[str]) -> bool:
    return not only or any(part.lower() in name.lower() for part in only)


# test


def start_tests(log: Path) -> subprocess.Popen:
    """The project's tests, those of the GPU kernels first, beside the checks: compiling is the processor's work."""
    files = sorted(
        (ROOT / "tests").glob("test_*.py"), key=lambda path: (not re.search("triton|cuda", path.name), path.name)
    )
    workers = ["-n", str(max(1, (os.cpu_count() or 2) - 4))] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *workers, *map(str, files)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}  # a run that is stopped leaves its last line too
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)


def finish_tests(process: subprocess.Popen, log: Path, seconds: float) -> dict:
    """Waits no longer than `seconds`; counts, and the names of what failed, also where it was stopped."""
    try:
        process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        process.kill()  # its workers end with it
        process.wait()
        stopped = True
    else:
        stopped = False
    return outcomes(log.read_text(errors="replace")) | {"stopped": stopped, "status": process.returncode}


def outcomes(log: str) -> dict:
    """How many tests passed, failed ..., from pytest's verbose lines, with and without workers."""
    found = {}
    for line in log.splitlines():
        if match := OUTCOMES[line.startswith("tests/")].match(line):
            found[match["name"]] = match["outcome"]
    names = list(found.values())
    bad = sorted(name for name, outcome in found.items() if outcome in ("FAILED", "ERROR"))
    return {"counts": {outcome: names.count(outcome) for outcome in sorted(set(names))}, "failed": bad}


def plan(device: torch.device, small: bool) -> list[tuple[str, Callable[[], None]]]:
    """Name and work of every check; what tells most comes first."""
    interpreted = device.type == "cpu"
    first = torch.float16 if interpreted else torch.bfloat16
    found = []
    for dtype in dict.fromkeys((first, torch.float16, torch.float32)):
        for name, build in probes(device, small).items():
            for backend in ("triton", "cuda") if cases.has_cuda(name, dtype, device) else ("triton",):
                kernels = "CUDA C++, " if backend == "cuda" else ""
                for check, run in checks.CHECKS.items():
                    if check == "oracle" or dtype == first:
                        label = f"{check}: {name}, {kernels}{str(dtype).removeprefix('torch.')}"
                        found.append((label, partial(_checked, build, run, backend, dtype)))
    return found


def _checked(build, run, backend, dtype) -> None:
    run(build(), backend, dtype)


def part_test(out: Path, budget: Budget, only: Sequence[str], device: torch.device, small: bool) -> dict:
    tests = start_tests(out / "pytest.log") if fits_only(PYTEST, only) else None
    rows = []
    for name, run in plan(device, small):
        if not fits_only(name, only) or not budget.fits(name):
            continue
        begin = time.monotonic()
        try:
            run()
            result = "passed"
        except Exception as error:
            result = f"FAILED: {suite.refusal(error)}"
        rows.append({"name": name, "seconds": time.monotonic() - begin, "result": result})
        _keep(out / "test.jsonl", rows[-1])
        print(said(rows[-1]), flush=True)
    result = {"checks": rows}
    if tests:
        result["pytest"] = finish_tests(tests, out / "pytest.log", budget.left())
        print("pytest:", json.dumps(result["pytest"]["counts"]), flush=True)
    return result


def test_markdown(result: dict) -> str:
    """A table of the checks: ops down, checks across, failures in full below."""
    cells: dict[str, dict[str, str]] = {}
    for row in result["checks"]:
        check, op = row["name"].split(": ", 1)
        cells.setdefault(op, {})[check] = "passed" if row["result"] == "passed" else "**failed**"
    lines = [f"| op, dtype | {' | '.join(checks.CHECKS)} |", "| --- " * (len(checks.CHECKS) + 1) + "|"]
    lines += [f"| {op} | {' | '.join(found.get(c, '') for c in checks.CHECKS)} |" for op, found in cells.items()]
    bad = [f"- {row['name']}: {row['result']}" for row in result["checks"] if row["result"] != "passed"]
    lines += ["", *bad] * bool(bad)
    if tests := result.get("pytest"):
        counts = ", ".join(f"{n} {outcome.lower()}" for outcome, n in tests["counts"].items())
        lines += ["", f"pytest{', stopped by the budget' if tests['stopped'] else ''}: {counts}."]
        lines += [f"- failed: {name}" for name in tests["failed"]]
    return "\n".join(lines) + "\n"


# bench


def part_bench(out: Path, budget: Budget, only: Sequence[str], device: torch.device, small: bool) -> dict:
    chosen = suite.choose(only, available=cases.all_cases(small))
    keep = partial(_keep, out / "bench.jsonl")
    effort = suite.Effort(0.0, (2, 2)) if small else EFFORT
    result = suite.run(chosen, effort, only=only, device=device, fits=budget.fits, keep=keep)
    result["absent"] |= peers.absent()
    return result


# train


def part_train(out: Path, budget: Budget, only: Sequence[str], device: torch.device, small: bool) -> dict:
    torch.backends.cudnn.allow_tf32 = False  # the losses of all ways must agree in float32 first
    samples, rounds, steps = (3, 1, 2) if small else (128, 5, 6)
    learner = train_step.Learner if small else partial(train_step.Learner, 768, 12, (64, 128, 256, 768))
    comparisons, failed = [], []
    for lengths in train_step.LENGTHS[:2]:
        name = f"train step, {lengths} lengths"
        if not fits_only(name, only) or not budget.fits(name):
            continue
        options = {"samples": samples, "rounds": rounds, "steps": steps, "device": device, "learner": learner}
        try:
            # Ten times the CPU's tolerance: packed and padded products sum in orders that differ more on a GPU.
            found = train_step.run(lengths, bf16=(True, False), tolerance=1e-4, **options)
        except Exception as error:
            failed.append(f"{name}: {suite.refusal(error)}")
            print(failed[-1], flush=True)
            continue
        for comparison in found:
            comparisons.append(comparison)
            _keep(out / "train.jsonl", comparison)
            print(train_step.show(comparison), flush=True)
    return {"comparisons": comparisons, "failed": failed}


def train_markdown(result: dict) -> str:
    table = train_step.markdown(result["comparisons"]) if result["comparisons"] else ""
    return table + "".join(f"\n- **failed** {line}\n" for line in result["failed"])


TRAINED = ("comparisons", "failed")
PARTS = {
    "test": (part_test, test_markdown),
    "bench": (part_bench, report.markdown),
    "train": (part_train, train_markdown),
}


def _keep(path: Path, row: dict) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def went_wrong(result: dict) -> bool:
    bad_checks = any(row["result"] != "passed" for row in result.get("checks", ()))
    bad_cases = any("failed" in row for row in result.get("cases", ()))
    tests = result.get("pytest", {"failed": [], "stopped": True})
    bad_tests = bool(tests["failed"]) or (not tests["stopped"] and tests["status"] != 0)
    return bad_checks or bad_cases or bad_tests or bool(result.get("failed"))


def main(argv: Sequence[str] | None = None, *, device: str = "cuda", small: bool = False) -> int:
    """Status 1 where something is wrong. `device` and `small` are for the test of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="(default 480)")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="what has this in its name")
    parser.add_argument("--out", default="runs/gpu", metavar="DIR", help="(default runs/gpu)")
    args = parser.parse_args(argv)
    budget = Budget(args.budget)
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; nothing was run")
    use_kernels()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{args.part}.jsonl").unlink(missing_ok=True)
    run, markdown = PARTS[args.part]
    command = ["python benchmarks/gpu_suite.py", "--part", args.part, *(["--only", *args.only] if args.only else [])]
    result = machine.describe() | run(out, budget, args.only, torch.device(device), small)
    if args.only and not budget.left_out and not any(result.get(k) for k in ("checks", "cases", "pytest", *TRAINED)):
        parser.error(f"--only {' '.join(args.only)} is part of no name; nothing was run")
    result |= {"part": args.part, "budget": args.budget, "command": " ".join(command), "left_out": budget.left_out}
    result["versions"] |= {
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "cuda": torch.version.cuda,
    }
    result["took"] = args.budget - budget.left()
    (out / f"{args.part}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    if args.part != "bench":  # whose table says it
        versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "triton"))
        text = f"{result['machine'].get('gpu', device)}; {versions}; `{result['command']}`\n\n{text}"
    if budget.left_out:
        text += f"\nLeft out, for want of time: {'; '.join(budget.left_out)}.\n"
    (out / f"{args.part}.md").write_text(text)
    print(f"\n{text}\n{result['took']:.0f} s; wrote {out / args.part}.json and .md")
    return int(went_wrong(result))


if __name__ == "__main__":
    sys.exit(main())
