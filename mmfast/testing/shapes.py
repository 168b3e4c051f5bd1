"""Named ragged workloads: seeded layouts and masks that tests and benchmarks share."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from mmfast.layout import Layout
from mmfast.mask import ModalityMask


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attention of `layout_q` onto `layout_k` under `mask`.

    Args:
        name: for reports.
        heads, heads_k, dim: H, Hk and D.
        rule: how a peer describes the mask: "full", "causal", or "" where only a dense mask can.
    """

    name: str
    layout_q: Layout
    layout_k: Layout
    mask: ModalityMask
    heads: int
    heads_k: int
    dim: int
    rule: str = ""

    @property
    def lengths_q(self) -> list[int]:
        return self.layout_q.lengths().tolist()

    @property
    def lengths_k(self) -> list[int]:
        return self.layout_k.lengths().tolist()

    def cells(self) -> int:
        """Visible (query, key) pairs, over all heads: 4 D of them are the useful operations of a forward pass."""
        if self.rule == "full":
            return self.heads * sum(a * b for a, b in zip(self.lengths_q, self.lengths_k))
        if self.rule == "causal":
            return self.heads * sum(n * (n + 1) // 2 for n in self.lengths_q)
        count = 0
        for sample in range(self.layout_q.batch):
            one_q, one_k = one_sample(self.layout_q, sample), one_sample(self.layout_k, sample)
            count += int(self.mask.visible(one_q, one_k).sum())
        return self.heads * count

    def tensors(self, dtype: torch.dtype, seed: int = 0, requires_grad: bool = False) -> tuple[torch.Tensor, ...]:
        """q, k, v and the gradient of the output."""
        generator = torch.Generator().manual_seed(seed)
        total_q, total_k = sum(self.lengths_q), sum(self.lengths_k)
        shapes = [(total_q, self.heads), (total_k, self.heads_k), (total_k, self.heads_k), (total_q, self.heads)]
        q, k, v, dout = (torch.randn(*shape, self.dim, generator=generator).to(dtype) for shape in shapes)
        for x in (q, k, v):
            x.requires_grad_(requires_grad)
        return q, k, v, dout


def one_sample(layout: Layout, sample: int) -> Layout:
    """The layout of one sample alone."""
    begin = int(layout.cu_seqlens[sample])
    end = begin + int(layout.lengths()[sample])
    rows = {f: getattr(layout, f)[begin:end] for f in ("modality", "time") if getattr(layout, f) is not None}
    start = layout.start[sample : sample + 1] if layout.start is not None else None
    return Layout(torch.tensor([0, end - begin], dtype=torch.int32), start=start, names=layout.names, **rows)


def interleaved(documents: Sequence[Sequence[tuple[int, int]]], names: Sequence[str]) -> Layout:
    """A layout from documents, each a sequence of (modality, rows)."""
    modality = [m for document in documents for m, rows in document for _ in range(rows)]
    item = [i for i, n in enumerate(rows for document in documents for _, rows in document) for _ in range(n)]
    lengths = [sum(rows for _, rows in document) for document in documents]
    layout = Layout.from_lengths(lengths)
    return dataclasses.replace(
        layout,
        modality=torch.tensor(modality, dtype=torch.uint8),
        item=torch.tensor(item, dtype=torch.int32),
        names=tuple(names),
    )


def dense(batch: int = 8, length: int = 512, heads: int = 12, dim: int = 64) -> Workload:
    """Equal lengths: nothing to save."""
    layout = Layout.from_lengths([length] * batch)
    return Workload(f"dense {batch}x{length}", layout, layout, ModalityMask.full(), heads, heads, dim, "full")


def causal(batch: int = 8, length: int = 512, heads: int = 12, dim: int = 64) -> Workload:
    layout = Layout.from_lengths([length] * batch)
    return Workload(f"causal {batch}x{length}", layout, layout, ModalityMask.causal(), heads, heads, dim, "causal")


def cross_attention(batch: int = 16, heads: int = 12, dim: int = 64, seed: int = 0) -> Workload:
    """Text of 5 to 77 tokens onto image patches of 49 to 576."""
    rng = random.Random(seed)
    layout_q = Layout.from_lengths([rng.randint(5, 77) for _ in range(batch)], name="text")
    layout_k = Layout.from_lengths([rng.randint(49, 576) for _ in range(batch)], name="image")
    return Workload("ragged cross-attention", layout_q, layout_k, ModalityMask.full(), heads, heads, dim, "full")


def early_fusion(
    batch: int = 6,
    heads: int = 12,
    dim: int = 64,
    seed: int = 0,
    *,
    images: tuple[int, int] = (0, 3),
    patches: tuple[int, ...] = (49, 64, 144),
    text: int = 80,
) -> Workload:
    """Documents of up to `text` tokens between images, bidirectional inside an image, causal otherwise."""
    rng = random.Random(seed)
    documents = []
    for _ in range(batch):
        document = [(0, rng.randint(4, text // 2))]
        for _ in range(rng.randint(*images)):
            document += [(1, rng.choice(patches)), (0, rng.randint(4, text))]
        documents.append(document)
    layout = interleaved(documents, ("text", "image")).with_time("segment_start", modalities=("image",))
    return Workload("early fusion", layout, layout, ModalityMask.early_fusion(), heads, heads, dim)


def q_former(batch: int = 8, queries: int = 32, keys: int = 257, heads: int = 12, dim: int = 64) -> Workload:
    layout_q = Layout.from_lengths([queries] * batch, name="query")
    layout_k = Layout.from_lengths([keys] * batch, name="image")
    return Workload("Q-Former", layout_q, layout_k, ModalityMask.full(), heads, heads, dim, "full")


def flamingo(
    batch: int = 8,
    heads: int = 8,
    dim: int = 64,
    patches: int = 64,
    seed: int = 0,
    *,
    images: tuple[int, int] = (1, 5),
    text: tuple[int, int] = (256, 1024),
) -> Workload:
    """Text onto the resampled patches of the latest image before it; some texts begin before the first image."""
    rng = random.Random(seed)
    documents = []
    for _ in range(batch):
        count, tokens = rng.randint(*images), rng.randint(*text)
        cuts = sorted(rng.randint(0, tokens) for _ in range(count - 1))
        parts = [b - a for a, b in zip([0, *cuts], [*cuts, tokens])]
        document = [(0, rng.randint(1, 20))] if rng.random() < 0.5 else []
        for part in parts:
            document += [(1, patches), (0, part)]
        documents.append(document)
    layout = interleaved(documents, ("text", "image")).with_time("media_count", modalities=("image",))
    layout_q, layout_k = layout.select("text")[0], layout.select("image")[0]
    return Workload("Flamingo", layout_q, layout_k, ModalityMask.flamingo(), heads, heads, dim)


def tiny(batch: int = 256, heads: int = 12, dim: int = 64, seed: int = 0) -> Workload:
    """Samples of 1 to 16 tokens: the fixed cost per sample."""
    rng = random.Random(seed)
    layout = Layout.from_lengths([rng.randint(1, 16) for _ in range(batch)])
    return Workload("tiny samples", layout, layout, ModalityMask.full(), heads, heads, dim, "full")


def documents(tokens: int, heads: int = 4, dim: int = 64) -> Workload:
    """Packed documents of always the same two lengths, causal: visible cells grow as the tokens do."""
    pattern = (137, 887)
    layout = Layout.from_lengths(pattern * (tokens // sum(pattern)))
    return Workload(f"{tokens // 1024}k tokens", layout, layout, ModalityMask.causal(), heads, heads, dim, "causal")
