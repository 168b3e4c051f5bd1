"""Tiny sets of the real kinds, drawn here: no network, no files."""

from __future__ import annotations

import torch

from mmfast.data import EmojiSet, StampSet


def tiny_emoji(concepts: int = 24) -> EmojiSet:
    """Concepts are coloured bars; each artist has a shade of its own."""
    g = torch.Generator().manual_seed(0)
    artists = ("noto", "twemoji", "fluent", "openmoji")
    base = torch.randint(0, 200, (concepts, 3, 8, 8), generator=g)
    big = base.repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = torch.cat([(big + 10 * i).clamp(max=255) for i in range(4)]).byte()
    order = torch.arange(concepts)
    return EmojiSet(
        images=images,
        artist=torch.arange(4).repeat_interleave(concepts),
        concept=order.repeat(4),
        artists=artists,
        names=[f"thing number {i}" for i in range(concepts)],
        keywords=[[f"word{i}", "thing"] for i in range(concepts)],
        group=["objects"] * concepts,
        subgroup=["thing"] * concepts,
        codepoints=[f"{i:x}" for i in range(concepts)],
        family=order,
        split={"train": order[:16], "val": order[16:18], "test": order[18:]},
    )


def tiny_stamps(count: int = 40, classes: int = 16) -> StampSet:
    """Pictures of several sizes in their class's colour, captions, and clips for most of them."""
    g = torch.Generator().manual_seed(1)
    label = torch.arange(count) % classes
    images, lengths = [], []
    for i in range(count):
        h, w = (40, 64) if i % 3 else (70, 33)
        colour = torch.tensor([label[i] * 15, 200 - label[i] * 10, 90])[:, None, None]
        images.append((colour + torch.randint(0, 30, (3, h, w), generator=g)).clamp(0, 255).byte())
    spoken = [i for i in range(count) if i % 5]
    lengths = torch.tensor([20 + i for i in range(len(spoken))])
    order = torch.arange(count)
    return StampSet(
        images=images,
        caption=[f"A thing of kind {int(label[i])}, number {i}." for i in range(count)],
        captions=[{"fr": f"Une chose {i}."} for i in range(count)],
        label=label,
        classes=tuple(f"kind{i}" for i in range(classes)),
        names=[f"kind{int(label[i])}/{i}" for i in range(count)],
        group=order,
        split={"train": order[:24], "val": order[24:28], "test": order[28:]},
        clips=[(i, "fr") for i in spoken],
        mel=torch.randn(int(lengths.sum()), 80, generator=g).half(),
        mel_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        skipped=[],
    )
