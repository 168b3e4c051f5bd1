"""Stage: fine-tuning on stamps against FGSM; clean and robust accuracy under FGSM and PGD, images only."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

import mmfast
from mmfast.tasks import Batch, Classification
from mmfast.train import Trainer
from mmfast.train.demo.run import Demo
from mmfast.train.demo.stamps import base_recipe, train_once
from mmfast.train.recipes.inputs import normalise
from mmfast.train.recipes.stamps import StampsData

PIXEL = 2 / 255  # one grey level of 255 in `normalise`d pixels
EPS = 4
BOUNDS = tuple(normalise(torch.tensor([0.0, 1.0])).tolist())


def attack(
    model: nn.Module, task: Classification, batch: Batch, *, steps: int, step_size: float, seed: int | None = None
) -> Batch:
    """The batch with adversarial pictures, within EPS grey levels: FGSM for one step, PGD for more.

    Model and task run in eval mode meanwhile, so that batch norm's statistics see clean pictures only.

    Args:
        steps, step_size: of the attack, the size in grey levels of 255.
        seed: of a random start; None starts at the pictures themselves.
    """
    modes = [(module, module.training) for module in (model, task)]
    model.eval(), task.eval()
    image = batch.inputs["image"]
    delta = torch.zeros_like(image.regions)
    if seed is not None:
        mmfast.random_start_(delta, eps=EPS * PIXEL, norm="linf", seed=seed, origin=image.regions, bounds=BOUNDS)
    for _ in range(steps):
        delta.requires_grad_(True)
        with torch.enable_grad():
            loss, _ = task.loss(model, _with_regions(batch, image.regions + delta))
            (grad,) = torch.autograd.grad(loss, delta)
        delta = delta.detach()
        mmfast.perturb_(delta, grad, step_size=step_size * PIXEL, eps=EPS * PIXEL, origin=image.regions, bounds=BOUNDS)
    for module, training in modes:
        module.train(training)
    return _with_regions(batch, image.regions + delta.detach())


def _with_regions(batch: Batch, regions: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, inputs={**batch.inputs, "image": batch.inputs["image"]._replace(regions=regions)})


class AgainstFGSM(nn.Module):
    """Trains a classification on FGSM pictures with a random start.

    Source: Wong, Rice, Kolter 2020, "Fast is better than free", algorithm 3 (step size 1.25 eps).
    """

    def __init__(self, task: Classification):
        super().__init__()
        self.task = task
        self.step = 0

    def loss(self, model: nn.Module, batch: Batch):
        self.step += 1
        return self.task.loss(model, attack(model, self.task, batch, steps=1, step_size=1.25 * EPS, seed=self.step))


def run(demo: Demo) -> dict:
    """The same fine-tuning twice, without and with FGSM pictures, both tested clean and attacked."""
    data = StampsData(demo.stamps, base_recipe(demo))
    results = {}
    for kind in ("clean", "adversarial"):

        def once(kind=kind) -> dict:
            task = data.recipe.task(len(demo.stamps.classes))
            trained = AgainstFGSM(task) if kind == "adversarial" else task
            trainer, lines = train_once(
                demo, data, demo.sizes.adversarial_steps, 0, text=f"{kind} fine-tuning", task=trained
            )
            return {
                **accuracies(trainer, task, data, demo.sizes.attack_steps),
                "curve": [[line["step"], line["loss"]] for line in lines],
            }

        results[kind] = demo.once(f"adversarial/{kind}", once)
    return {**results, "eps": EPS, "attack_steps": demo.sizes.attack_steps, "steps": demo.sizes.adversarial_steps}


def accuracies(trainer: Trainer, task: Classification, data: StampsData, steps: int) -> dict[str, float]:
    """Accuracy on the test pictures as they are, under FGSM, and under PGD with a random start."""
    attacks = {
        "clean": None,
        "FGSM": {"steps": 1, "step_size": EPS},
        f"PGD-{steps}": {"steps": steps, "step_size": EPS / 4, "seed": 1},
    }
    out = {}
    for name, options in attacks.items():
        batches = data.batches("test")
        if options:
            batches = (attack(trainer.model, task, batch, **options) for batch in batches)
        with trainer.evaluating():
            out[name] = task.evaluate(trainer.model, batches)["accuracy"]
    return out
