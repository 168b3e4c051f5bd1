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
import traceback
from collections import Counter
from collections.abc import Callable
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

_BROKEN = 86  # the status of a child in which no test failed but pytest itself

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
    """Runs the tests under every mutant of `ops`: its name -> the first test that failed, "" where none did.

    Without a mutant, as `{op}: unchanged, i/n`, the tests that noticed one must pass.
    """
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


class _Judge:
    """A pytest plugin that runs the collected tests once for each mutant, up to the first that fails.

    Each run is a child, which finds everything imported and collected, and whose memory nobody needs afterwards.
    """

    def __init__(self, op: str, share: str, set_mutant: Callable[[int], None]):
        first_one, step = map(int, share.split("/"))
        mutants = [(number, mutant[2]) for number, mutant in enumerate(MUTANTS, start=1) if mutant[0] == op]
        self.mutants, self.unchanged = mutants[first_one::step], f"unchanged, {share}"
        self.op, self.set_mutant = op, set_mutant
        self.found: dict[str, str] = {}
        self.noticed = Counter()  # how many mutants a test has noticed

    def pytest_runtestloop(self, session):
        cases = Counter()
        place = {}
        for item in session.items:
            name = item.nodeid.split("[")[0]
            place[item] = cases[name]
            cases[name] += 1
        for number, what in self.mutants:
            # First the tests that noticed most mutants, then a case of each, then another.
            items = sorted(session.items, key=lambda item: (-self.noticed[item.nodeid], place[item]))
            self.noticed[self.judge(session, number, what, items)] += 1
        self.judge(session, 0, self.unchanged, [item for item in session.items if self.noticed[item.nodeid]])
        return True

    def judge(self, session, number: int, what: str, items: list) -> str:
        """The first test that fails or ends the process: what writes where it should not may well do that."""
        begin = time.monotonic()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                self.set_mutant(number)
                for item, following in zip(items, [*items[1:], None]):
                    os.write(writing, f"{item.nodeid}\n".encode())
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if session.testsfailed:
                        os._exit(1)
                os._exit(0)
            except BaseException:  # of pytest: the tests' own end in a report
                traceback.print_exc()
                os._exit(_BROKEN)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            begun = pipe.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == _BROKEN:
            raise RuntimeError(f"mutants: pytest broke on the tests of {self.op} for: {what}")
        if not begun:
            raise RuntimeError(f"mutants: no test of {self.op} was run for: {what}")
        failed = self.found[f"{self.op}: {what}"] = begun[-1] if status else ""
        seconds = time.monotonic() - begin
        print(f"{self.op}: {what}: {failed or 'survived'} ({seconds:.1f} s)", file=sys.stderr, flush=True)
        return failed


def _run(share: str, ops: list[str]) -> None:
    """Every n-th mutant from the i-th on, for a share of "i/n"; then the right kernels."""
    import pytest
    import torch._dynamo  # noqa: F401  the first call of an op imports it: seconds for every child

    found = {}
    options = ["-q", "--no-header", "--no-summary", "--tb=native", "-p", "no:cacheprovider", "-m", "not slow"]
    for op in ops:
        judge = _Judge(op, share, ctypes.CDLL(_module(op)).mmfast_set_mutant)
        status = pytest.main([*options, *(f"tests/{name}" for name in TESTS[op])], plugins=[judge])
        if status:
            raise RuntimeError(f"mutants: pytest ended with status {status} on the tests of {op}")
        found |= judge.found
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
