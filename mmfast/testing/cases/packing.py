"""`pack` and `unpack` beside the chain of torch indexing, adds and norm.

Bytes that must move: every token read once and written once; backward, the gradient and the tokens read, the tokens'
gradient written. Both directions allocate what they return, so they are held to `clone`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import layer_norm, rms_norm

import mmfast
from mmfast.ops._pack_layout import pack_layout
from mmfast.testing.cases import DTYPES, Case, Contest, agree, leaves, results

LENGTHS = ("ragged", "equal lengths")
NORMS = ("layer norm", "RMS norm")


def cases(small: bool = False) -> list[Case]:
    samples, dim = (4, 24) if small else (64, 768)
    found = []
    for lengths in LENGTHS:
        for norm in NORMS:
            workload = f"type, position, {norm}; {lengths}"
            for dtype in DTYPES:
                for measured in ("forward", "backward"):
                    make = partial(pack_contest, dtype, norm, lengths, measured == "backward", samples, dim)
                    quick = (lengths, norm) == (LENGTHS[0], NORMS[0])
                    found.append(Case("pack", workload, measured, dtype, ("torch chain",), make, "memory", quick))
        for dtype in DTYPES:
            for measured in ("forward", "backward"):
                make = partial(unpack_contest, dtype, lengths, measured == "backward", samples, dim)
                quick = lengths == LENGTHS[0]
                found.append(Case("unpack", lengths, measured, dtype, ("torch indexing",), make, "memory", quick))
    return found


def batch(dtype: torch.dtype, lengths: str, samples: int, dim: int, device):
    """Images of up to 256 rows and texts of up to 128, one of each per sample: parts, and their layout."""
    g = torch.Generator().manual_seed(0)
    counts = [torch.randint(n // 4, n + 1, (samples,), generator=g) for n in (256, 128)]
    if lengths != "ragged":
        counts = [torch.full((samples,), int(n.float().mean())) for n in counts]
    tokens = [torch.randn(int(n.sum()), dim, generator=g).to(device, dtype) for n in counts]
    counts = [n.int().to(device) for n in counts]
    parts = {name: mmfast.Part(t, n) for name, t, n in zip(("image", "text"), tokens, counts)}
    return parts, *pack_layout(parts, None)


def pack_contest(dtype, norm, lengths, backward, samples, dim, device="cpu", compiled=False) -> Contest:
    parts, layout, place = batch(dtype, lengths, samples, dim, device)
    g = torch.Generator().manual_seed(1)
    sizes = [(2, dim), (257, dim), (129, dim), (dim,), *([(dim,)] if norm == NORMS[0] else [])]
    parameters = [torch.randn(*size, generator=g).to(device, dtype) for size in sizes]
    inputs = [*(part.tokens for part in parts.values()), *parameters]
    grad = torch.randn(layout.total, dim, generator=g).to(device, dtype)
    # What the chain indexes with is made beforehand: it pays for its own indexing, not for building the layout.
    modality = layout.modality.long()
    table_row = place + torch.tensor([0, 257], device=device)[modality]

    def ours(image, text, types, image_table, text_table, *norm_parameters):
        kind = mmfast.LayerNorm if norm == NORMS[0] else mmfast.RMSNorm
        return mmfast.pack(
            {name: mmfast.Part(t, parts[name].item_lengths) for name, t in (("image", image), ("text", text))},
            type_embedding=types,
            position_embedding={"image": image_table, "text": text_table},
            norm=kind(*norm_parameters),
        )[0]

    def chain(image, text, types, image_table, text_table, *norm_parameters):
        x = torch.cat([image, text])[layout.source] + types[modality]
        x = x + torch.cat([image_table, text_table])[table_row]
        return (
            layer_norm(x, (dim,), *norm_parameters) if norm == NORMS[0] else rms_norm(x, (dim,), *norm_parameters, 1e-6)
        )

    ways = {"mmfast": ours, "torch chain": chain, **compiled_peer(chain, compiled)}
    return contest(ways, chain, inputs, grad, backward, passes=3 if backward else 2)


def unpack_contest(dtype, lengths, backward, samples, dim, device="cpu") -> Contest:
    parts, layout, _ = batch(dtype, lengths, samples, dim, device)
    rows = [(layout.modality == m).nonzero()[:, 0] for m in range(len(parts))]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(layout.total, dim, generator=g).to(device, dtype)
    grads = [torch.randn(len(r), dim, generator=g).to(device, dtype) for r in rows]
    ways = {
        "mmfast": lambda x: list(mmfast.unpack(x, layout).values()),
        "torch indexing": lambda x: [x[r] for r in rows],
    }
    return contest(ways, ways["torch indexing"], [x], grads, backward, passes=2)


def compiled_peer(chain, wanted: bool) -> dict:
    """The chain through torch.compile, whose backward pass may be repeated."""
    if not wanted:
        return {}
    torch._functorch.config.donated_buffer = False
    return {"torch.compile": torch.compile(chain, dynamic=False)}


def contest(ways: dict, formula, inputs, grad, backward: bool, passes: int) -> Contest:
    """Ours and one peer, forward alone or backward alone; the formula in float64 and as it is are the oracle.

    Args:
        ways: name -> function of `inputs`, ours under "mmfast".
        grad: gradient of its output, a tensor or one for each output.
        passes: how often an array of the output's size must be read or written.
    """
    grads = [grad] if isinstance(grad, torch.Tensor) else grad

    def run(function, dtype=None):
        mine, dout = leaves(inputs, dtype), [g.to(dtype or g.dtype) for g in grads]
        if not backward:

            def forward():
                with torch.no_grad():
                    out = function(*mine)
                return [out] if isinstance(out, torch.Tensor) else list(out)

            return forward
        out = function(*mine)
        return lambda: torch.autograd.grad(out, mine, dout, retain_graph=True)

    runs = {name: run(function) for name, function in ways.items()}
    ours = runs.pop("mmfast")
    nbytes = sum(g.nbytes for g in grads)
    fresh = tuple(x.nbytes for x in (inputs if backward else grads) if x.nbytes > 0.05 * nbytes)

    def check():
        exact, plain = run(formula, torch.float64)(), run(formula)()
        agree(ours(), exact, plain, results(runs), gradients_from=0 if backward else None)

    return Contest(ours, runs, check, work=passes * nbytes, fresh=fresh)
