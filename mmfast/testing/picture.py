"""The picture of `mmfast bench`: bars per workload beside the best peer and the ceiling, and the scaling curve."""

from __future__ import annotations

from pathlib import Path

from mmfast.testing.report import curves

COLOURS = {"fp32": ("#2b6cb0", "#8fb8de"), "bf16": ("#d9822b", "#f2c58b")}  # forward or step; with or only backward


def draw(result: dict, path: Path) -> None:
    """Writes the picture. Raises ImportError where matplotlib is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["cases"] if "failed" not in row and row["ratios"]]
    curve = curves(rows)
    labels = list(dict.fromkeys(_label(row) for row in rows))
    figure = Figure(figsize=(13, 1.5 + 0.42 * len(labels) + (3 if curve else 0)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 if curve else 1, 2, height_ratios=[0.42 * len(labels) + 1, 3] if curve else None)
    ratios, shares = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    kinds = sorted({(row["dtype"], row["measured"] in ("forward", "step")) for row in rows}, reverse=True)
    height = 0.8 / max(1, len(kinds))
    for i, (dtype, first) in enumerate(kinds):
        mine = [row for row in rows if (row["dtype"], row["measured"] in ("forward", "step")) == (dtype, first)]
        at = [labels.index(_label(row)) + height * (i - (len(kinds) - 1) / 2) for row in mine]
        style = {"height": height, "color": COLOURS[dtype][0 if first else 1]}
        name = f"{dtype} {'forward or step' if first else 'with or only backward'}"
        ratios.barh(at, [row["best_ratio"] for row in mine], label=name, **style)
        shares.barh(at, [100 * row.get("share", 0) for row in mine], **style)
    for axis, title in (
        (ratios, "times as long the best peer takes (left of the line: mmfast loses)"),
        (shares, "% of the ceiling measured beside it"),
    ):
        axis.set_yticks(range(len(labels)), labels if axis is ratios else [""] * len(labels), fontsize=8)
        axis.set_ylim(max(len(labels), 1) - 0.5, -0.5)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    ratios.set_xscale("log", base=2)
    ratios.xaxis.set_major_formatter("{x:g}x")
    ratios.axvline(1, color="#1f2933", linewidth=1.5)
    shares.set_xlim(0, 110)
    figure.legend(*ratios.get_legend_handles_labels(), loc="outside upper center", ncols=max(1, len(kinds)), fontsize=9)
    if curve:
        axis = figure.add_subplot(grid[1, :])
        for dtype, points in curve.items():
            names = [workload.split(", ")[-1] for workload, _ in points]
            axis.plot(names, [1e12 * t for _, t in points], "o-", color=COLOURS[dtype][0], label=dtype)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("ps per visible cell")
        axis.set_title("packed causal documents, forward + backward", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def _label(row: dict) -> str:
    return f"{row['op']}: {row['workload']}"
