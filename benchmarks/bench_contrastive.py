"""Forward and backward of the contrastive losses beside the eager formula, which stores the N x N scores.

    python -m pytest benchmarks/bench_contrastive.py

extra_info: GFLOP/s counted as 8 N^2 D for every peer (the kernel computes the scores twice, eager stores them).
"""

import pytest
import torch

import mmfast

SHAPES = [(4096, 512), (1024, 768)]


def eager(x, y, scale, bias, kind):
    z = scale.to(x.dtype) * x @ y.T
    if kind == "sigmoid":
        z = z + bias.to(x.dtype)
        sign = 2 * torch.eye(len(x), dtype=x.dtype) - 1
        return -torch.nn.functional.logsigmoid(sign * z).sum() / len(x)
    labels = torch.arange(len(x))
    return (torch.nn.functional.cross_entropy(z, labels) + torch.nn.functional.cross_entropy(z.T, labels)) / 2


def ours(x, y, scale, bias, kind):
    return mmfast.contrastive_loss(x, y, scale=scale, kind=kind, **({"bias": bias} if kind == "sigmoid" else {}))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("peer", ["mmfast", "eager", "compile"])
def test_step(benchmark, peer, kind, dtype, shape):
    n, d = shape
    benchmark.group = f"contrastive {kind} {str(dtype).removeprefix('torch.')} {n}x{d}"
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1) for _ in range(2))
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    inputs = [x, y, scale] + ([bias] if kind == "sigmoid" else [])
    loss = {"mmfast": ours, "eager": eager, "compile": torch.compile(eager)}[peer]

    def step(function=loss):
        value = function(x, y, scale, bias, kind)
        return value, torch.autograd.grad(value, inputs)

    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    want, wanted = step(lambda *args: eager(*(a.float() if isinstance(a, torch.Tensor) else a for a in args)))
    value, grads = step()
    torch.testing.assert_close(value.float(), want, rtol=tolerance, atol=tolerance)
    for a, b in zip(grads[:2], wanted[:2]):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    if benchmark.stats:
        benchmark.extra_info["GFLOP/s"] = round(8 * n * n * d / benchmark.stats.stats.median / 1e9)
