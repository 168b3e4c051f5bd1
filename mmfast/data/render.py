"""Pictures of any kind to RGB on white, with bounds on what a file may make this machine do."""

from __future__ import annotations

import io
import math
import re
import warnings

import numpy as np
import torch

from .install import extra

MAX_PIXELS = 1 << 24
MAX_SVG_BYTES = 1 << 24


def _on_white(image, pillow):
    """An opaque RGB copy: alpha over white, palettes and grey expanded."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rgba = image.convert("RGBA")
    white = pillow.new("RGBA", rgba.size, (255, 255, 255, 255))
    return pillow.alpha_composite(white, rgba).convert("RGB")


def _tensor(image) -> torch.Tensor:
    """A Pillow RGB image to uint8 [3, h, w]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decode(data: bytes, *, name: str = "image"):
    """Decode PNG, WebP, JPEG or GIF bytes to a Pillow RGB image composited on white.

    The size is read from the header first, so a few kilobytes that would unfold to hundreds of megabytes are refused
    before anything is decoded.

    Raises:
        ValueError: broken, or more than 16.8 megapixels.
    """
    pillow = extra("PIL.Image")
    try:
        with warnings.catch_warnings():
            # Pillow warns about large images on opening; our own bound is tighter and raises.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            image = pillow.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG", "GIF"))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"it has {width}x{height} pixels, expected at most {MAX_PIXELS}")
        image.load()
        return _on_white(image, pillow)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise ValueError(f"decode: {name} cannot be used: {error}") from error


def fit(image, max_side: int):
    """Shrink a Pillow image so that its longer side is at most `max_side`; aspect kept, never enlarged."""
    pillow = extra("PIL.Image")
    width, height = image.size
    scale = max_side / max(width, height)
    if scale >= 1:
        return image
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), pillow.Resampling.LANCZOS)


def square(image, size: int):
    """Shrink or enlarge a Pillow image to `size` x `size`, aspect kept, white added at the shorter side."""
    pillow = extra("PIL.Image")
    width, height = image.size
    side = max(width, height)
    if width != height:
        whole = pillow.new("RGB", (side, side), (255, 255, 255))
        whole.paste(image, ((side - width) // 2, (side - height) // 2))
        image = whole
    return image if side == size else image.resize((size, size), pillow.Resampling.LANCZOS)


def _svg_size(text: str) -> tuple[float, float]:
    """Width and height of an SVG in pixels, from its root's attributes or its viewBox; 1:1 where it says nothing."""
    root = re.search(r"<svg\b[^>]*>", text, re.DOTALL)
    attributes = dict(re.findall(r"""([\w:]+)\s*=\s*["']([^"']*)["']""", root.group(0))) if root else {}
    unit = {"": 1.0, "px": 1.0, "pt": 4 / 3, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0, "pc": 16.0}
    size = []
    for key in ("width", "height"):
        m = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", attributes.get(key, ""))
        size.append(float(m.group(1)) * unit[m.group(2)] if m and m.group(2) in unit else math.nan)
    if any(math.isnan(s) or s <= 0 for s in size):
        box = re.split(r"[\s,]+", attributes.get("viewBox", "").strip())
        try:
            size = [float(box[2]), float(box[3])]
        except (IndexError, ValueError):
            size = [1.0, 1.0]
    return (size[0], size[1]) if min(size) > 0 and math.isfinite(sum(size)) else (1.0, 1.0)


def render_svg(text: str, *, max_side: int, name: str = "image"):
    """Render an SVG with resvg to a Pillow RGB image on white whose longer side is `max_side`.

    Nothing outside the text is read: no linked files and no system fonts, so the result is the same on all machines.

    Raises:
        ValueError: broken, or larger than 16.8 MB of text.
    """
    resvg, pillow = extra("resvg_py"), extra("PIL.Image")
    if len(text) > MAX_SVG_BYTES:
        raise ValueError(f"render_svg: {name} has {len(text)} characters, expected at most {MAX_SVG_BYTES}")
    width, height = _svg_size(text)
    # Given both, resvg follows the width and rounds the height its own way.
    longer = {"width": max_side} if width >= height else {"height": max_side}
    try:
        png = resvg.svg_to_bytes(
            svg_string=text,
            **longer,
            background="#ffffff",
            dpi=96,  # resvg's own default makes sizes given in points zero
            skip_system_fonts=True,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"render_svg: {name} cannot be used: {error}") from error
    return fit(pillow.open(io.BytesIO(bytes(png))).convert("RGB"), max_side)


def to_tensor(image) -> torch.Tensor:
    """A Pillow RGB image to a uint8 tensor [3, h, w]."""
    return _tensor(image)
