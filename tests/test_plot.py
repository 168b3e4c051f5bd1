"""The picture of a mask shows the mask."""

import sys

import pytest
import torch

from mmfast import Layout, ModalityMask, Rule

NAMES = ("text", "image")


def _layout(lengths):
    layout = Layout.from_lengths(lengths)
    modality = (torch.arange(sum(lengths)) % 3 == 0).to(torch.uint8)
    return Layout(layout.cu_seqlens, modality=modality, names=NAMES)


@pytest.fixture
def plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from mmfast import plot

    yield plot
    pyplot.close("all")


def _cells(ax):
    return torch.as_tensor(ax.images[0].get_array())


@pytest.mark.parametrize("chosen", [None, slice(1, 4), slice(4, 0, -2)])
def test_cells_have_the_colour_of_their_rule(plot, tmp_path, chosen):
    mask = ModalityMask({("text", "text"): "causal", ("text", "image"): "full", ("image", "image"): "same"})
    layout_q, layout_k = _layout([3, 0, 5, 4, 1]), _layout([2, 6, 0, 7, 1])
    ax = plot.mask(mask, layout_q, layout_k, samples=chosen)
    rows = torch.cat([(layout_q.samples() == b).nonzero()[:, 0] for b in sorted(range(5)[chosen or slice(None)])])
    columns = torch.cat([(layout_k.samples() == b).nonzero()[:, 0] for b in sorted(range(5)[chosen or slice(None)])])
    seen = mask.visible(layout_q, layout_k)[rows][:, columns]
    same = layout_q.samples()[rows][:, None] == layout_k.samples()[columns][None]
    cells = _cells(ax)
    rgb = {name: plot._rgb(colour) for name, colour in plot.RULE_COLOURS.items()}
    for i, j in torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(columns))).tolist():
        if seen[i, j]:
            pair = (int(layout_q.modality[rows[i]]), int(layout_k.modality[columns[j]]))
            expected = rgb[{(0, 0): Rule.CAUSAL, (0, 1): Rule.FULL, (1, 1): Rule.SAME}[pair]]
        else:
            expected = plot._rgb(plot.HIDDEN) if same[i, j] else torch.ones(3)
        torch.testing.assert_close(cells[i, j].float(), expected)
    ax.figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000


def test_rows_that_do_not_exist_are_left_out(plot):
    layout = Layout.padded(3, 5, torch.tensor([2, 0, 4], dtype=torch.int32))
    assert _cells(plot.mask(None, layout)).shape == (6, 6, 3)


def test_errors(plot):
    with pytest.raises(ValueError, match="layout_q has 2 samples, layout_k 1"):
        plot.mask(None, _layout([1, 2]), _layout([3]))
    with pytest.raises(ValueError, match="no rows"):
        plot.mask(None, Layout.from_lengths([0, 0]))
    with pytest.raises(ValueError, match="too many"):
        plot.mask(None, Layout.from_lengths([5000]))


def test_says_what_to_install(monkeypatch):
    from mmfast import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install mmfast\[plot\]"):
        plot.mask(None, Layout.from_lengths([2]))
