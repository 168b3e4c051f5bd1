"""Integer hashes that give the same numbers on every machine, Python and library version."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood, 2014), a bijection of uint64, elementwise."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, dtype=np.uint64) + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(count: int, *seeds: int) -> np.ndarray:
    """A permutation of `count` items that depends on the seeds only: the order of their hashes; int64 [count]."""
    key = np.uint64(0)
    for seed in seeds:
        key = mix(key ^ np.uint64(seed % 2**64))
    return np.argsort(mix(np.arange(count, dtype=np.uint64) ^ mix(key)), kind="stable")
