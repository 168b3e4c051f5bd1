"""Stage: image, caption and spoken description together: concatenation, weights, attention, side by side."""

from __future__ import annotations

import torch

from mmfast.train.demo.stage import Demo, mean_and_error
from mmfast.train.demo.stamps import base_recipe, score, train_once
from mmfast.train.recipes.stamps import MODALITIES, StampsData

VARIANTS = {
    "image only": {"modalities": ("image",)},
    "caption only": {"modalities": ("text",)},
    "concatenation": {"modalities": MODALITIES, "fusion": "concat"},
    "weighted": {"modalities": MODALITIES, "fusion": "weighted"},
    "attention": {"modalities": MODALITIES, "fusion": "attention"},
}


def run(demo: Demo) -> dict:
    """Each variant with the same seeds, steps and start."""
    results: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for name, options in VARIANTS.items():
        data = StampsData(demo.stamps, base_recipe(demo, **options))
        for seed in range(demo.sizes.fusion_seeds):

            def once(name=name, data=data, seed=seed) -> dict:
                trainer, lines = train_once(demo, data, demo.sizes.fusion_steps, seed, text=f"{name}, seed {seed}")
                result = {**score(trainer, data), "curve": [[line["step"], line["loss"]] for line in lines]}
                if name == "weighted":
                    everything = torch.ones(1, len(MODALITIES), dtype=torch.bool)
                    weights = trainer.task.fusion.weights(everything)[0].tolist()
                    result["weights"] = dict(zip(MODALITIES, weights))
                return result

            results[name].append(demo.once(f"fusion/{name.replace(' ', '-')}-{seed}", once))
    return {
        "steps": demo.sizes.fusion_steps,
        "accuracy": {name: [r["accuracy"] for r in found] for name, found in results.items()},
        "summary": {name: mean_and_error([r["accuracy"] for r in found]) for name, found in results.items()},
        "weights": results["weighted"][0]["weights"],
        "curves": {name: found[0]["curve"] for name, found in results.items()},
    }
