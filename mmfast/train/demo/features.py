"""Stage, optional: frozen EfficientNet-lite0 and MiniLM features of the stamps, and a fusion of both."""

from __future__ import annotations

from mmfast.train.demo.run import Demo


def run(demo: Demo) -> dict:
    return {"missing": "not built yet"}
