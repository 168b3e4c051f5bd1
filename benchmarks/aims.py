"""Which of the project's aims for a two-core CPU a run of `mmfast bench` misses.

python benchmarks/aims.py runs/bench/results.json
"""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path

# Cases by name; times as long as a peer ("best": the best peer) must take, or share of the ceiling ("ceiling").
AIMS = [
    # cases, against, fp32, bf16
    ("*", "best", 1.0, 1.0),
    ("attention/dense*/forward/*", "SDPA", 1.25, 2.3),
    ("attention/causal 8x12x512x64/forward/*", "SDPA", 2.2, 4.5),
    ("attention/causal 4x8x1024x128/forward/*", "SDPA", 1.7, 3.0),
    ("attention/[dc]*/forward+backward/*", "SDPA", 1.25, 1.7),
    ("attention/dense*", "ceiling", 0.85, 0.75),
    ("attention/ragged cross-attention*", "SDPA loop", 1.6, 3.0),
    ("attention/ragged cross-attention*", "SDPA padded", 4.0, 6.0),
    ("attention/early fusion*", "SDPA loop", 2.0, 3.0),
    ("attention/early fusion*", "SDPA padded", 6.0, 8.0),
    ("attention/Q-Former, 32 queries onto 257/*", "SDPA", 2.0, 4.0),
    ("attention/Q-Former, 32 queries onto 1024/*", "SDPA", 1.6, 3.0),
    ("attention/Flamingo*", "SDPA padded", 4.0, 6.0),
    ("attention/256 samples*", "best", 1.5, 1.5),
    ("attention/one sample of 8192*", "best", 1.3, 1.5),
    ("pack/*", "torch chain", 3.0, 3.0),
    ("pack/*", "ceiling", 0.85, 0.85),
    ("unpack/*", "ceiling", 0.85, 0.85),
    ("rotary/*", "rotate_half", 3.0, 3.0),
    ("rotary/*", "ceiling", 0.85, 0.85),
    ("perturb/*64x3x224x224*", "ceiling", 0.85, 0.85),
    ("perturb/*64x3x224x224, new pages/*", "functional", 20.0, 20.0),
    ("perturb/*64x3x224x224, new pages/*", "in place", 3.0, 3.0),
    ("perturb/*64x3x224x224, new pages/*", "torch.compile", 3.0, 3.0),
    ("perturb/*in cache*", "in place", 2.0, 2.0),
    ("contrastive/*4096x512*", "eager", 1.7, 2.6),
    ("call/*", "SDPA", 0.5, 0.5),
]
NOT_BEST = ("call/*",)  # the aim for the best peer is another one
PEAK = 2**30  # bytes of the process that takes InfoNCE of 65,536 pairs through forward and backward
CELL = 0.15  # by which time per visited cell may differ between 1k and 64k tokens


def reached(row: dict, against: str) -> float | None:
    if against == "ceiling":
        return row.get("share")
    return row["best_ratio"] if against == "best" else row["ratios"].get(against)


def missed(result: dict) -> list[str]:
    """One line for each aim that is missed, the farthest first."""
    from mmfast.testing.report import curves

    found = []
    for row in result["cases"]:
        if "failed" in row:
            found.append((0.0, f"{row['name']}: wrong: {row['failed']}"))
            continue
        for cases, against, fp32, bf16 in AIMS:
            aim, value = fp32 if row["dtype"] == "fp32" else bf16, reached(row, against)
            other = against == "best" and any(fnmatchcase(row["name"], name) for name in NOT_BEST)
            if fnmatchcase(row["name"], cases) and not other and value is not None and value < aim:
                found.append((value / aim, f"{row['name']}: {value:.2f} of {aim:.2f} ({against})"))
    for dtype, curve in curves(result["cases"]).items():
        times = [t for _, t in curve]
        spread = max(times) / min(times) - 1
        if spread > CELL:
            found.append((CELL / spread, f"time per visited cell, {dtype}: differs by {spread:.0%}, aim {CELL:.0%}"))
    for row in result["memory"]:
        if row["name"].startswith("InfoNCE") and row.get("peak", 2 * PEAK) > PEAK:
            found.append((0.5, f"peak memory of {row['name']}: more than 1 GiB"))
    return [text for _, text in sorted(found)]


if __name__ == "__main__":
    lines = missed(json.loads(Path(sys.argv[1]).read_text()))
    print(*(lines or ["every aim is reached"]), sep="\n")
