"""Attention beside PyTorch's: SDPA on the padded batch, and SDPA per sample in a loop.

Useful operations: 4 D for each visible (query, key) cell forward, 10 D backward. Every peer holds its inputs in its own
form (padded, or packed and split in the loop), with masks made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mmfast
from mmfast.testing import shapes
from mmfast.testing.cases import DTYPES, Case, Contest, agree, leaves, results
from mmfast.testing.shapes import Workload, one_sample

FUSION = "early fusion, 6 documents, 4k tokens"
FLEX = ("flex_attention",)  # on a CPU it has no backward pass
WORKLOADS = {
    "dense 8x12x512x64": partial(shapes.dense, 8, 512, 12, 64),
    "dense 4x8x1024x128": partial(shapes.dense, 4, 1024, 8, 128),
    "causal 8x12x512x64": partial(shapes.causal, 8, 512, 12, 64),
    "causal 4x8x1024x128": partial(shapes.causal, 4, 1024, 8, 128),
    "ragged cross-attention, text onto image": shapes.cross_attention,
    FUSION: partial(shapes.early_fusion, seed=4, images=(2, 4), patches=(64, 144, 256), text=200),
    "Q-Former, 32 queries onto 257": partial(shapes.q_former, 8, 32, 257),
    "Q-Former, 32 queries onto 1024": partial(shapes.q_former, 8, 32, 1024),
    "Flamingo, text onto latest image": shapes.flamingo,
    "256 samples of 1 to 16": shapes.tiny,
    "one sample of 8192, causal": partial(shapes.causal, 1, 8192, 12, 64),
}
SMALL = {
    "dense": partial(shapes.dense, 2, 40, 2, 16),
    "causal": partial(shapes.causal, 2, 40, 2, 16),
    "ragged cross-attention": partial(shapes.cross_attention, 3, 2, 16),
    "early fusion": partial(shapes.early_fusion, 3, 2, 16),
    "Flamingo": partial(shapes.flamingo, 3, 2, 16, patches=8, text=(20, 60)),
    "tiny samples": partial(shapes.tiny, 9, 2, 16),
}
SLOW = ("causal 4x8x1024x128", "one sample of 8192, causal")  # not for --quick


def cases(small: bool = False) -> list[Case]:
    found = []
    for name, load in (SMALL if small else WORKLOADS).items():
        for dtype in DTYPES:
            for measured in ("forward", "forward+backward"):
                peers = peer_names(load())
                make = partial(contest, load, dtype, measured != "forward", peers)
                found.append(
                    Case("attention", name, measured, dtype, peers, make, "arithmetic", quick=name not in SLOW)
                )
    name = "early fusion" if small else FUSION
    for dtype in DTYPES:  # compiling takes the peer a quarter of a minute, so that it has a row of its own
        make = partial(contest, (SMALL if small else WORKLOADS)[name], dtype, False, FLEX)
        beside = f"{name}, beside FlexAttention"
        found.append(Case("attention", beside, "forward", dtype, FLEX, make, "arithmetic", quick=False))
    return found


def contest(
    load: Callable[[], Workload],
    dtype: torch.dtype,
    backward: bool,
    names: Sequence[str],
    device="cpu",
    builders: Mapping[str, Callable] = MappingProxyType({}),
) -> Contest:
    """Ours beside the named peers, which `PEERS` or `builders` make (see PEERS)."""
    load = load()
    packed = load.tensors(dtype)
    seen = rows_that_see(load)
    packed[3][~seen] = 0  # so that peers, whose such rows look somewhere, have the same gradients
    packed = [x.to(device) for x in packed]
    layouts = load.layout_q.to(device), load.layout_k.to(device)

    def ours(q, k, v):
        return mmfast.attention(q, k, v, *layouts, load.mask)

    ways = {name: {**PEERS, **builders}[name](load, packed) for name in names}
    peers = {name: step(function, inputs, backward) for name, (function, inputs, _) in ways.items()}
    run = step(ours, leaves(packed), backward)

    def check():
        """On the first and the last head, which are enough to see every row and cell."""
        some = [x[:, [0, -1]] for x in packed]
        function, inputs, _ = _loop(load, some)
        exact, plain = (step(function, leaves(inputs, t), backward)() for t in (torch.float64, dtype))
        theirs = results(peers)
        for name, values in theirs.items():
            values = [ways[name][2](x, "qqkk"[i])[:, [0, -1]] for i, x in enumerate(values)]
            theirs[name] = [values[0] * seen[:, None, None].to(values[0]), *values[1:]]
        keep = seen[:, None, None].to(device)
        exact, plain = ([x[0] * keep, *x[1:]] for x in (exact, plain))
        agree([x[:, [0, -1]] for x in run()], exact, plain, theirs, gradients_from=1)

    work = (14 if backward else 4) * load.dim * load.cells()
    return Contest(run, peers, check, work)


def step(function: Callable[..., Tensor], inputs: Sequence[Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    """The output; with `backward` also the gradients of q, k and v."""
    *qkv, dout = inputs

    def forward():
        with torch.no_grad():
            return [function(*qkv)]

    def both():
        out = function(*qkv)
        return [out, *torch.autograd.grad(out, qkv, dout)]

    return both if backward else forward


def peer_names(load: Workload) -> tuple[str, ...]:
    equal = len(set(load.lengths_q)) == len(set(load.lengths_k)) == 1
    return ("SDPA",) if load.rule and equal else ("SDPA loop", "SDPA padded")


# A peer: function of q, k and v; its inputs; and how to bring a result, of the "q" or "k" side, into the packed form.


def _padded(load: Workload, packed: Sequence[Tensor]):
    """`[B, L, H, D]` with a mask: over keys where every key of the sample is visible, else over cells; or none."""
    device = packed[0].device
    lengths = {"q": load.layout_q.lengths(), "k": load.layout_k.lengths()}
    real = {side: torch.arange(int(n.max())) < n[:, None] for side, n in lengths.items()}
    inputs = []
    for x, side in zip(packed, "qkkq"):
        padded = x.new_zeros(*real[side].shape, *x.shape[1:])
        padded[real[side]] = x
        inputs.append(padded.requires_grad_())
    mask = None
    if not load.rule:
        mask = torch.zeros(len(lengths["q"]), 1, real["q"].shape[1], real["k"].shape[1], dtype=torch.bool)
        for b in range(len(mask)):
            visible = load.mask.visible(one_sample(load.layout_q, b), one_sample(load.layout_k, b))
            mask[b, 0, : visible.shape[0], : visible.shape[1]] = visible
        mask = _look_somewhere(mask).to(device)
    elif load.rule == "full" and not real["k"].all():
        mask = real["k"][:, None, None].to(device)
    causal = load.rule == "causal"  # hides the padding at the end too

    def function(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)

    return function, inputs, lambda x, side: x[real[side]]


def _loop(load: Workload, packed: Sequence[Tensor]):
    """One call for each sample, on views of the packed tensors."""
    lengths_q, lengths_k = load.lengths_q, load.lengths_k
    masks = [None] * len(lengths_q)
    if not load.rule:
        pairs = [(one_sample(load.layout_q, b), one_sample(load.layout_k, b)) for b in range(len(lengths_q))]
        masks = [_look_somewhere(load.mask.visible(*pair)).to(packed[0].device) for pair in pairs]
    causal = load.rule == "causal"

    def function(q, k, v):
        out = []
        for *qkv, mask in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), masks):
            one = [x.transpose(0, 1)[None] for x in qkv]
            out.append(scaled_dot_product_attention(*one, attn_mask=mask, is_causal=causal)[0].transpose(0, 1))
        return torch.cat(out)

    return function, leaves(packed), lambda x, side: x


def _flex(load: Workload, packed: Sequence[Tensor]):
    """FlexAttention over all tokens as one sequence, compiled, for rule CAUSAL within each sample."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total = packed[0].device, packed[0].shape[0]
    sample, time = load.layout_q.samples().to(device), load.layout_q.times().to(device)

    def visible(_, head, i, j):
        return (sample[i] == sample[j]) & (time[j] <= time[i])

    mask = create_block_mask(visible, None, None, total, total, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    inputs = [x.transpose(0, 1)[None].contiguous() for x in packed]
    return partial(compiled, block_mask=mask), inputs, lambda x, side: x[0].transpose(0, 1)


PEERS = {"flex_attention": _flex, "SDPA": _padded, "SDPA padded": _padded, "SDPA loop": _loop}


def _look_somewhere(mask: Tensor) -> Tensor:
    """Rows that see nothing look everywhere: SDPA would make them NaN."""
    return mask | ~mask.any(-1, keepdim=True)


def rows_that_see(load: Workload) -> Tensor:
    """bool `[Tq]`: the row sees at least one key."""
    if load.rule:
        return torch.ones(sum(load.lengths_q), dtype=torch.bool)
    batch = range(len(load.lengths_q))
    return torch.cat(
        [load.mask.visible(one_sample(load.layout_q, b), one_sample(load.layout_k, b)).any(1) for b in batch]
    )
