"""Cost grows with visited cells: packed causal documents of always the same lengths, from 1k to 64k tokens."""

from __future__ import annotations

from functools import partial

import torch

from mmfast.testing import shapes
from mmfast.testing.cases import DTYPES, Case
from mmfast.testing.cases.attention import contest

TOKENS = (1024, 4096, 16384, 65536)
PEERS = ("SDPA loop",)
MEASURED = "forward+backward"


def workload(tokens: int) -> str:
    return f"documents, {tokens // 1024}k tokens"


def cases(small: bool = False) -> list[Case]:
    sizes = TOKENS[:1] if small else TOKENS
    heads, dim = (1, 16) if small else (4, 64)
    found = []
    for dtype in DTYPES:
        for tokens in sizes:
            make = partial(contest, partial(shapes.documents, tokens, heads, dim), dtype, True, PEERS)
            quick = dtype == torch.float32
            found.append(Case("scaling", workload(tokens), MEASURED, dtype, PEERS, make, "arithmetic", quick))
    return found
