"""`mmfast demo`: the stages in turn, each with a file of its own, so that an interrupted demo goes on."""

from __future__ import annotations

import os
import time

import torch

from mmfast.data import EmojiSet, StampSet
from mmfast.train.demo import adversarial, features, fusion, multitask, pretrain, report, speed_stage
from mmfast.train.demo import stamps as on_stamps
from mmfast.train.demo.stage import Demo, Sizes
from mmfast.train.demo.table import as_text, table


def run_demo(
    out: str | os.PathLike,
    sizes: Sizes,
    *,
    emoji: EmojiSet | None = None,
    stamps: StampSet | None = None,
    show: bool = True,
    speed: bool = True,
) -> dict[str, dict]:
    """All stages, the table and the report; returns the stages' results.

    Args:
        out: folder of the demo: results, checkpoints, `report.html`.
        sizes: `Sizes()` for the full demo, `QUICK` for the small one.
        emoji, stamps: the sets; default those that `mmfast.data` installs.
        show: print progress and the table.
        speed: time the train step beside the padded model.
    """
    demo = Demo(out, sizes, emoji=emoji, stamps=stamps, show=show)
    begin = time.monotonic()
    demo.stage("data", "Data: set-up and downloads (not counted)", _data)
    demo.stage("pretrain", "Emoji: training on three artists", pretrain.run)
    demo.stage("stamps", "Stamps: from scratch and from the emoji, 16 classes", on_stamps.run)
    demo.stage("fusion", "Stamps: three fusions of image, caption and speech", fusion.run)
    demo.stage("multitask", "Stamps: classes and retrieval on one backbone", multitask.run)
    demo.stage("adversarial", "Stamps: adversarial fine-tuning", adversarial.run)
    if sizes.features:
        demo.stage("features", "Stamps: frozen pretrained features", features.run)
    if speed:
        demo.stage("speed", "Speed of a train step beside the padded model", speed_stage.run)
    rows = table(demo.results, verdicts=sizes.pretrain_steps >= Sizes.pretrain_steps)
    path = report.write(demo, rows)
    if show:
        print(as_text(rows))
        stages = [name for name in demo.results if name != "data"]
        total = sum(demo.results[name]["seconds"] for name in stages)
        print(
            f"\n{total:.0f} s of stages, {demo.results['data']['seconds']:.0f} s of set-up; "
            f"this call {time.monotonic() - begin:.0f} s"
        )
        print(f"Report: {path}")
    return demo.results


def _data(demo: Demo) -> dict:
    emoji, stamps = demo.emoji, demo.stamps
    if demo.sizes.features:
        try:
            features.fetch(demo.show)
        except RuntimeError as error:  # nothing else needs them; the message says why and what to do
            demo.say(f"   frozen features are left out: {error}")
    return {
        "emoji": {
            "pictures": len(emoji.images),
            "concepts": len(emoji.names),
            "artists": list(emoji.artists),
            **{name: len(rows) for name, rows in emoji.split.items()},
        },
        "stamps": {
            "pictures": len(stamps.images),
            "clips": len(stamps.clips),
            "classes": len(stamps.classes),
            **{name: len(rows) for name, rows in stamps.split.items()},
        },
        "threads": torch.get_num_threads(),
    }
