"""Stage: our train step on the stamps at native size beside the same model padded, by the benchmark for everybody."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mmfast
from mmfast.train.demo.stage import Demo, Sizes

BENCHMARK = Path("benchmarks") / "bench_train_step.py"


def run(demo: Demo) -> dict:
    """The benchmark's figures, or why there are none."""
    script = Path(mmfast.__file__).resolve().parent.parent / BENCHMARK
    if not script.is_file():
        return {"missing": f"{BENCHMARK} is not in this installation; it is in a checkout of the sources"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speed.json"
        command = [sys.executable, str(script), "--stamps", "--steps", "8", "--json", str(path)]
        if demo.sizes.pretrain_steps < Sizes.pretrain_steps:
            command.append("--quick")
        done = subprocess.run(command, cwd=script.parent.parent, capture_output=True, text=True, timeout=900)
        if done.returncode or not path.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"missing": f"{BENCHMARK} failed: {last}"}
        return {"figures": json.loads(path.read_text(encoding="utf-8"))}
