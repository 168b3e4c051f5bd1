"""Splits that keep together what belongs together, the same on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence

import torch


def groups(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Group items that share a key, directly or through others (union-find).

    Args:
        keys: for each item, its keys; keys of different kinds are told apart by their type or a tag.

    Returns:
        For each item, the smallest index of its group.
    """
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, item in enumerate(keys):
        for key in item:
            a, b = root(first.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(keys))]


def split_by_group(
    group: Sequence[int],
    labels: Sequence[str],
    *,
    shares: Sequence[tuple[str, float]] = (("train", 0.80), ("val", 0.05), ("test", 0.15)),
    largest: int | None = None,
) -> dict[str, torch.Tensor]:
    """Split items by group with a hash of a label, so that a new item never moves an old one.

    Args:
        group: group of each item.
        labels: a stable text of each item, for example its code points; a group is placed by its smallest label.
        shares: names and shares of the splits, in order.
        largest: groups of more items go to the first split, so that one group does not fill a small split.

    Returns:
        For each split, the sorted int64 indices of its items.
    """
    label: dict[int, str] = {}
    size = Counter(group)
    for g, text in zip(group, labels, strict=True):
        label[g] = min(label.get(g, text), text)
    place = {}
    for g, text in label.items():
        if largest is not None and size[g] > largest:
            place[g] = shares[0][0]
            continue
        x = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        place[g] = shares[-1][0]
        for name, share in shares:
            if x < share:
                place[g] = name
                break
            x -= share
    out = defaultdict(list)
    for i, g in enumerate(group):
        out[place[g]].append(i)
    return {name: torch.tensor(out[name], dtype=torch.int64) for name, _ in shares}
