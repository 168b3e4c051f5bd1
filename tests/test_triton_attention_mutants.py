"""Tests can fail: wrong versions of the Triton attention kernels, each of which one ragged batch must notice."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys

import pytest
import torch
from test_triton_attention import check, inputs

import mmfast
from mmfast import Layout, ModalityMask
from mmfast.ops import _dispatch
from mmfast.testing.checkout import FOLDER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _dispatch.interpreted or _dispatch.no_triton is not None, reason="kernels are compiled"),
    pytest.mark.skipif(not FOLDER.exists(), reason="the kernels' sources are not beside the package"),
]

TILES, PLAN, FORWARD, BACKWARD = "_attention_tiles", "_attention_plan", "attention", "_attention_backward"
# What is wrong, the file, the right source (which occurs once), the wrong one.
MUTANTS = [
    ("CAUSAL without its diagonal", TILES, "seen & (time_k <= time_q)", "seen & (time_k < time_q)"),
    ("later for earlier", TILES, "tl.where(time_k > time_q, (word", "tl.where(time_k < time_q, (word"),
    ("earlier for same", TILES, "tl.where(time_k == time_q, 16, 0)", "0"),
    ("window one narrower", TILES, "seen & (position_k >= low)", "seen & (position_k > low)"),
    ("partial tile taken for full", PLAN, "whole = seen & (lacks == 0)", "whole = seen & (index >= 0)"),
    ("visible tile skipped", PLAN, "(nearest <= most)", "(nearest < most)"),
    ("last tile dropped", PLAN, "(rows + OTHER_BLOCK - 1) // OTHER_BLOCK", "rows // OTHER_BLOCK"),
    ("time of a tile's last row", PLAN, "tl.where(exists, t, -2147483648)", "tl.where(offsets + 1 < valid, t, 0)"),
    ("modality of its first row only", PLAN, "tl.where(exists, 1 << m, 0)", "tl.where(offsets < 1, 1 << m, 0)"),
    ("running sum not rescaled", FORWARD, "total = total * shrink + tl.sum", "total = total + tl.sum"),
    ("one head of a group forgotten", BACKWARD, "for member in range(GROUP)", "for member in range(GROUP - 1)"),
    ("no delta", BACKWARD, "tl.sum(a * b, 1)", "tl.sum(a * b, 1) * 0"),
    ("derivative of the softcap", BACKWARD, "slope = 1.0 - capped * capped", "slope = 1.0 - capped"),
]  # fmt: skip


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Binds `mmfast.kernels` to a copy whose source may be changed."""
    folder = tmp_path / "kernels"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in [n for n in sys.modules if n.startswith("mmfast.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    spec = importlib.util.spec_from_file_location(
        "mmfast.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mmfast.kernels", package)
    monkeypatch.setattr(mmfast, "kernels", package, raising=False)
    yield folder
    for name in [n for n in sys.modules if n.startswith("mmfast.kernels.")]:
        del sys.modules[name]


def batch():
    """Samples whose modalities and times change within tiles, so that every rule decides something."""
    modality = torch.zeros(112, dtype=torch.uint8)
    modality[20:45] = 1
    modality[31] = 2
    modality[63] = 2
    modality[80] = 2
    time = torch.arange(112).int() // 3
    time[31] = 60
    time[63] = 90
    return dataclasses.replace(Layout.from_lengths([64, 48]), modality=modality, time=time)


MIXED = ModalityMask({(0, 0): "causal", (0, 1): "past", (1, 1): "same", (1, 2): "full", (2, 0): "full", (2, 2): "same"})


def notice():
    layout = batch()
    check(inputs(layout, None, 2, 1), layout, None, MIXED)
    check(inputs(layout, heads=1), layout, None, ModalityMask.causal(window=(17, -1)), softcap=2.0)
    check(inputs(layout, heads=1), layout)


def test_the_right_kernels_pass(kernels):
    notice()


@pytest.mark.parametrize("what, file, right, wrong", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_wrong_kernel_is_noticed(what, file, right, wrong, kernels):
    path = kernels / f"{file}.py"
    text = path.read_text()
    assert text.count(right) == 1, f"{path.name} has {text.count(right)} times: {right}"
    path.write_text(text.replace(right, wrong))
    with pytest.raises(AssertionError):
        notice()
