"""`mmfast bench`: runs a suite and writes results.json, results.md and results.png."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def bench(suite: str, out: str, *, quick: bool, only: Sequence[str], threads: int | None) -> int:
    """Status 0, 1 where a case was wrong, or 130 where Ctrl-C or SIGTERM ended it, measured cases kept."""
    if threads:
        torch.set_num_threads(threads)
    if suite == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("bench: --suite gpu needs a GPU that torch can use; there is none, so nothing was measured")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if suite == "train":
        from mmfast.testing.train_step import suite as run

        if only:
            raise ValueError("bench: --only chooses cases of the suites cpu and gpu; the train suite has but one step")
        return run(folder, quick)
    from mmfast.testing import report
    from mmfast.testing import suite as cases

    begin = time.monotonic()
    device = "cuda" if suite == "gpu" else "cpu"
    available = None
    if suite == "gpu":
        from mmfast.testing.gpu.cases import all_cases

        available = all_cases()
    chosen = cases.choose(only, quick, available)
    effort = cases.QUICK if quick else cases.Effort()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        result = cases.run(chosen, effort, only=only, quick=quick, device=device)
    finally:
        signal.signal(signal.SIGTERM, before)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "results.md").write_text(report.markdown(result))
    wrote = [folder / "results.json", folder / "results.md"]
    try:
        from mmfast.testing.picture import draw

        draw(result, folder / "results.png")
        wrote.append(folder / "results.png")
    except ImportError:
        print("no picture: matplotlib is not installed (pip install 'mmfast[plot]')")
    for entry in result["memory"]:
        print(report.memory_line(entry))
    for text in report.scaling(result["cases"]):
        print(text)
    print("\nCeilings through the run, lowest, median and highest:")
    for name, c in result["ceilings"].items():
        print(f"  {name:32} " + "  ".join(f"{report.rate(c[k], c['unit']):>12}" for k in ("low", "median", "high")))
    for name, why in result["absent"].items():
        print(f"absent: {name}: {why}")
    print("\nWhat we lose:")
    for text in report.losses(result):
        print(f"  {text}")
    print(f"\n{time.monotonic() - begin:.0f} s; wrote {', '.join(map(str, wrote))}")
    if result["stopped"]:
        print(result["stopped"])
        return 130
    return 1 if any("failed" in row for row in [*result["cases"], *result["memory"]]) else 0
