"""Stage: 16 classes and retrieval between image, caption and speech, one backbone, shared parameters."""

from __future__ import annotations

from mmfast.data import stamps_length_baseline
from mmfast.train.demo.stage import LANGUAGES, Demo
from mmfast.train.demo.stamps import base_recipe, score, train_once
from mmfast.train.recipes.stamps import MODALITIES, StampsData


def run(demo: Demo) -> dict:
    """Equal weights and learned ones; speech retrieval beside what clip length alone finds."""
    results = {}
    for weighting in ("equal", "uncertainty"):

        def once(weighting=weighting) -> dict:
            recipe = base_recipe(demo, modalities=MODALITIES, fusion="attention", multitask=weighting)
            data = StampsData(demo.stamps, recipe)
            trainer, lines = train_once(demo, data, demo.sizes.multitask_steps, 0, text=f"multi-task, {weighting}")
            names = [name for name in lines[-1] if name.endswith("/weight")]
            return {
                "scores": score(trainer, data),
                "weights": {name.removesuffix("/weight"): lines[-1][name] for name in names},
                "curve": [[line["step"], line["loss"]] for line in lines],
                "class_curve": [[line["step"], line["classes/cross_entropy"]] for line in lines],
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
            }

        results[weighting] = demo.once(f"multitask/{weighting}", once)
    language = LANGUAGES[0]
    spoken = {code for _, code in demo.stamps.clips}
    length = stamps_length_baseline(demo.stamps, language) if language in spoken else None
    return {**results, "steps": demo.sizes.multitask_steps, "language": language, "length_only": length}
