"""Training a task on attacked inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.adversarial import adversarial_training_loss
from mmfast.layout import Layout
from mmfast.tasks.batch import Batch, need
from mmfast.tasks.classification import Classification


class Adversarial(nn.Module):
    """A classification trained on images that an attack of `mmfast.adversarial` changes in every step.

    Args:
        task: what is trained and attacked.
        attack: such as `mmfast.adversarial.FGSM(eps, step_size=1.25 * eps, random_start=True)`, the start of fast
            adversarial training (Wong, Rice, Kolter 2020, algorithm 3).
        weight: share of the attacked images in the loss; the rest is the loss of the images as they are.
        bounds: smallest and largest value of a pixel, in the unit of the inputs.
        modality: whose `regions` are attacked.
    """

    def __init__(
        self,
        task: Classification,
        attack: Callable,
        *,
        weight: float = 1.0,
        bounds: tuple[float, float] = (0.0, 1.0),
        modality: str = "image",
    ):
        super().__init__()
        self.task, self.attack, self.weight = task, attack, weight
        self.bounds, self.modality = bounds, modality

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
        """The loss under attack. The start of the attack follows from torch's random state, so that runs resume."""
        image = batch.inputs[self.modality]
        loss = adversarial_training_loss(
            attack_loss(model, self.task, batch, self.modality),
            image.regions,
            self.attack,
            weight=self.weight,
            bounds=self.bounds,
            layout=Layout.from_lengths(image.lengths),
            seed=int(torch.randint(2**31, ())),
            model=model,  # batch norm's statistics see the attacked images once, not at every step of the attack
        )
        return loss, {"attacked": loss.detach()}


def attack_loss(
    model: nn.Module, task: Classification, batch: Batch, modality: str = "image"
) -> Callable[[Tensor], Tensor]:
    """The function that attacks differentiate: regions `[R, 3, S, S]` to each sample's cross-entropy `[B]`."""
    labels = need(batch, "labels", "attack_loss")

    def losses(regions: Tensor) -> Tensor:
        logits = task.logits(model, with_regions(batch, regions, modality).inputs)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    return losses


def with_regions(batch: Batch, regions: Tensor, modality: str = "image") -> Batch:
    """The batch with other pixels."""
    inputs: Mapping = {**batch.inputs, modality: batch.inputs[modality]._replace(regions=regions)}
    return dataclasses.replace(batch, inputs=inputs)
