"""mmfast.rotary beside the usual torch form (Llama's rotate_half, RMS norm before it) and the copy bandwidth.

    pytest benchmarks/bench_rotary.py --benchmark-columns=min,median --benchmark-group-by=group

extra_info["gbs"] counts q and k read once and written once.
"""

import pytest
import torch

from mmfast import Layout, _native, rotary

pytestmark = pytest.mark.skipif(_native.cpu_refusal is not None, reason=str(_native.cpu_refusal))

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Workload:
    def __init__(self, dtype, norm, ragged, heads=12, kv_heads=4, dim=64):
        g = torch.Generator().manual_seed(0)
        lengths = torch.randint(32, 512, (32,), generator=g) if ragged else torch.full((32,), 272)
        self.layout, self.norm = Layout.from_lengths(lengths), norm
        rows = self.layout.total
        self.q = torch.randn(rows, heads, dim, generator=g).to(dtype).requires_grad_()
        self.k = torch.randn(rows, kv_heads, dim, generator=g).to(dtype).requires_grad_()
        self.weights = [torch.randn(dim, generator=g).to(dtype).requires_grad_() for _ in range(2)]
        # The peer's table is made beforehand, as a model shares it between its layers.
        angle = self.layout.positions()[:, None] * 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))
        self.cos, self.sin = (torch.cat([t, t], 1)[:, None].to(dtype) for t in (angle.cos(), angle.sin()))
        self.leaves = [self.q, self.k, *(self.weights if norm else [])]
        self.bytes = 2 * (self.q.numel() + self.k.numel()) * self.q.element_size()

    def fused(self):
        return rotary(self.q, self.k, self.layout, qk_norm=(*self.weights, 1e-6) if self.norm else None)

    def chain(self):
        out = []
        for x, weight in zip((self.q, self.k), self.weights):
            if self.norm:
                x = torch.nn.functional.rms_norm(x, x.shape[2:], weight, 1e-6)
            a, b = x.chunk(2, 2)
            out.append(x * self.cos + torch.cat([-b, a], 2) * self.sin)
        return out


@pytest.fixture(
    params=[(d, n, r) for d in DTYPES for n in ("plain", "norm") for r in ("ragged", "equal")],
    ids=lambda p: "-".join(p),
)
def workload(request, benchmark):
    dtype, norm, ragged = request.param
    benchmark.group = f"{request.node.originalname}-{'-'.join(request.param)}"
    work = Workload(DTYPES[dtype], norm == "norm", ragged == "ragged")
    for got, want in zip(work.fused(), work.chain()):
        torch.testing.assert_close(got, want, rtol=5e-2, atol=1e-1)
    return work


def measure(benchmark, function, moved):
    benchmark.pedantic(function, rounds=25, warmup_rounds=3)
    benchmark.extra_info["gbs"] = moved / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("who", ["clone", "rotary", "torch"])
def test_forward(benchmark, workload, who):
    function = {
        "clone": lambda: (workload.q.clone(), workload.k.clone()),
        "rotary": workload.fused,
        "torch": workload.chain,
    }
    with torch.no_grad():
        measure(benchmark, function[who], workload.bytes)


@pytest.mark.parametrize("who", ["clone", "rotary", "torch"])
def test_backward(benchmark, workload, who):
    out = workload.chain() if who == "torch" else workload.fused()
    grads = [torch.randn(x.shape).to(x.dtype) for x in out]
    if who == "clone":
        return measure(benchmark, lambda: [g.clone() for g in grads], workload.bytes)
    measure(
        benchmark,
        lambda: torch.autograd.grad(out, workload.leaves, grads, retain_graph=True),
        workload.bytes * (1.5 if workload.norm else 1),
    )
