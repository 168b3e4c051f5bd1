"""Attention beside PyTorch's: SDPA where lengths are equal, else a Python loop of SDPA over the samples.

    pytest benchmarks/bench_attention.py --benchmark-only --benchmark-group-by=group
    python benchmarks/bench_attention.py [threads] [workload ...]

The first runs each contestant by itself; the second interleaves them, which a busy machine needs, and prints useful
GFLOP/s: 4 D per visible cell forward, 14 D forward and backward.
"""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import mmfast
from mmfast.testing.bench import interleaved_medians
from mmfast.testing.shapes import WORKLOADS, Workload, one_sample

DTYPES = (torch.float32, torch.bfloat16)


def peer(load: Workload):
    """PyTorch's way through the same workload, with everything prepared that can be."""
    lengths_q, lengths_k = load.lengths_q, load.lengths_k
    causal = load.rule == "causal"
    if load.rule and len(set(lengths_q)) == len(set(lengths_k)) == 1:
        batch = len(lengths_q)

        def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)

        return padded
    masks = [None] * len(lengths_q)
    if not load.rule:
        masks = [
            load.mask.visible(one_sample(load.layout_q, b), one_sample(load.layout_k, b)) for b in range(len(lengths_q))
        ]

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for *qkv, mask in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), masks):
            one = [x.transpose(0, 1)[None] for x in qkv]
            out.append(scaled_dot_product_attention(*one, attn_mask=mask, is_causal=causal)[0].transpose(0, 1))
        return torch.cat(out)

    return loop


def contestants(load: Workload, dtype: torch.dtype, backward: bool) -> dict:
    """Name -> what to run, after checking that they agree."""
    q, k, v, dout = load.tensors(dtype, requires_grad=backward)
    other = peer(load)

    def ours(q, k, v):
        return mmfast.attention(q, k, v, load.layout_q, load.layout_k, load.mask)

    # A row that sees nothing is NaN in some of PyTorch's kernels.
    error = (ours(q, k, v).float() - other(q, k, v).float().nan_to_num(0)).abs().max().item()
    assert error < (0.05 if dtype == torch.bfloat16 else 1e-4), error

    def step(function):
        if not backward:
            return lambda: function(q, k, v)
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), dout)

    return {"mmfast": step(ours), "pytorch": step(other)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("who", ["mmfast", "pytorch"])
def test_attention(benchmark, name, dtype, backward, who):
    load = WORKLOADS[name]()
    benchmark.group = f"{load.name} {str(dtype).removeprefix('torch.')} {'f+b' if backward else 'fwd'}"
    benchmark(contestants(load, dtype, backward)[who])
    flops = (14 if backward else 4) * load.dim * load.cells()
    benchmark.extra_info["useful GFLOP/s"] = round(flops / benchmark.stats.stats.median / 1e9, 1)


def main(arguments: list[str]) -> None:
    threads = int(arguments[0]) if arguments else 1
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"{'workload':24} {'dtype':9} {'forward: mmfast':>16} {'pytorch':>8} {'f+b: mmfast':>13} {'pytorch':>8}")
    for name in arguments[1:] or WORKLOADS:
        load = WORKLOADS[name]()
        for dtype in DTYPES:
            line = f"{load.name:24} {str(dtype).removeprefix('torch.'):9}"
            for backward, factor in ((False, 4), (True, 14)):
                seconds = interleaved_medians(contestants(load, dtype, backward), clock=clock)
                rates = {who: factor * load.dim * load.cells() / t / 1e9 for who, t in seconds.items()}
                ratio = rates["mmfast"] / rates["pytorch"]
                line += f" {rates['mmfast']:8.1f} {rates['pytorch']:7.1f} {ratio:5.2f}x"
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
