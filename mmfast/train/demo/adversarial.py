"""Stage: fine-tuning on stamps against FGSM; clean and robust accuracy, images only, with signs of hidden gradients."""

from __future__ import annotations

import torch

from mmfast.adversarial import FGSM, PGD, evaluate
from mmfast.layout import Layout
from mmfast.tasks import Adversarial, Batch, Classification
from mmfast.tasks.adversarial import attack_loss, with_regions
from mmfast.train import Trainer
from mmfast.train.demo.stage import Demo
from mmfast.train.demo.stamps import base_recipe, train_once
from mmfast.train.recipes.inputs import normalise
from mmfast.train.recipes.stamps import StampsData

LEVELS = 4  # of 255
BOUNDS = tuple(normalise(torch.tensor([0.0, 1.0])).tolist())
EPS = LEVELS / 255 * (BOUNDS[1] - BOUNDS[0])
SHOWN = 6


def run(demo: Demo) -> dict:
    """The same fine-tuning twice, without and with FGSM pictures, both tested clean and attacked."""
    data = StampsData(demo.stamps, base_recipe(demo))
    test = data.batch(demo.stamps.split["test"])
    results = {}
    for kind in ("clean", "adversarial"):

        def once(kind=kind) -> dict:
            task = data.recipe.task(len(demo.stamps.classes))
            fast = FGSM(EPS, step_size=1.25 * EPS, random_start=True)
            trained = Adversarial(task, fast, bounds=BOUNDS) if kind == "adversarial" else task
            trainer, lines = train_once(
                demo, data, demo.sizes.adversarial_steps, 0, text=f"{kind} fine-tuning", task=trained
            )
            return {
                **robustness(trainer, task, test, demo.sizes.adversarial_attacks),
                "curve": [[line["step"], line["loss"]] for line in lines],
            }

        results[kind] = demo.once(f"adversarial/{kind}", once)
    return {**results, "eps": LEVELS, "steps": demo.sizes.adversarial_steps, "samples": test.size}


def robustness(trainer: Trainer, task: Classification, batch: Batch, steps: int) -> dict:
    """Accuracy in percent on pictures as they are, under FGSM and under PGD, flags, and a few attacked pictures."""
    model = trainer.model
    regions = batch.inputs["image"].regions
    layout = Layout.from_lengths(batch.inputs["image"].lengths)
    attacks = {"FGSM": FGSM(EPS), f"PGD-{steps}": PGD(EPS, steps=steps)}
    losses = attack_loss(model, task, batch)

    def right(x: torch.Tensor) -> torch.Tensor:
        return task.logits(model, with_regions(batch, x).inputs).argmax(1) == batch.labels

    with trainer.evaluating():
        found = evaluate(losses, right, regions, attacks, bounds=BOUNDS, layout=layout, model=model)
        name, strongest = list(attacks.items())[-1]
        attacked = strongest(losses, regions, bounds=BOUNDS, layout=layout, model=model)
        still = right(attacked)
    accuracy = {"clean": 100 * found.clean, **{k: 100 * v for k, v in found.accuracy.items()}}
    # The first pictures that are one region, so that they can be shown whole.
    single = (batch.inputs["image"].lengths == 1).nonzero()[:SHOWN, 0].tolist()
    first = layout.cu_seqlens.tolist()
    pictures = [{"pixels": _pixels(attacked[first[i]]), "right": bool(still[i])} for i in single]
    return {"accuracy": accuracy, "flags": list(found.flags), "attack": name, "pictures": pictures}


def _pixels(region: torch.Tensor) -> list:
    low, high = BOUNDS
    return ((region.float() - low) / (high - low) * 255).round().clamp(0, 255).byte().tolist()
