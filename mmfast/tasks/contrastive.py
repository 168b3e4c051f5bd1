"""Contrastive learning of two modalities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmfast
from mmfast.tasks.batch import Batch, need, present
from mmfast.tasks.retrieval import embed, retrieval


class Contrastive:
    """InfoNCE or the sigmoid loss between two modalities; samples of one id are positives, never negatives.

    Args:
        first, second: the two modalities.
        kind: "infonce" (Radford et al. 2021, CLIP) or "sigmoid" (Zhai et al. 2023, SigLIP; needs `model.logit_bias`).
        candidates: weight of the cross-entropy of the first modality against `batch.candidates`; 0 leaves it out.

    Samples that lack one of the two modalities are left out.

    The model gives pooled features by modality, `project(name, pooled)` unit vectors and `logit_scale`, the logarithm
    of the scale.
    """

    def __init__(
        self,
        first: str = "image",
        second: str = "text",
        *,
        kind: str = "infonce",
        candidates: float = 0.0,
    ):
        if kind not in ("infonce", "sigmoid"):
            raise ValueError(f"Contrastive: kind is {kind!r}, expected 'infonce' or 'sigmoid'")
        self.first, self.second, self.kind = first, second, kind
        self.candidates = candidates

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict]:
        """The batch's loss and figures."""
        return self.loss_of(model, model(batch.inputs), batch)

    def loss_of(self, model: nn.Module, features: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict]:
        """As `loss`, from the model's pooled features."""
        ids = need(batch, "ids", "Contrastive")
        names = model({self.second: batch.candidates})[self.second] if self.candidates else None
        # Unit vectors and their products stay in float32: a scale of 50 would magnify bfloat16's rounding.
        with torch.autocast(ids.device.type, enabled=False):
            x, y = (model.project(name, features[name].float()) for name in (self.first, self.second))
            x, y, ids = self._both(batch, x, y, ids)
            scale = model.logit_scale.float().exp()
            bias = model.logit_bias.float() if self.kind == "sigmoid" else None
            if not len(ids):  # nobody has both: zero, with zero gradients
                return 0 * (x.sum() + y.sum() + scale), {"contrastive": x.new_zeros(())}
            loss = mmfast.contrastive_loss(x, y, scale=scale, kind=self.kind, bias=bias, ids=ids)
            figures = {"contrastive": loss.detach(), "scale": scale.detach()}
            if self.candidates:
                named = self._among_candidates(model.project(self.second, names.float()), batch, x, ids, scale)
                figures["candidates"] = named.detach()
                loss = loss + self.candidates * named
        with torch.no_grad():
            best = (x @ y.T).argmax(1)
            figures["accuracy"] = 100 * (ids[best] == ids).float().mean()
        return loss, figures

    def _among_candidates(self, y: Tensor, batch: Batch, x: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
        """Cross-entropy of x among the candidates y; samples whose id is not there are left out."""
        known = need(batch, "candidate_ids", "Contrastive")
        order = known.argsort()
        place = torch.searchsorted(known[order], ids).clamp(max=len(known) - 1)
        target = order[place]
        return F.cross_entropy(scale * (x @ y.T), target.masked_fill(known[target] != ids, -100))

    def _both(self, batch: Batch, x: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that have both modalities."""
        here = [h for name, h in present(batch.inputs).items() if name in (self.first, self.second)]
        if not here or all(bool(h.all()) for h in here):
            return x, y, ids
        rows = torch.stack(here).all(0)
        return x[rows], y[rows], ids[rows]

    def evaluate(self, model: nn.Module, first: Iterable[Batch], second: Iterable[Batch] | None = None) -> dict:
        """Retrieval figures of both directions: see `mmfast.tasks.retrieval`.

        Args:
            first: batches with the first modality.
            second: batches with the second; default the same samples.
        """
        first = list(first)
        x, x_ids = embed(model, first, self.first)
        y, y_ids = embed(model, first if second is None else second, self.second)
        return retrieval(x, y, x_ids, y_ids, (self.first, self.second))
