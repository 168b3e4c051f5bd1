"""Contrastive losses, forward and backward, beside the eager formula, which stores the N x N scores.

Useful operations: 6 N^2 D, the scores and two products for the gradients. A kernel whose memory is O(N D) must compute
InfoNCE's scores twice, 8 N^2 D, so that it can reach three quarters of the arithmetic peak.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import cross_entropy, logsigmoid, normalize

import mmfast
from mmfast.testing.cases import DTYPES, Case, Contest, agree, leaves, results

SHAPES = ((4096, 512), (1024, 768))
KINDS = {"infonce": "InfoNCE", "sigmoid": "sigmoid"}
PEERS = ("eager", "torch.compile")


def cases(small: bool = False) -> list[Case]:
    return [
        Case(
            "contrastive",
            f"{KINDS[kind]} {n}x{d}",
            "forward+backward",
            dtype,
            PEERS,
            partial(contest, kind, n, d, dtype),
            "arithmetic",
            quick=(kind == "infonce") == ((n, d) == SHAPES[0]),
        )
        for kind in KINDS
        for n, d in (((33, 16),) if small else SHAPES)
        for dtype in DTYPES
    ]


def features(n: int, d: int, dtype: torch.dtype, device="cpu") -> list[torch.Tensor]:
    """x and y, normalised; scale; bias."""
    g = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(n, d, generator=g), dim=1) for _ in range(2))
    return [*(t.to(device, dtype) for t in (x, y)), *(torch.tensor(v, device=device) for v in (20.0, -10.0))]


def ours(kind, x, y, scale, bias):
    return mmfast.contrastive_loss(x, y, scale=scale, kind=kind, bias=bias if kind == "sigmoid" else None)


def eager(kind, x, y, scale, bias):
    z = scale.to(x.dtype) * x @ y.T
    if kind == "sigmoid":
        sign = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
        return -logsigmoid(sign * (z + bias.to(x.dtype))).sum() / len(x)
    labels = torch.arange(len(x), device=x.device)
    return (cross_entropy(z, labels) + cross_entropy(z.T, labels)) / 2


def contest(kind: str, n: int, d: int, dtype: torch.dtype, device="cpu") -> Contest:
    inputs = features(n, d, dtype, device)
    count = 4 if kind == "sigmoid" else 3

    def step(loss, cast=None):
        mine = leaves(inputs, cast)

        def run():
            value = loss(kind, *mine)
            return [value, *torch.autograd.grad(value, mine[:count])]

        return run

    run = step(ours)
    peers = {"eager": step(eager), "torch.compile": step(torch.compile(eager, dynamic=False))}

    def check():
        agree(run(), step(eager, torch.float64)(), step(eager)(), results(peers), gradients_from=1)

    return Contest(run, peers, check, work=6 * n * n * d)
