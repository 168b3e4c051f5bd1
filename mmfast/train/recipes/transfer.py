"""Weights of one run as the start of another, and models rebuilt from their checkpoints."""

from __future__ import annotations

import os

import torch
from torch import nn

from mmfast.data import load_emoji, load_stamps
from mmfast.train.checkpoint import CheckpointError, load_checkpoint, load_weights, under
from mmfast.train.recipes.emoji import EmojiData, EmojiRecipe
from mmfast.train.recipes.stamps import StampsData, StampsRecipe

RECIPES = {"emoji": EmojiRecipe, "stamps": StampsRecipe}


def describe(recipe: EmojiRecipe | StampsRecipe) -> dict:
    """A recipe as it stands in a checkpoint."""
    name = next(name for name, kind in RECIPES.items() if isinstance(recipe, kind))
    return {"name": name, "options": recipe.to_json()}


def read_recipe(path: str | os.PathLike) -> tuple[EmojiRecipe | StampsRecipe, dict, dict]:
    """The recipe of a checkpoint, its tensors and its state.

    Raises:
        CheckpointError: it was not written by one of mmfast's recipes.
    """
    tensors, _, state = load_checkpoint(path, training=False)
    try:
        kind = RECIPES[state["recipe"]["name"]]
        return kind(**state["recipe"]["options"]), tensors, state
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint: {path} says no recipe known here ({error}); expected one of {', '.join(RECIPES)}"
        ) from error


def start_from(model: nn.Module, path: str | os.PathLike) -> list[str]:
    """Take over the weights of a checkpoint that fit the model, and return the names of those that stay new."""
    tensors, _, _ = load_checkpoint(path, training=False)
    return load_weights(model, under("model", tensors), what=str(path), strict=False)


def encoders_of(path: str | os.PathLike) -> EmojiRecipe:
    """Widths and depths of a checkpoint's encoders, for a recipe that starts from it."""
    recipe, _, _ = read_recipe(path)
    return recipe if isinstance(recipe, EmojiRecipe) else recipe.encoders


def evaluate_checkpoint(
    path: str | os.PathLike, *, split: str = "test", device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The figures of a checkpoint on the data that its recipe names.

    Args:
        path: of a run, or of one checkpoint.
        split: of the stamps; the emoji recipe has tests of its own.
        device: where to compute.
    """
    recipe, tensors, _ = read_recipe(path)
    model = recipe.model()
    load_weights(model, under("model", tensors), what=str(path))
    model.to(device).eval()
    if isinstance(recipe, EmojiRecipe):
        return EmojiData(load_emoji(), recipe).evaluate(model)
    stamps = load_stamps(speech="audio" in recipe.modalities, languages=recipe.languages)
    task = recipe.task(len(stamps.classes))
    load_weights(task, under("task", tensors), what=str(path))
    return StampsData(stamps, recipe).evaluate(model, task.to(device).eval(), split)
