"""A toy model and data for the trainer's tests."""

from __future__ import annotations

import torch
from torch import nn

from mmfast.data.sampler import BatchSampler
from mmfast.tasks import Batch
from mmfast.train.batches import SampledBatches


class ToyModel(nn.Module):
    """Linear encoders of two vector modalities, with dropout and a norm; the model contract in small."""

    def __init__(self, dim: int = 8, dropout: float = 0.2):
        super().__init__()
        self.encoders = nn.ModuleDict({"image": nn.Linear(6, dim), "text": nn.Linear(5, dim)})
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs):
        return {k: self.norm(self.dropout(self.encoders[k](x))) for k, x in inputs.items()}

    def project(self, name, pooled):
        return nn.functional.normalize(pooled, dim=-1)


def toy_batches(seed: int = 0, count: int = 40, batch_size: int = 8, noise: float = 0.1) -> SampledBatches:
    g = torch.Generator().manual_seed(1)
    image, text = torch.randn(count, 6, generator=g), torch.randn(count, 5, generator=g)
    labels = torch.arange(count) % 4

    def collate(rows, generator):
        rows = torch.tensor(rows)
        shake = noise * torch.randn(len(rows), 6, generator=generator)
        return Batch(
            {"image": image[rows] + shake, "text": text[rows]},
            len(rows),
            rows.clone(),
            labels[rows],
            tokens=2 * len(rows),
        )

    return SampledBatches(BatchSampler([1] * count, batch_size=batch_size, seed=seed), collate, seed)
