"""Compiles the CUDA kernels for sm_80 and sm_90a, which needs no GPU, and holds what each costs to a budget.

    python -m mmfast.testing.cuda_budget [--write]

compiles what changed since the last build, prints every kernel, and fails where one needs more than
tests/cuda_budget.txt allows; --write rewrites that file. Shared memory is what a kernel declares: what is asked for at
the launch, ptxas does not know.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mmfast.testing.aot import Compiled, over_budget, read_budget, write_budget

ROOT = Path(__file__).resolve().parents[2]
BUDGET = ROOT / "tests/cuda_budget.txt"
ARCHS = ("sm_80", "sm_90a")

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n.*\n\s*(?P<stack>\d+) bytes stack frame.*\n"
    r".*Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)


def build() -> list[Path]:
    """Builds the module as `make test` does, or what of it changed; returns ptxas's logs.

    Raises FileNotFoundError where a compiler is missing, RuntimeError with its message where it fails.
    """
    environment = {**os.environ, "MMFAST_BUILD_CPU": "0", "MMFAST_BUILD_CUDA": "1"}
    environment["MMFAST_CUDA_ARCHS"] = ";".join(arch.removeprefix("sm_") for arch in ARCHS)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        if refusal := re.search(r"Error: mmfast: MMFAST_BUILD_CUDA=1, but (.*)", result.stderr):
            raise FileNotFoundError(refusal[1])
        raise RuntimeError(result.stdout[-4000:] + result.stderr[-4000:])
    (folder,) = ROOT.glob(f"build/temp.*{sys.implementation.cache_tag}/mmfast._cuda")
    return [folder / f"{source.stem}.o.log" for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]


def read_log(path: Path) -> Iterator[Compiled]:
    """Every kernel in the log of one file; the budget's lines are by the op, the file's first word."""
    stem = path.name.split(".")[0]
    for entry in _ENTRY.finditer(path.read_text()):
        kernel = re.search(r"\d([a-z_]+)_kernel", entry["name"])
        cost = (int(entry["registers"]), int(entry["stack"]), int(entry["shared"] or 0))
        yield Compiled(stem.split("_")[0], kernel[1], entry["name"], entry["arch"], 0, 0, *cost, False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmfast.testing.cuda_budget", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite the budget by what was found")
    args = parser.parse_args(argv)
    rows = [row for log in build() for row in read_log(log)]
    for row in rows:
        print(row.module, row.kernel, row.target, row.registers, row.spills, row.shared, row.label)
    if args.write:
        BUDGET.unlink(missing_ok=True)
        write_budget(BUDGET, rows)
    problems = list(over_budget(rows, read_budget(BUDGET)))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
