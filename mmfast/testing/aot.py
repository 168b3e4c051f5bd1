"""Compiles every Triton kernel ahead of time, for GPUs that need not be there, and reads what the result costs.

    python -m mmfast.testing.aot [--target sm_90 ...] [--kernel attention ...] [--budget tests/aot_budget.txt] [--write]

`make aot-old` does so with the oldest Triton. Each file of `mmfast.kernels` names launches in `examples()`. They run
through Triton's own just-in-time path, with a stand-in for the GPU's driver that compiles and does not launch: types,
alignment and configurations are those of a real call.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from mmfast.testing.checkout import FOLDER, use_kernels

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MAIN = ("sm_80", "sm_90")  # the quick form compiles the quick examples for these, the first of a file for the others


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel for a target. Spills and shared memory in bytes; registers per thread.

    `lacks_wgmma`: it should use Hopper's matrix instructions there, and does not.
    """

    module: str
    kernel: str
    label: str
    target: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    lacks_wgmma: bool

    def row(self) -> str:
        return (
            f"{self.module:12} {self.kernel:26} {self.target:7} {self.label:44} {self.warps:5} {self.stages:6} "
            f"{self.registers:9} {self.spills:6} {self.shared:7}"
        )


HEADER = f"{'file':12} {'kernel':26} {'target':7} {'example':44} warps stages registers spills  shared"


class _StandIn:
    """Answers for a GPU's driver: which target to compile for."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.targets = {
            name: GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)
            for name in TARGETS
        }
        self.current = TARGETS[0]

    def get_current_device(self) -> str:
        return self.current  # Triton keeps what it compiled by device

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self):
        return self.targets[self.current]


def compile_all(targets: Iterable[str] = TARGETS, modules: Iterable[str] | None = None, quick: bool = False):
    """Yields every kernel compiled, a `Compiled` each. `quick`: fewer examples, as the tests do."""
    use_kernels()
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("aot: TRITON_INTERPRET=1 is set, so nothing is compiled; unset it")
    names = sorted(path.stem for path in FOLDER.glob("[a-z]*.py")) if modules is None else modules
    stand_in = _StandIn()
    driver.set_active(stand_in)
    run, launched = JITFunction.run, []

    def warm_up(self, *args, grid, warmup, **kwargs):
        launched.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = warm_up
    try:
        for target in targets:
            stand_in.current = target
            seen = set()
            for name in names:
                examples = importlib.import_module(f"mmfast.kernels.{name}").examples()
                if quick:
                    examples = [e for e in examples if e.quick] if target in MAIN else examples[:1]
                for example in examples:
                    launched.clear()
                    example.run()
                    for function, kernel in launched:
                        if kernel.hash not in seen:
                            seen.add(kernel.hash)
                            yield _read(name, example, target, function, kernel)
    finally:
        JITFunction.run = run


def _read(module: str, example, target: str, function, kernel) -> Compiled:
    meta, name = kernel.metadata, function.fn.__name__.lstrip("_")
    if "cubin" in kernel.asm:
        registers, spills = _usage(kernel.asm["cubin"])
    else:
        registers, spills = (
            int(re.search(rf"\.{field}:\s*(\d+)", kernel.asm["amdgcn"])[1])
            for field in ("vgpr_count", "vgpr_spill_count")
        )
        spills *= 4
    lacks_wgmma = target == "sm_90" and name in example.wgmma and "wgmma" not in kernel.asm["ptx"]
    cost = (meta.num_warps, meta.num_stages, registers, spills, meta.shared)
    return Compiled(module, name, example.label, target, *cost, lacks_wgmma)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, by the `cuobjdump` in triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


# The budget: per kernel and target what no configuration may exceed


def read_budget(path: Path) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """(file, kernel, target) -> registers, spills, shared."""
    lines = [line.split() for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {(m, k, t): tuple(map(int, numbers)) for m, k, t, *numbers in lines}


def over_budget(rows: Iterable[Compiled], budget: dict) -> Iterator[str]:
    """A sentence for each kernel that needs more than its budget, or has none."""
    for row in rows:
        limits = budget.get((row.module, row.kernel, row.target))
        if limits is None:
            yield f"{row.module}.{row.kernel} on {row.target} has no budget: add it with --write"
            continue
        for what, limit in zip(("registers", "spills", "shared"), limits):
            if getattr(row, what) > limit:
                yield (
                    f"{row.module}.{row.kernel} on {row.target} ({row.label}): {what} {getattr(row, what)}, "
                    f"budget {limit}"
                )


def write_budget(path: Path, rows: Iterable[Compiled]) -> None:
    """Raises the budget to what the rows need, registers in steps of 16, shared memory of 1 KiB."""
    budget = read_budget(path) if path.exists() else {}
    for row in rows:
        key = (row.module, row.kernel, row.target)
        registers = -(-row.registers // 16) * 16
        needed = (min(registers, 255) if row.target.startswith("sm_") else registers, row.spills)
        budget[key] = tuple(map(max, budget.get(key, (0, 0, 0)), (*needed, -(-row.shared // 1024) * 1024)))
    title = "# file kernel target, most registers, bytes spilled, bytes of shared memory"
    lines = [" ".join(map(str, (*key, *limits))) for key, limits in sorted(budget.items())]
    path.write_text("\n".join([title, *lines]) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mmfast.testing.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--kernel", nargs="+", help="files of mmfast.kernels; default all")
    parser.add_argument("--quick", action="store_true", help="fewer examples, as the tests do")
    parser.add_argument("--budget", type=Path, help="fail where a kernel exceeds this file")
    parser.add_argument("--write", action="store_true", help="raise the budget to what was found")
    args = parser.parse_args(argv)
    rows = []
    print(HEADER)
    for row in compile_all(args.target, args.kernel, args.quick):
        rows.append(row)
        print(row.row(), flush=True)
    if args.write:
        write_budget(args.budget, rows)
    problems = list(over_budget(rows, read_budget(args.budget))) if args.budget else []
    problems += [f"{r.module}.{r.kernel} on sm_90 ({r.label}): no wgmma in its PTX" for r in rows if r.lacks_wgmma]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    with torch.no_grad():
        sys.exit(main())
