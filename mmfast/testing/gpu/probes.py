"""Every op on small ragged inputs: what the checks of `mmfast.testing.gpu.checks` run.

Lengths cross the edges of tiles and include empty samples.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

import mmfast
from mmfast import Layout, ModalityMask
from mmfast.ops._pack_layout import pack_layout
from mmfast.testing import shapes

LENGTHS = (1, 63, 0, 129, 17, 239)
OTHER = (65, 1, 33, 0, 128, 100)
SMALL = (5, 0, 17), (3, 4, 20)  # for the interpreter


@dataclasses.dataclass
class Probe:
    """One op on one input.

    Args:
        function: `(backend, *inputs)` -> results; changes none of its inputs.
        inputs: in float32; the checks convert them.
        leaves: how many of them, from the first, get gradients; 0 where the op has none.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: Sequence[Tensor]
    leaves: int = 0


def probes(device: torch.device, small: bool = False) -> dict[str, Callable[[], Probe]]:
    """Name -> builder."""
    lengths, other = SMALL if small else (LENGTHS, OTHER)
    layout, layout_k = Layout.from_lengths(lengths), Layout.from_lengths(other)
    dim = 16 if small else 64
    build = partial(_attention, device)
    documents = shapes.early_fusion(1 if small else 6, 2, dim, images=(1, 2), patches=(16,), text=12 if small else 80)
    latest = shapes.flamingo(1 if small else 6, 2, dim, 8, images=(1, 3), text=(9, 20) if small else (40, 200))
    queries = shapes.q_former(2, 8 if small else 32, 40 if small else 600, 2, dim)
    found = {
        "attention, causal": partial(build, layout, layout, ModalityMask.causal(), 2, 2, dim),
        "attention, cross": partial(build, layout, layout_k, ModalityMask.full(), 2, 2, dim),
        "attention, grouped heads, D 128": partial(build, layout, layout_k, ModalityMask.full(), 4, 1, 128),
        "attention, window and softcap": partial(
            build, layout, layout, ModalityMask.causal((40, -1)), 2, 2, dim, softcap=20.0
        ),
        "attention, dropout": partial(build, layout, layout_k, ModalityMask.full(), 2, 2, dim, dropout_p=0.25),
        "attention, Q-Former": partial(build, queries.layout_q, queries.layout_k, queries.mask, 2, 2, dim),
        "attention, early fusion": partial(build, documents.layout_q, documents.layout_k, documents.mask, 2, 2, dim),
        "attention, Flamingo": partial(build, latest.layout_q, latest.layout_k, latest.mask, 2, 2, dim),
        "rotary": partial(_rotary, device, layout, dim, False),
        "rotary, q and k normed": partial(_rotary, device, layout, dim, True),
    }
    for norm in ("layer norm", "RMS norm"):
        found[f"pack, {norm}"] = partial(_pack, device, lengths, other, 24 if small else 200, norm)
    found["unpack"] = partial(_unpack, device, lengths, other, 24 if small else 200)
    for norm in ("linf", "l2"):
        found[f"perturb_, {norm}"] = partial(_perturb, device, layout, norm, "sample")
        found[f"random_start_, {norm}"] = partial(_random_start, device, layout, norm)
    found["perturb_, l2 by token"] = partial(_perturb, device, layout, "l2", "token")
    pairs = (19, 16) if small else (650, 200)
    for kind in ("infonce", "sigmoid"):
        found[f"contrastive_loss, {kind}"] = partial(_contrastive, device, *pairs, kind)
    return found


