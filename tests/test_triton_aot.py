"""Every Triton kernel compiles ahead of time, spills nothing on the tuned targets and keeps to its budget."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmfast.ops import _dispatch
from mmfast.testing import aot

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "tests/aot_budget.txt"
OLD_BUDGET = ROOT / "tests/aot_budget_triton_3.6.txt"  # of `make aot-old`
DROPOUT_ON_AMD = ("attention", "backward_dkdv", "gfx942")

ROW = aot.Compiled("attention", "forward", "bf16 D128", "sm_90", 8, 3, 200, 0, 1000, False)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(_dispatch.no_triton is not None, reason=str(_dispatch.no_triton))
def test_all_kernels_compile_within_their_budget():
    """In two processes, since interpreted kernels (this one's) cannot be compiled."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "mmfast.testing.aot", "--quick", "--budget", str(BUDGET), "--target"]
    runs = [
        subprocess.Popen(
            [*command, *targets], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for targets in (("sm_80", "gfx942"), ("sm_90", "sm_100"))
    ]
    for run in runs:
        out, err = run.communicate()
        assert run.returncode == 0, err[-3000:]
        assert len(out.splitlines()) > 5, out


def test_the_budgets_allow_no_spills_but_these():
    budget = aot.read_budget(BUDGET)
    assert budget and {target for *_, target in budget} == set(aot.TARGETS)
    assert {key: spills for key, (_, spills, _) in budget.items() if spills} == {DROPOUT_ON_AMD: 64}
    # Ten registers of masks with several rules: a tile without a spill would be half as large with every Triton.
    old = aot.read_budget(OLD_BUDGET)
    assert {key: spills for key, (_, spills, _) in old.items() if spills} == {
        ("attention", "backward_dkdv", "sm_90"): 40
    }


def test_both_budgets_name_the_same_kernels():
    new, old = ({key for key in aot.read_budget(path) if key[2] in aot.MAIN} for path in (BUDGET, OLD_BUDGET))
    assert new == old


def test_what_exceeds_the_budget_is_named(tmp_path):
    path = tmp_path / "budget.txt"
    aot.write_budget(path, [ROW])
    budget = aot.read_budget(path)
    assert budget == {("attention", "forward", "sm_90"): (208, 0, 1024)}
    assert not list(aot.over_budget([ROW], budget))
    (sentence,) = aot.over_budget([replace(ROW, spills=8)], budget)
    assert "spills 8, budget 0" in sentence and "bf16 D128" in sentence
    (sentence,) = aot.over_budget([replace(ROW, target="sm_80")], budget)
    assert "has no budget" in sentence
    aot.write_budget(path, [replace(ROW, registers=253, shared=10)])
    assert aot.read_budget(path) == {("attention", "forward", "sm_90"): (255, 0, 1024)}


def test_every_kernel_file_has_examples():
    for path in aot.FOLDER.glob("[a-z]*.py"):
        assert "def examples()" in path.read_text(), f"{path.name} names no examples"
