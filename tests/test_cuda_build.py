"""The CUDA kernels compile for sm_80 and sm_90a without a warning, and each keeps to tests/cuda_budget.txt."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mmfast.testing import cuda_budget
from mmfast.testing.aot import over_budget, read_budget

LOG = """\
ptxas info    : Compiling entry function '_ZN6mmfast4cuda12_1_rows_cu_e513gather_kernelIjEEv' for 'sm_80'
ptxas info    : Function properties for _ZN6mmfast4cuda12_1_rows_cu_e513gather_kernelIjEEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 36 registers, used 0 barriers, 800 bytes cmem[0]
ptxas info    : Compile time = 5.108 ms
ptxas info    : Compiling entry function '_ZN6mmfast4cuda12keys_kernelIjEEv' for 'sm_90a'
ptxas info    : Function properties for _ZN6mmfast4cuda12keys_kernelIjEEv
    24 bytes stack frame, 40 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem
"""


@pytest.fixture(scope="module")
def logs():
    """Those of the build that `make test` made, or of one that is made here."""
    try:
        return cuda_budget.build()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_a_log_is_read_in_full(tmp_path):
    path = tmp_path / "rows_d64.o.log"
    path.write_text(LOG)
    gather, keys = cuda_budget.read_log(path)
    assert (gather.module, gather.kernel, gather.target) == ("rows", "gather", "sm_80")
    assert (gather.registers, gather.spills, gather.shared) == (36, 0, 0)
    assert (keys.kernel, keys.target, keys.registers, keys.spills, keys.shared) == ("keys", "sm_90a", 255, 24, 512)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_file_compiles_for_both_architectures_without_a_warning(logs):
    assert logs
    for log in logs:
        text, rows = log.read_text(), list(cuda_budget.read_log(log))
        assert "warning" not in text.lower(), text[-4000:]
        assert len(rows) == text.count("Compiling entry function") > 0, f"{log.name} is not understood"
        assert {row.target for row in rows} == set(cuda_budget.ARCHS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_keeps_to_its_budget(logs):
    rows, budget = [row for log in logs for row in cuda_budget.read_log(log)], read_budget(cuda_budget.BUDGET)
    assert not list(over_budget(rows, budget))
    gone = budget.keys() - {(row.module, row.kernel, row.target) for row in rows}
    assert not gone, f"no such kernels: rewrite the budget with python -m mmfast.testing.cuda_budget --write: {gone}"


def test_the_budget_allows_no_spills():
    budget = read_budget(cuda_budget.BUDGET)
    assert {target for *_, target in budget} == set(cuda_budget.ARCHS)
    assert not {key: spills for key, (_, spills, _) in budget.items() if spills}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_module_is_imported_without_a_gpu_and_info_says_why_it_cannot_run(logs):
    (module,) = cuda_budget.ROOT.glob(f"build/lib.*{sys.implementation.cache_tag}/mmfast/_cuda*.so")
    code = (
        "import importlib.util, sys, torch\n"
        f"spec = importlib.util.spec_from_file_location('mmfast._cuda', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "from mmfast import _native, info\n"
        "with _native.use_cuda(module):\n"
        "    print(module.device, info.collect()['backends']['cuda'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(cuda_budget.ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "cuda refused: built, but there is no GPU that torch can use"
