"""`rotary` beside the usual torch form: RMS norm, then Llama's rotate_half, with one or three axes.

Bytes that must move: q and k read once and written once; backward of the norm also reads what it normalised.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch.nn.functional import rms_norm

import mmfast
from mmfast.testing.cases import DTYPES, Case, Contest
from mmfast.testing.cases.packing import compiled_peer, contest

SECTIONS = {"1 axis": None, "3 axes": (8, 12, 12)}


def cases(small: bool = False) -> list[Case]:
    samples, longest = (3, 40) if small else (32, 512)
    found = []
    for lengths in ("ragged", "equal lengths"):
        for axes in SECTIONS:
            for norm in (False, True):
                workload = f"{axes}{', q and k normed' if norm else ''}; {lengths}"
                quick = lengths == "ragged" and (axes, norm) in (("1 axis", False), ("3 axes", True))
                for dtype in DTYPES:
                    for measured in ("forward", "backward"):
                        backward = measured == "backward"
                        make = partial(rotary_contest, dtype, norm, axes, lengths, backward, samples, longest)
                        found.append(Case("rotary", workload, measured, dtype, ("rotate_half",), make, "memory", quick))
    return [case for case in found if "equal" not in case.workload or "1 axis;" in case.workload]


def rotary_contest(dtype, norm, axes, lengths, backward, samples, longest, device="cpu", compiled=False) -> Contest:
    heads, kv_heads, dim = 12, 4, 64
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(longest // 16, longest, (samples,), generator=g)
    if lengths != "ragged":
        counts = torch.full((samples,), longest // 2 + longest // 32)
    layout = mmfast.Layout.from_lengths(counts.to(device))
    rows, half, sections = layout.total, dim // 2, SECTIONS[axes]
    position = layout.positions()[:, None]
    if sections:  # frame, row and column of the patches of a video
        place = layout.positions()
        position = torch.stack([place // 64, place // 8 % 8, place % 8], 1).int()
        layout = dataclasses.replace(layout, position=position)
    inputs = [torch.randn(rows, n, dim, generator=g) for n in (heads, kv_heads)]
    inputs += [torch.randn(dim, generator=g) for _ in range(2)] if norm else []
    inputs = [x.to(device, dtype) for x in inputs]
    grads = [torch.randn(x.shape, generator=g).to(device, dtype) for x in inputs[:2]]
    # The peer's table is made beforehand, as a model shares it between its layers.
    axis = torch.repeat_interleave(torch.arange(position.shape[1]), torch.tensor(sections or (half,))).to(device)
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = position[:, axis] * frequency
    cos, sin = (torch.cat([t, t], 1)[:, None] for t in (angle.cos(), angle.sin()))
    tables = {t: (cos.to(t), sin.to(t)) for t in (dtype, torch.float64)}

    def ours(q, k, *weights):
        return mmfast.rotary(q, k, layout, sections=sections, qk_norm=(*weights, 1e-6) if norm else None)

    def chain(q, k, *weights):
        out = []
        for i, x in enumerate((q, k)):
            if norm:
                x = rms_norm(x, x.shape[2:], weights[i], 1e-6)
            cos, sin = tables[x.dtype]
            a, b = x.chunk(2, 2)
            out.append(x * cos + torch.cat([-b, a], 2) * sin)
        return out

    passes = 3 if norm and backward else 2
    ways = {"mmfast": ours, "rotate_half": chain, **compiled_peer(chain, compiled)}
    return contest(ways, chain, inputs, grads, backward, passes)
