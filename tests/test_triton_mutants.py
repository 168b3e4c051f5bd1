"""Wrong versions of the Triton kernels, each of which the comparison with the oracle must notice."""

import importlib.util
import sys

import pytest
import torch
from test_packing import batch
from test_perturbation import CASES, make, options
from test_rotary import layout_of, tensors
from test_triton_contrastive import check as check_contrastive
from test_triton_contrastive import features, on_device
from test_triton_packing import check as check_packing
from test_triton_perturbation import check as check_perturbation
from test_triton_rotary import check as check_rotary
from triton_cases import DEVICE, needs_triton

from mmfast import Layout
from mmfast.testing.checkout import FOLDER

pytestmark = [needs_triton, pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter is enough")]


def rotary():
    ends, used = torch.tensor([1, 6, 6, 20], dtype=torch.int32), torch.tensor([3, 0, 14], dtype=torch.int32)
    layout = Layout(ends, seqused=used, start=torch.tensor([4, 0, 9], dtype=torch.int32))
    check_rotary(tensors(21, 21, 12, norm=True), [layout], interleaved=True)
    check_rotary(tensors(14, 14, 12, norm=True), [layout_of([5, 0, 9], axes=3)])


def packing():
    parts, kwargs = batch(torch.float32, 12, lengths=[[40], [9], [3]])
    place = torch.stack([torch.arange(40) // 22, torch.arange(40) % 3], 1).to(torch.int32)
    parts["image"] = parts["image"]._replace(positions=place)
    check_packing(parts, kwargs)


def perturbation(norm, shape=(2, 9), **more):
    check_perturbation(make(shape, torch.float32, CASES[-1]), options(CASES[-1], norm=norm, **more))


def attack():
    perturbation("linf", eps=0.5, step_size=0.2)
    perturbation("l2", eps=0.5, step_size=0.3)
    perturbation("l2", (9, 5), eps=0.5, step_size=0.3, layout=Layout.from_lengths([4, 5]))


def contrastive():
    x, y, ids = on_device(*features(100, 20))
    for kind in ("infonce", "sigmoid"):
        check_contrastive(x, y, ids, kind)


MUTANTS = [
    (rotary, "_samples", "other=0) <= row", "other=0) < row"),
    (rotary, "_samples", "(place < tl.load(seqused", "(place <= tl.load(seqused"),
    (rotary, "rotary", "place += tl.load(start", "place -= tl.load(start"),
    (rotary, "rotary", "(j >= SECTION_0 + SECTION_1)", "(j > SECTION_0 + SECTION_1)"),
    (rotary, "rotary", "y2 = g2 * cosine - g1 * sine", "y2 = g2 * cosine + g1 * sine"),
    (rotary, "rotary", "y2 = (y2 - x2 * mean) * rstd", "y2 = y2 * rstd"),
    (rotary, "rotary", "dw1 += y1 * x1", "dw1 = y1 * x1"),
    (packing, "_packing_runs", "slot = chunk * 2 + (from_before == 0)", "slot = chunk * 2 + (from_before != 0)"),
    (packing, "_packing_runs", "if (after != mine) | (i + 1 == end)", "if after != mine"),
    (packing, "_packing_runs", "at = chunk + 1\n", "at = chunk + 2\n"),
    (packing, "packing", "d -= (tl.sum(d, 1) / D)[:, None]", "d -= 0.0"),
    (packing, "packing", "position + row * axes + table_axis[i]", "position + row * axes"),
    (packing, "packing", "y = tl.where(mask, y - center[:, None], 0.0)", "y = y - center[:, None]"),
    (attack, "perturbation", "+ length * length", "+ length"),
    (attack, "perturbation", "blend * (v - d) + (1 - blend)", "blend * (v - d) + blend"),
    (attack, "perturbation", "decay * tl.load(target", "tl.load(target"),
    (attack, "_perturbation_tiles", "end = tl.load(cu + 1)", "end = 1 + tl.load(cu)"),
    (attack, "_perturbation_tiles", "v = tl.where(v < low, low, v)", "v = tl.where(v < low, v, v)"),
    (contrastive, "contrastive", "first_column + i * 0 > column_begin", "first_column + i * 0 > column_begin + 64"),
    (contrastive, "contrastive", "counts & (positive | (own", "counts & ((own"),
    (contrastive, "contrastive", "tl.where(positive, -g, g)", "g"),
    (contrastive, "contrastive", "g += tl.where(positive, own[:, None], 0.0)", "g += 0.0"),
    (contrastive, "contrastive", "place = tl.minimum(at + k, depth - 1)", "place = tl.minimum(at + k, depth - 2)"),
]


@pytest.fixture
def small_pieces(monkeypatch):
    """So that few rows make several chunks of every kind."""
    from mmfast.kernels import contrastive, packing
    from mmfast.kernels import rotary as turning

    monkeypatch.setattr(turning, "_PROGRAMS", 1)
    monkeypatch.setattr(packing, "_CHUNKS", 4)
    monkeypatch.setattr(contrastive, "PARTS", 1)


def test_the_right_kernels_pass(small_pieces):
    for case in (rotary, packing, attack, contrastive):
        case()


@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=lambda i: f"{MUTANTS[i][1]}-{i}")
def test_a_wrong_kernel_is_noticed(number, monkeypatch, tmp_path):
    case, name, right, wrong = MUTANTS[number]
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert right in source, f"the mutant's place is gone: {right}"
    # The op's own file sees the mutated one under its name.
    op = {rotary: "rotary", packing: "packing", attack: "perturbation", contrastive: "contrastive"}[case]
    for module in dict.fromkeys((name, op)):
        text = (FOLDER / f"{module}.py").read_text(encoding="utf-8")
        path = tmp_path / f"{module}.py"
        path.write_text(text.replace(right, wrong) if module == name else text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"mmfast.kernels.{module}", path)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"mmfast.kernels.{module}", loaded)
        monkeypatch.setattr(f"mmfast.kernels.{module}", loaded)
        spec.loader.exec_module(loaded)
    for attribute, value in (("_CHUNKS", 4), ("PARTS", 1), ("_PROGRAMS", 1)):
        if hasattr(loaded, attribute):
            monkeypatch.setattr(loaded, attribute, value)
    with pytest.raises(AssertionError):
        case()
