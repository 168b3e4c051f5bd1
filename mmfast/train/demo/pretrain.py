"""Stage: an image-text model from scratch on the emoji of three artists."""

from __future__ import annotations

import torch

from mmfast.train import TrainConfig, Trainer
from mmfast.train.recipes.emoji import EmojiData, EmojiRecipe
from mmfast.train.recipes.transfer import describe

FOLDER = "emoji"


def recipe(batch_size: int) -> EmojiRecipe:
    """The recipe of the stage."""
    return EmojiRecipe(batch_size=batch_size)


def config(steps: int) -> TrainConfig:
    """Its numbers."""
    return TrainConfig(
        steps,
        lr=1.5e-3,
        weight_decay=0.05,
        warmup=min(60, max(1, steps // 10)),
        checkpoint_every=max(1, min(100, steps // 4)),
        keep=1,
        log_every=max(1, steps // 80),
    )


def run(demo) -> dict:
    """Train, then test on the fourth artist and on concepts never seen."""
    sizes = demo.sizes
    of = recipe(sizes.pretrain_batch)
    data = EmojiData(demo.emoji, of)
    torch.manual_seed(0)
    trainer = Trainer(
        of.model(),
        of.task(),
        data.train_batches(),
        config(sizes.pretrain_steps),
        demo.out / FOLDER,
        recipe=describe(of),
        evaluate=data.evaluate,
        text="emoji",
        show=demo.show,
    )
    lines = [line for line in trainer.fit() if "loss" in line]
    scores = trainer.run_evaluation()
    return {
        "held_out": of.held_out,
        "steps": sizes.pretrain_steps,
        "seconds": trainer.seconds,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "samples_per_s": sorted(line["samples_per_s"] for line in lines)[len(lines) // 2],
        "curve": [[line["step"], line["loss"]] for line in lines],
        "accuracy_curve": [[line["step"], line["accuracy"]] for line in lines],
        "scores": scores,
    }
