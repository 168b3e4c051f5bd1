"""Small SVG charts and PNG pictures as text, for a report in one file."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

COLOURS = ("#2f6fde", "#e07b39", "#2a9d6f", "#a855c7", "#c83e4d", "#7a7f87")


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Mapping[str, Sequence[Sequence[float]]],
    *,
    x: str,
    y: str,
    width: int = 460,
    height: int = 240,
    zero: bool = False,
) -> str:
    """Curves: name -> [(x, y), ...], with a legend where there are several."""
    points = [(a, b) for curve in series.values() for a, b in curve if b is not None and math.isfinite(b)]
    if not points:
        return "<p>No points.</p>"
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = (0 if zero else min(p[1] for p in points)), max(p[1] for p in points)
    pad = 0.05 * (y1 - y0 or 1)
    y0, y1 = (0 if zero else y0 - pad), y1 + pad
    left, right, top, bottom = 52, 12, 12, 40
    at_x = lambda v: left + (v - x0) / ((x1 - x0) or 1) * (width - left - right)  # noqa: E731
    at_y = lambda v: height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{html.escape(y)}">']
    for v in _ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at_y(v):.1f}" y2="{at_y(v):.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{at_y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for v in _ticks(x0, x1):
        parts.append(f'<text x="{at_x(v):.1f}" y="{height - bottom + 16}" text-anchor="middle">{v:g}</text>')
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{html.escape(x)}</text>'
    )
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{html.escape(y)}</text>'
    )
    for i, curve in enumerate(series.values()):
        path = " ".join(f"{at_x(a):.1f},{at_y(b):.1f}" for a, b in curve if b is not None and math.isfinite(b))
        parts.append(f'<polyline fill="none" stroke="{COLOURS[i % 6]}" stroke-width="2" points="{path}"/>')
    parts.append("</svg>")
    return "".join(parts) + (legend(list(series)) if len(series) > 1 else "")


def legend(names: Sequence[str]) -> str:
    """Names with their colours."""
    items = (f'<span><i style="background:{COLOURS[i % 6]}"></i>{html.escape(n)}</span>' for i, n in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def bars(
    values: Mapping[str, tuple[float, float]],
    *,
    unit: str = "%",
    mark: tuple[str, float] | None = None,
    width: int = 460,
    highest: float | None = None,
) -> str:
    """Horizontal bars: name -> (value, standard error or NaN), with an optional dashed mark (name, value)."""
    row, left, right = 30, 150, 96
    height = row * len(values) + (24 if mark else 6)
    top = highest or max(
        [v + (e if math.isfinite(e) else 0) for v, e in values.values()] + [mark[1] if mark else 0, 1e-9]
    )
    at = lambda v: left + v / top * (width - left - right)  # noqa: E731
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for i, (name, (value, error)) in enumerate(values.items()):
        y = i * row + 4
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>')
        long = max(at(value) - left, 1)
        parts.append(f'<rect x="{left}" y="{y}" width="{long:.1f}" height="20" rx="3" fill="{COLOURS[i % 6]}"/>')
        text, end = f"{value:.1f}{unit}", at(value)
        if math.isfinite(error):
            text += f" ± {error:.1f}"
            end = at(value + error)
            parts.append(
                f'<line class="error" x1="{at(value - error):.1f}" x2="{end:.1f}" y1="{y + 10}" y2="{y + 10}"/>'
            )
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 15}">{text}</text>')
    if mark:
        parts.append(f'<line class="mark" x1="{at(mark[1]):.1f}" x2="{at(mark[1]):.1f}" y1="0" y2="{height - 18}"/>')
        parts.append(f'<text x="{at(mark[1]):.1f}" y="{height - 4}" text-anchor="middle">{html.escape(mark[0])}</text>')
    return "".join(parts) + "</svg>"


def pairs(before: Sequence[float], after: Sequence[float], names: tuple[str, str], *, width: int = 300) -> str:
    """One line per pair, from the value before to the value after."""
    height, left, right = 240, 70, width - 70
    low, high = min(*before, *after), max(*before, *after)
    pad = 0.15 * (high - low or 1)
    at = lambda v: 200 - (v - low + pad) / (high - low + 2 * pad) * 180  # noqa: E731
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for v in _ticks(low - pad, high + pad, 4):
        parts.append(f'<line class="grid" x1="44" x2="{width - 16}" y1="{at(v):.1f}" y2="{at(v):.1f}"/>')
        parts.append(f'<text x="38" y="{at(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for a, b in zip(before, after):
        parts.append(f'<line x1="{left}" y1="{at(a):.1f}" x2="{right}" y2="{at(b):.1f}" stroke="#7a7f87"/>')
        parts.append(f'<circle cx="{left}" cy="{at(a):.1f}" r="5" fill="{COLOURS[1]}"/>')
        parts.append(f'<circle cx="{right}" cy="{at(b):.1f}" r="5" fill="{COLOURS[0]}"/>')
    for place, name in zip((left, right), names):
        parts.append(f'<text x="{place}" y="228" text-anchor="middle">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def picture(pixels: Tensor, *, size: int = 64, title: str = "", kind: str = "") -> str:
    """A picture uint8 `[3, h, w]` as an `img` with its PNG inside."""
    from io import BytesIO

    from mmfast.data.install import extra

    file = BytesIO()
    image = extra("PIL.Image").fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text = html.escape(title, quote=True)
    return f'<img class="{kind}" width="{size}" src="data:image/png;base64,{data}" alt="{text}" title="{text}">'


def heat(pixels: Tensor, weights: Tensor) -> Tensor:
    """A picture with weights `[rows, columns]` laid over it in red, smoothly; both uint8 `[3, h, w]`."""
    h, w = pixels.shape[1:]
    spread = torch.nn.functional.interpolate(weights[None, None].float(), (h, w), mode="bicubic")[0, 0]
    spread = ((spread - spread.min()) / (spread.max() - spread.min() + 1e-9)).clamp(0, 1)
    grey = pixels.float().mean(0, keepdim=True).expand(3, h, w)
    red = torch.tensor([220.0, 30.0, 40.0])[:, None, None]
    share = 0.75 * spread
    return ((1 - share) * (0.5 * grey + 0.5 * pixels) + share * red).round().clamp(0, 255).byte()
