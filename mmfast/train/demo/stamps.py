"""Stage: does pre-training on emoji help 16 classes of stamps? Paired seeds, images only."""

from __future__ import annotations

import torch

from mmfast.train import TrainConfig, Trainer
from mmfast.train.demo import pretrain
from mmfast.train.demo.stage import Demo, mean_and_error
from mmfast.train.recipes.stamps import StampsData, StampsRecipe
from mmfast.train.recipes.transfer import encoders_of, start_from


def base_recipe(demo: Demo, **changes) -> StampsRecipe:
    """The stamps recipe of all stages, with the encoders of the emoji stage."""
    encoders = encoders_of(demo.out / pretrain.FOLDER)
    return StampsRecipe(encoders=encoders, longest=demo.sizes.longest, **changes)


def train_once(
    demo: Demo,
    data: StampsData,
    steps: int,
    seed: int,
    *,
    pretrained: bool = True,
    lr: float = 5e-4,
    text: str = "stamps",
    task=None,
    model=None,
) -> tuple[Trainer, list[dict]]:
    """One run on the stamps. Model, task, batches and augmentation follow from the seed alone."""
    recipe = data.recipe
    torch.manual_seed(seed)
    model = recipe.model() if model is None else model
    task = recipe.task(len(demo.stamps.classes)) if task is None else task
    if pretrained:
        start_from(model, demo.out / pretrain.FOLDER)
    config = TrainConfig(
        steps, lr=lr, weight_decay=0.05, warmup=max(1, steps // 10), log_every=max(1, steps // 20), seed=seed
    )
    trainer = Trainer(model, task, data.train_batches(seed), config, None, text=text, show=demo.show)
    return trainer, trainer.fit()


def score(trainer: Trainer, data: StampsData, split: str = "test") -> dict[str, float]:
    """The recipe's figures on a split."""
    with trainer.evaluating():
        return data.evaluate(trainer.model, trainer.task, split)


def run(demo: Demo) -> dict:
    """From scratch and from the emoji weights, each with the same seeds."""
    data = StampsData(demo.stamps, base_recipe(demo))
    runs: dict[str, list[dict]] = {"scratch": [], "pretrained": []}
    for seed in range(demo.sizes.stamps_seeds):
        for kind in runs:

            def once(kind=kind, seed=seed) -> dict:
                text = f"stamps, {kind}, seed {seed}"
                trainer, lines = train_once(
                    demo, data, demo.sizes.stamps_steps, seed, pretrained=kind == "pretrained", text=text
                )
                return {**score(trainer, data), "curve": [[line["step"], line["loss"]] for line in lines]}

            runs[kind].append(demo.once(f"stamps/{kind}-{seed}", once))
    accuracy = {kind: [r["accuracy"] for r in results] for kind, results in runs.items()}
    gain, error = mean_and_error([b - a for a, b in zip(accuracy["scratch"], accuracy["pretrained"])])
    return {
        "steps": demo.sizes.stamps_steps,
        "accuracy": accuracy,
        "summary": {kind: mean_and_error(values) for kind, values in accuracy.items()},
        "gain": [gain, error],
        "majority": runs["scratch"][0]["majority"],
        "chance": runs["scratch"][0]["chance"],
        "samples": runs["scratch"][0]["samples"],
        "curves": {kind: results[0]["curve"] for kind, results in runs.items()},
    }
