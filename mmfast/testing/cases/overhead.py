"""What a call costs: attention of one sample of 16 tokens, where nothing but the call counts."""

from __future__ import annotations

from functools import partial

import torch

from mmfast.testing import shapes
from mmfast.testing.cases import Case
from mmfast.testing.cases.attention import contest


def cases(small: bool = False) -> list[Case]:
    load = partial(shapes.dense, 1, 16, 4, 64)
    return [
        Case(
            "call",
            "attention, one sample of 16 tokens",
            measured,
            torch.float32,
            ("SDPA",),
            partial(contest, load, torch.float32, measured != "forward", ("SDPA",)),
        )
        for measured in ("forward", "forward+backward")
    ]
