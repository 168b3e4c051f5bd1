"""Retrieval figures: recall at k and median rank, in both directions, beside chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mmfast.tasks.batch import Batch, need


@torch.no_grad()
def ranks(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, chunk: int = 1024) -> Tensor:
    """Rank of each query's best right candidate, 1 is best; int64 `[Q]`.

    A candidate is right where its id equals the query's. Wrong candidates that score the same count as better, so that
    a model which gives one score to all gets no credit for it.

    Args:
        queries: `[Q, D]`. candidates: `[N, D]`. The score is their product.
        query_ids, candidate_ids: int64 `[Q]`, `[N]`.

    Raises:
        ValueError: a query has no right candidate.
    """
    out = []
    for begin in range(0, len(queries), chunk):
        part = slice(begin, begin + chunk)
        scores = queries[part].float() @ candidates.float().T
        right = query_ids[part, None] == candidate_ids[None, :]
        if not bool(right.any(1).all()):
            first = begin + int((~right.any(1)).nonzero()[0])
            raise ValueError(f"ranks: query {first} (id {int(query_ids[first])}) has no right candidate")
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        out.append(1 + ((scores >= best) & ~right).sum(1))
    return torch.cat(out) if out else torch.empty(0, dtype=torch.int64)


def recall(rank: Tensor, at: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k in percent, and the median rank."""
    figures = {f"R@{k}": 100 * (rank <= k).float().mean().item() for k in at}
    return {**figures, "median rank": rank.float().median().item() if len(rank) else float("nan")}


def chance(query_ids: Tensor, candidate_ids: Tensor, at: int = 1) -> float:
    """Expected recall at k in percent of a random order of the candidates (hypergeometric, exact)."""
    total = len(candidate_ids)
    right = (query_ids[:, None] == candidate_ids[None, :]).sum(1).double()
    miss = torch.ones_like(right)
    for i in range(min(at, total)):
        miss = miss * ((total - i - right) / (total - i)).clamp(min=0)
    return 100 * (1 - miss).mean().item()


def retrieval(
    x: Tensor, y: Tensor, x_ids: Tensor, y_ids: Tensor, names: tuple[str, str] = ("image", "text")
) -> dict[str, float]:
    """Figures of both directions. What has no right partner is a candidate, but no query.

    Args:
        x, y: embeddings `[N, D]`, `[M, D]`.
        x_ids, y_ids: int64 `[N]`, `[M]`; equal where a pair is right.
        names: of the two sides.

    Returns:
        "image->text R@1" and so on in percent, with "median rank", "candidates" and "chance R@1".
    """
    out = {}
    for (a, b), (q, c), (q_ids, c_ids) in (
        (names, (x, y), (x_ids, y_ids)),
        (names[::-1], (y, x), (y_ids, x_ids)),
    ):
        direction = f"{a}->{b}"
        has_partner = torch.isin(q_ids, c_ids)
        q, q_ids = q[has_partner], q_ids[has_partner]
        out |= {f"{direction} {k}": v for k, v in recall(ranks(q, c, q_ids, c_ids)).items()}
        out |= {f"{direction} candidates": len(c), f"{direction} chance R@1": chance(q_ids, c_ids)}
    return out


@torch.no_grad()
def embed(model: nn.Module, batches: Iterable[Batch], modality: str) -> tuple[Tensor, Tensor]:
    """Unit vectors of one modality over all batches, float32 `[N, D]`, and the samples' ids."""
    vectors, ids = [], []
    device = model.logit_scale.device
    for batch in batches:
        batch = batch.to(device)
        pooled = model({modality: batch.inputs[modality]})[modality]
        with torch.autocast(device.type, enabled=False):  # as in the loss: vectors may lie close together
            vectors.append(model.project(modality, pooled.float()))
        ids.append(need(batch, "ids", "embed"))
    if not vectors:
        raise ValueError(f"embed: there is no batch with {modality}, expected at least one")
    return torch.cat(vectors), torch.cat(ids)
