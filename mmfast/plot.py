"""Pictures of masks. Needs matplotlib, which is optional: pip install mmfast[plot]."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import torch

from mmfast.layout import Layout
from mmfast.mask import ModalityMask, Rule, unpack_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 4096

# Rules are told apart in print and by colour-blind readers; modalities are paler, so that the two are not confused.
RULE_COLOURS = {
    Rule.FULL: "#2b6cb0",
    Rule.CAUSAL: "#2f9e8f",
    Rule.PAST: "#d9822b",
    Rule.SAME: "#9c4fb3",
}
MODALITY_COLOURS = (
    "#f2c14e", "#8fb8de", "#e58f8f", "#a8cf8e", "#c9a5d8", "#f0a868", "#7fcdc4", "#d6c7a8",
    "#b7b7d7", "#e8b6cc", "#9fb59a", "#d9a07a", "#b5d3e7", "#cfd36e", "#bfa3a3", "#9aa7b0",
)  # fmt: skip
HIDDEN = "#eceff2"
BORDER = "#1f2933"


def mask(
    mask: ModalityMask | None,
    layout_q: Layout,
    layout_k: Layout | None = None,
    *,
    samples: slice | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    legend: bool = True,
) -> Axes:
    """Draws who sees whom: a row for each query, a column for each key, coloured by the rule that lets it see.

    Grey cells are pairs of one sample that the mask hides; white cells belong to different samples. The strips on the
    margins are the rows' modalities, dark lines the borders between samples.

    Args:
        mask: None: every row of the sample.
        layout_q, layout_k: of queries and keys; layout_k defaults to layout_q.
        samples: which samples, e.g. `slice(0, 3)`; default all. At most 4096 rows and columns are drawn.
        ax: axes to draw into; None: a new figure of fitting size.
        title: default: the mask's own description.
        legend: name the colours beside the picture.

    Returns:
        the axes; `ax.figure.savefig("mask.png")` writes the picture.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: too many rows, or none, or layouts with different numbers of samples.
    """
    pyplot = _matplotlib()
    mask = ModalityMask.full() if mask is None else mask
    layout_q = layout_q.to("cpu")
    layout_k = layout_q if layout_k is None else layout_k.to("cpu")
    if layout_k.batch != layout_q.batch:
        raise ValueError(f"plot.mask: layout_q has {layout_q.batch} samples, layout_k {layout_k.batch}")
    chosen = sorted(range(layout_q.batch)[slice(None) if samples is None else samples])
    rows, columns = _Side(layout_q, chosen), _Side(layout_k, chosen)
    if max(rows.count, columns.count) > LARGEST:
        raise ValueError(
            f"plot.mask: {rows.count} rows and {columns.count} columns are too many, at most {LARGEST}; "
            "pass samples=slice(...) to draw some of the samples"
        )
    if not rows.count or not columns.count:
        raise ValueError("plot.mask: the samples have no rows or no columns to draw")
    seen = mask.visible(rows.layout, columns.layout)
    rules = torch.tensor(unpack_table(mask.table(layout_q.names, layout_k.names)))
    rule = rules[rows.modality[:, None], columns.modality[None, :]]
    same_sample = rows.sample[:, None] == columns.sample[None, :]
    picture = torch.ones(rows.count, columns.count, 3)
    picture[same_sample] = _rgb(HIDDEN)
    used = []
    for kind, colour in RULE_COLOURS.items():
        cells = seen & (rule == kind)
        picture[cells] = _rgb(colour)
        used += [kind] if bool(cells.any()) else []

    if ax is None:
        longest = max(rows.count, columns.count)
        scale = min(max(0.16 * longest, 3.5), 9.0) / longest
        size = (max(scale * columns.count, 1.6) + 2.6, max(scale * rows.count, 1.6) + 1.0)
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    strip = max(0.022 * max(rows.count, columns.count), 0.6)
    _draw(ax, picture, rows, columns, strip)
    title = repr(mask)[len("ModalityMask(") : -1] if title is None else title
    ax.set_title("\n".join(textwrap.wrap(title, 72)), fontsize=9, loc="left", color=BORDER, pad=8)
    if legend:
        _legend(ax, used, rows, columns)
    return ax


class _Side:
    """Queries or keys of the chosen samples, without rows that do not exist."""

    def __init__(self, layout: Layout, chosen: list[int]):
        sample = layout.samples()
        kept = torch.isin(sample, torch.tensor(chosen, dtype=torch.int64))
        self.sample = sample[kept]
        self.modality = layout.modalities()[kept].long()
        self.names = layout.names
        self.count = int(kept.sum())
        self.chosen = chosen
        self.counts = [int((self.sample == b).sum()) for b in chosen]
        cu_seqlens = torch.tensor([0, *self.counts]).cumsum(0).to(torch.int32)
        first = torch.tensor([int(layout.start[b]) if layout.start is not None else 0 for b in chosen])
        self.layout = Layout(
            cu_seqlens,
            modality=layout.modalities()[kept],
            time=layout.times()[kept],
            start=first.to(torch.int32),
            names=layout.names,
        )
        self.edges = cu_seqlens.tolist()

    def name(self, modality: int) -> str:
        return self.names[modality] if modality < len(self.names) else f"modality {modality}"


def _draw(ax: Axes, picture: torch.Tensor, rows: _Side, columns: _Side, strip: float) -> None:
    height, width = picture.shape[:2]
    gap = strip / 3
    ax.imshow(picture.numpy(), extent=(0, width, height, 0), interpolation="nearest", aspect="equal")
    palette = torch.stack([_rgb(c) for c in MODALITY_COLOURS])
    left = palette[rows.modality][:, None].numpy()
    top = palette[columns.modality][None].numpy()
    ax.imshow(left, extent=(-strip - gap, -gap, height, 0), interpolation="nearest", aspect="equal")
    ax.imshow(top, extent=(0, width, -gap, -strip - gap), interpolation="nearest", aspect="equal")
    if max(height, width) <= 100:
        fine = {"color": "white", "linewidth": 0.6}
        ax.hlines(range(1, height), 0, width, **fine)
        ax.vlines(range(1, width), 0, height, **fine)
        ax.hlines(range(1, height), -strip - gap, -gap, **fine)
        ax.vlines(range(1, width), -strip - gap, -gap, **fine)
    strong = {"color": BORDER, "linewidth": 1.1, "clip_on": False}
    ax.hlines(rows.edges, -strip - gap, width, **strong)
    ax.vlines(columns.edges, -strip - gap, height, **strong)
    ax.set_xlim(-strip - gap, width)
    ax.set_ylim(height, -strip - gap)
    for axis, side, place in ((ax.yaxis, rows, "left"), (ax.xaxis, columns, "top")):
        axis.set_ticks(
            [(a + b) / 2 for a, b in zip(side.edges, side.edges[1:])],
            [f"sample {b}" if n else "" for b, n in zip(side.chosen, side.counts)],
            fontsize=8,
            color=BORDER,
        )
        axis.set_ticks_position(place)
        axis.set_label_position(place)
        axis.set_tick_params(length=0, pad=2)
    for label in ax.get_yticklabels():
        label.set(rotation=90, va="center")
    ax.set_ylabel("queries", fontsize=9, color=BORDER)
    ax.set_xlabel("keys", fontsize=9, color=BORDER)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _legend(ax: Axes, used: list[Rule], rows: _Side, columns: _Side) -> None:
    from matplotlib.patches import Patch

    names = dict.fromkeys((int(m), side.name(int(m))) for side in (rows, columns) for m in side.modality.unique())
    groups = [Patch(color="none", label="modality")]
    groups += [Patch(facecolor=MODALITY_COLOURS[m], label=name) for m, name in names]
    groups += [Patch(color="none", label=""), Patch(color="none", label="visible by rule")]
    groups += [Patch(facecolor=RULE_COLOURS[kind], label=kind.name) for kind in used]
    groups += [Patch(facecolor=HIDDEN, label="hidden")]
    box = ax.legend(
        handles=groups,
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8,
        handlelength=1.1,
        handleheight=1.1,
        labelcolor=BORDER,
    )
    for text in box.get_texts():
        if text.get_text() in ("modality", "visible by rule"):
            text.set(weight="bold", x=-18)


def _rgb(colour: str) -> torch.Tensor:
    return torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _matplotlib():
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("mmfast.plot needs matplotlib, which is not installed: pip install mmfast[plot]") from error
    return pyplot
