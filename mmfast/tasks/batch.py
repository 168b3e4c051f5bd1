"""What a task reads: the inputs of a model, and what is known of each sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples with their answers.

    Args:
        inputs: modality name -> input (`mmfast.models.inputs`, or anything with `to(device)`); the same number of
            samples each.
        size: number of samples B.
        ids: int64 `[B]`, optional: equal where two samples show the same thing (a concept, a caption), for contrastive
            and retrieval tasks.
        labels: int64 `[B]`, optional: class of each sample.
        tokens: real tokens of all inputs, for the log.
        candidates, candidate_ids: more inputs of one modality with their ids, int64 `[M]`, that `Contrastive` ranks
            the other modality against: all names of a closed set, for example. Ids are unique.
    """

    inputs: Mapping[str, Any]
    size: int
    ids: Tensor | None = None
    labels: Tensor | None = None
    tokens: int = 0
    candidates: Any = None
    candidate_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        moved = {k: move(getattr(self, k)) for k in ("ids", "labels", "candidates", "candidate_ids")}
        return dataclasses.replace(self, inputs={k: v.to(device) for k, v in self.inputs.items()}, **moved)


def need(batch: Batch, field: str, task: str) -> Tensor:
    """A field of the batch that a task cannot do without.

    Raises:
        ValueError: the batch lacks it.
    """
    value = getattr(batch, field)
    if value is None:
        raise ValueError(f"{task}: the batch has no {field}, expected int64 [{batch.size}]; set them in the collate")
    return value


def present(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """bool `[B]` by modality: whether a sample has it; inputs without `lengths` are always there and left out."""
    return {name: x.lengths > 0 for name, x in inputs.items() if hasattr(x, "lengths")}
