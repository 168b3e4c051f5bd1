"""Endless batches from a sampler of indices and a function that makes a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SampledBatches:
    """Batches whose every random number follows from the seed and the batch's number, so that they can be resumed.

    Args:
        sampler: lists of sample indices with `state_dict` and `load_state_dict` (`mmfast.data.BatchSampler`).
        collate: `collate(indices, generator)` makes the batch; all its randomness comes from the generator.
        seed: of the generators.
    """

    def __init__(self, sampler, collate: Callable[[list[int], torch.Generator], Any], seed: int = 0):
        self.sampler, self.collate, self.seed = sampler, collate, seed
        self.count = 0
        self._pass = iter(sampler)

    def __iter__(self) -> SampledBatches:
        return self

    def __next__(self):
        rows = next(self._pass, None)
        if rows is None:  # the epoch is over; the sampler has gone on to the next
            self._pass = iter(self.sampler)
            rows = next(self._pass, None)
            if rows is None:
                raise ValueError("SampledBatches: the sampler gives no batch; the data set is empty, or too small")
        # Distinct for all batches of a run and for runs of near seeds.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.count)
        self.count += 1
        return self.collate(rows, generator)

    def state_dict(self) -> dict:
        """Number of batches given out, and the sampler's state."""
        return {"count": self.count, "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue after the batch at which `state_dict` was called."""
        self.count = state["count"]
        self.sampler.load_state_dict(state["sampler"])
        self._pass = iter(self.sampler)
