"""Mutants of the compiled kernels: small wrong versions of the C++ sources, which the tests of each op must notice.

    python tests/mutants.py [op ...]

All mutants are compiled into one module and chosen at run time by a number (mutant schemata: Untch, Offutt, Harrold,
Mutation analysis using mutant schemata, ISSTA 1993). mutants.txt lists them; the piece of source that each quotes must
occur once in its file. CUDA's kernels are compiled for the CPU (cuda_shim). Each mutant runs in a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TESTS = {
    "attention": ("test_attention_masks.py", "test_attention_few_queries.py", "test_attention.py"),
    "rotary": ("test_rotary.py",),
    "packing": ("test_packing.py", "test_packing_rows.py", "test_packing_errors.py"),
    "perturbation": ("test_perturbation.py",),
    "contrastive": ("test_contrastive.py",),
    "cuda_packing": ("test_cuda_packing.py",),
    "cuda_attention": ("test_cuda_attention.py",),
    "cuda_perturbation": ("test_cuda_perturbation.py",),
}

_SPOT = re.compile(r"\{\{(.*?) => (.*?)\}\}", re.DOTALL)


def read_mutants() -> list[tuple[str, str, str, str]]:
    """(op whose tests must notice, file below csrc, what is wrong, source with `{{right => wrong}}`) of each mutant."""
    mutants = []
    op = file = ""
    for line in (Path(__file__).parent / "mutants.txt").read_text().splitlines():
        if line.startswith("== "):
            op, file = line[3:].split(": ")
        elif line.startswith("    "):
            *head, piece = mutants[-1]
            mutants[-1] = (*head, f"{piece}\n{line[4:]}" if piece else line[4:])
        elif line and not line.startswith("#"):
            mutants.append((op, file, line, ""))
    return mutants


MUTANTS = read_mutants()


def instrument(sources: Path) -> None:
    """Rewrites the copy of csrc at `sources`: each spot of mutant i becomes `mmfast_mutant == i ? wrong : right`."""
    texts: dict[str, str] = {}
    for number, (_, name, what, piece) in enumerate(MUTANTS, start=1):
        text = texts.setdefault(name, (sources / name).read_text())
        right = _SPOT.sub(lambda spot: spot[1], piece)
        if text.count(right) != 1:
            raise ValueError(f"mutants: {name}, {what}: the source has {text.count(right)} times, expected 1: {right}")
        choice = _SPOT.sub(lambda spot, n=number: f"(mmfast_mutant == {n} ? ({spot[2]}) : ({spot[1]}))", piece)
        texts[name] = text.replace(right, choice)
    for name, text in texts.items():
        (sources / name).write_text(text)
    (sources / "mutant.h").write_text("inline int mmfast_mutant = 0;\n")
    for folder in ("bindings", "bindings/cuda"):
        (sources / folder / "mutant.cpp").write_text(
            'extern "C" __attribute__((visibility("default"))) void mmfast_set_mutant(int i) { mmfast_mutant = i; }\n'
        )


def build(folder: Path) -> Path:
    """Builds the package with all mutants, for the portable instruction set only; returns what to put on the path."""
    tree = folder / "tree"
    for name in ("csrc", "mmfast", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "_c*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    instrument(tree / "csrc")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=_environment(tree), check=True)
    return tree


def _environment(tree: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "MMFAST_PORTABLE": "1",
        "MMFAST_BUILD_CUDA": "0",
        "MMFAST_CXXFLAGS": f"-O1 -Wno-parentheses -include {tree / 'csrc/mutant.h'}",
    }


def _module(op: str) -> str:
    """The file of the module that has the op's kernels."""
    from mmfast import _native

    if op.startswith("cuda_"):
        import cuda_shim

        return str(cuda_shim.build())
    return _native.cpu().__file__


def verdicts(tree: Path, ops: list[str]) -> dict[str, str]:
    """Runs the tests under every mutant of `ops`: its name -> the first test that failed, "" where none did."""
    workers = min(os.cpu_count() or 1, 4)
    runs = []
    for worker in range(workers):
        command = [sys.executable, str(tree / "tests/mutants.py"), "--run", f"{worker}/{workers}", *ops]
        runs.append(subprocess.Popen(command, cwd=tree, env=_environment(tree), stdout=subprocess.PIPE, text=True))
    found = {}
    for run in runs:
        output, _ = run.communicate()
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if run.returncode or not lines:
            raise RuntimeError(f"mutants: the run failed\n{output[-4000:]}")
        found |= json.loads(lines[-1])
    return found


class _LikelyFirst:
    """Runs first the tests that noticed most mutants, then a case of each, then another; keeps the first that fails."""

    def __init__(self, noticed: Counter):
        self.noticed, self.failed = noticed, ""

    def pytest_collection_modifyitems(self, items):
        cases = Counter()
        place = {}
        for item in items:
            place[item] = cases[item.nodeid.split("[")[0]]
            cases[item.nodeid.split("[")[0]] += 1
        items.sort(key=lambda item: (-self.noticed[item.nodeid], place[item]))

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid


def _first_failure(op: str, set_mutant, number: int, noticed: Counter) -> str:
    """The first test that fails; or how the process ended: what writes where it should not may well end it.

    In a child, whose memory nobody needs afterwards, with everything imported already.
    """
    import pytest

    options = ["-x", "-q", "--no-header", "--no-summary", "--tb=native", "-p", "no:cacheprovider", "-m", "not slow"]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        set_mutant(number)
        first = _LikelyFirst(noticed)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            pytest.main([*options, *(f"tests/{name}" for name in TESTS[op])], plugins=[first])
        os.write(writing, first.failed.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        failed = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        return f"the process ended with {status}"
    noticed[failed] += 1
    return failed


def _run(share: str, ops: list[str]) -> None:
    """Every n-th mutant from the i-th on, for a share of "i/n"."""
    import torch._dynamo  # noqa: F401  the first call of an op imports it: seconds for every child

    found = {}
    first_one, step = map(int, share.split("/"))
    for op in ops:
        set_mutant = ctypes.CDLL(_module(op)).mmfast_set_mutant
        chosen = [(0, "unchanged")] + [(i, m[2]) for i, m in enumerate(MUTANTS, start=1) if m[0] == op]
        noticed = Counter()
        for number, what in chosen[first_one::step]:
            begin = time.monotonic()
            found[f"{op}: {what}"] = failed = _first_failure(op, set_mutant, number, noticed)
            seconds = time.monotonic() - begin
            print(f"{op}: {what}: {failed or 'survived'} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    print("\n" + json.dumps(found))


def main(arguments: list[str]) -> None:
    import tempfile

    if arguments[:1] == ["--run"]:
        return _run(arguments[1], arguments[2:])
    with tempfile.TemporaryDirectory() as folder:
        for name, test in verdicts(build(Path(folder)), arguments or list(TESTS)).items():
            print(f"{name:60} {test or 'SURVIVED'}")


if __name__ == "__main__":
    main(sys.argv[1:])