def _randn(device, *size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(device)


def _attention(device, layout_q, layout_k, mask, heads, heads_k, dim, dropout_p=0.0, softcap=0.0) -> Probe:
    layouts = [layout_q.to(device), layout_k.to(device)]
    seed = torch.full((), 7, dtype=torch.int64, device=device) if dropout_p else None
    sizes = [(layout_q.total, heads), (layout_k.total, heads_k), (layout_k.total, heads_k)]

    def function(backend, q, k, v):
        more = {"softcap": softcap, "dropout_p": dropout_p, "dropout_seed": seed}
        return [mmfast.attention(q, k, v, *layouts, mask, backend=backend, **more)]

    return Probe(function, [_randn(device, *size, dim, seed=i) for i, size in enumerate(sizes)], 3)


def _rotary(device, layout, dim, norm) -> Probe:
    where = layout.to(device)
    inputs = [_randn(device, layout.total, heads, dim, seed=heads) for heads in (4, 2)]
    inputs += [_randn(device, dim, seed=i) for i in (5, 6)] if norm else []

    def function(backend, q, k, *weights):
        return mmfast.rotary(q, k, where, qk_norm=(*weights, 1e-6) if norm else None, backend=backend)

    return Probe(function, inputs, len(inputs))


def _pack(device, images, texts, dim, norm) -> Probe:
    counts = [torch.tensor(n, dtype=torch.int32, device=device) for n in (images, texts)]
    rows = (sum(images), sum(texts), 2, max(images), max(texts), *([1] * (2 if norm == "layer norm" else 1)))
    inputs = [_randn(device, n, dim, seed=i) for i, n in enumerate(rows)]

    def function(backend, image, text, types, image_table, text_table, *weights):
        kind = mmfast.LayerNorm if norm == "layer norm" else mmfast.RMSNorm
        out, _ = mmfast.pack(
            {"image": mmfast.Part(image, counts[0]), "text": mmfast.Part(text, counts[1])},
            type_embedding=types,
            position_embedding={"image": image_table, "text": text_table},
            norm=kind(*(w[0] for w in weights)),
            backend=backend,
        )
        return [out]

    return Probe(function, inputs, len(inputs))


def _unpack(device, images, texts, dim) -> Probe:
    sizes = {"image": images, "text": texts}
    parts = {
        name: mmfast.Part(_randn(device, sum(n), dim), torch.tensor(n, dtype=torch.int32, device=device))
        for name, n in sizes.items()
    }
    layout = pack_layout(parts, None)[0]
    x = _randn(device, sum(images) + sum(texts), dim)
    return Probe(lambda backend, x: list(mmfast.unpack(x, layout, backend=backend).values()), [x], 1)


def _perturb(device, layout, norm, granularity) -> Probe:
    where = layout.to(device)
    step, eps = (0.01, 0.03) if norm == "linf" else (0.5, 2.0)
    delta, grad = (_randn(device, layout.total, 6, 8, seed=i) for i in (0, 1))

    def function(backend, delta, grad, origin):
        options = {"step_size": step, "eps": eps, "norm": norm, "granularity": granularity, "layout": where}
        return [mmfast.perturb_(delta.clone(), grad, origin=origin, bounds=(0, 1), backend=backend, **options)]

    return Probe(function, [delta * 0.01, grad, _randn(device, *delta.shape, seed=2).sigmoid()])


def _random_start(device, layout, norm) -> Probe:
    where = layout.to(device)
    seed = torch.full((), 11, dtype=torch.int64, device=device)

    def function(backend, delta):
        return [mmfast.random_start_(delta.clone(), eps=0.5, norm=norm, seed=seed, layout=where, backend=backend)]

    return Probe(function, [torch.zeros(layout.total, 48, device=device)])


def _contrastive(device, n, d, kind) -> Probe:
    rng = random.Random(0)
    ids = torch.tensor([rng.randrange(n) for _ in range(n)], device=device)  # some pairs are alike
    inputs = [normalize(_randn(device, n, d, seed=i), dim=1) for i in (0, 1)]
    numbers = [torch.tensor(value, device=device) for value in (20.0, -10.0)]

    def function(backend, x, y, scale, bias):
        bias = bias if kind == "sigmoid" else None
        return [mmfast.contrastive_loss(x, y, scale=scale, kind=kind, bias=bias, ids=ids, backend=backend)]

    return Probe(function, [*inputs, *numbers], 4 if kind == "sigmoid" else 3)
