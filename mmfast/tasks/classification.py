"""Classification from one or several modalities through a fusion of their pooled features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.tasks.batch import Batch, need, present


class Classification(nn.Module):
    """A linear classifier on one modality's pooled features, on a fusion of several, or on the joint features.

    Args:
        classes: number of classes.
        dim: width of what the classifier reads.
        modalities: which pooled features it reads; more than one needs `fusion`.
        fusion: module from a mapping name -> `[B, D]`, and a mapping of who has what, to `[B, dim]`
            (`mmfast.nn.ConcatFusion` and others).
        joint: read `model.forward_joint(inputs)` instead (the model has a backbone).
        dropout: on what the classifier reads.
        label_smoothing: of the cross-entropy.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        modalities: Sequence[str] = ("image",),
        *,
        fusion: nn.Module | None = None,
        joint: bool = False,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"Classification: classes is {classes}, expected at least 2")
        if len(modalities) != 1 and fusion is None and not joint:
            raise ValueError(
                f"Classification: {len(modalities)} modalities and no fusion; give fusion=, joint=True or one modality"
            )
        self.modalities, self.fusion, self.joint = tuple(modalities), fusion, joint
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, classes)
        self.classes, self.label_smoothing = classes, label_smoothing

    def logits(self, model: nn.Module, inputs: Mapping) -> Tensor:
        """Class scores `[B, classes]` of a model's inputs; what attacks differentiate."""
        if self.joint:
            return self.head(self.dropout(model.forward_joint(inputs)))
        chosen = {name: inputs[name] for name in self.modalities}
        return self.logits_of(model(chosen), present(chosen))

    def logits_of(self, features: Mapping[str, Tensor], here: Mapping[str, Tensor] | None = None) -> Tensor:
        """Class scores `[B, classes]` from pooled features; `here[name]` bool `[B]` says which samples have them."""
        chosen = {name: features[name] for name in self.modalities}
        if self.fusion is None:
            fused = chosen[self.modalities[0]]
        else:
            fused = self.fusion(chosen, {name: x for name, x in (here or {}).items() if name in chosen})
        return self.head(self.dropout(fused))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
        """Cross-entropy of the batch, and its accuracy in percent."""
        return self._loss(self.logits(model, batch.inputs), batch)

    def loss_of(self, model: nn.Module, features: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict]:
        """As `loss`, from the model's pooled features."""
        if self.joint:
            return self.loss(model, batch)
        return self._loss(self.logits_of(features, present(batch.inputs)), batch)

    def _loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, dict]:
        labels = need(batch, "labels", "Classification")
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        accuracy = 100 * (logits.detach().argmax(1) == labels).float().mean()
        return loss, {"cross_entropy": loss.detach(), "accuracy": accuracy}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Accuracy in percent over all samples, and that of always naming the largest class ("majority")."""
        right = total = 0
        count = torch.zeros(self.classes, dtype=torch.int64)
        for batch in batches:
            batch = batch.to(self.head.weight.device)
            labels = need(batch, "labels", "Classification")
            right += int((self.logits(model, batch.inputs).argmax(1) == labels).sum())
            count += torch.bincount(labels.cpu(), minlength=self.classes)
            total += batch.size
        if not total:
            raise ValueError("Classification.evaluate: there is no sample, expected at least one")
        return {
            "accuracy": 100 * right / total,
            "majority": 100 * int(count.max()) / total,
            "chance": 100 / self.classes,
            "samples": total,
        }
