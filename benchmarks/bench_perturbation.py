"""One attack step on 64 images of 3 x 224 x 224: mmfast beside the forms that people use today.

    python -m pytest benchmarks/bench_perturbation.py

`functional` is the step as attack libraries write it (every operation makes a tensor), `inplace` the same formula with
in-place operations, `compile` the functional form under torch.compile. extra_info: GB/s of the bytes that must move.
"""

import pytest
import torch

import mmfast

SHAPE = (64, 3, 224, 224)
STEP, EPS = 2 / 255, 8 / 255
L2_STEP, L2_EPS = 0.5, 2.0


def functional_linf(d, g, x):
    adv = (x + d).detach() + STEP * g.sign()
    return torch.clamp(x + torch.clamp(adv - x, min=-EPS, max=EPS), min=0, max=1).detach() - x


def functional_l2(d, g, x):
    norms = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    adv = (x + d).detach() + L2_STEP * g / norms
    d = adv - x
    factor = torch.clamp(L2_EPS / d.flatten(1).norm(dim=1), max=1).view(-1, 1, 1, 1)
    return torch.clamp(x + d * factor, min=0, max=1).detach() - x


def inplace_linf(d, g, x, scratch):
    torch.sign(g, out=scratch)
    d.add_(scratch, alpha=STEP).clamp_(-EPS, EPS)
    torch.sub(1, x, out=scratch)
    torch.minimum(d, scratch, out=d)
    torch.neg(x, out=scratch)
    return torch.maximum(d, scratch, out=d)


def ours(norm):
    step, eps = (STEP, EPS) if norm == "linf" else (L2_STEP, L2_EPS)
    return lambda d, g, x: mmfast.perturb_(d, g, step_size=step, eps=eps, norm=norm, origin=x, bounds=(0, 1))


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(SHAPE, generator=generator).to(dtype)
    g = torch.randn(SHAPE, generator=generator).to(dtype)
    return torch.zeros_like(x), g, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("peer", ["mmfast", "functional", "inplace", "compile", "copy"])
def test_step(benchmark, peer, norm, dtype):
    benchmark.group = f"perturbation {norm} {str(dtype).removeprefix('torch.')}"
    d, g, x = inputs(dtype)
    functional = functional_linf if norm == "linf" else functional_l2
    if peer == "mmfast":
        run = ours(norm)
    elif peer == "functional":
        run = functional
    elif peer == "compile":
        run = torch.compile(functional)
    elif peer == "inplace":
        if norm == "l2":
            pytest.skip("written for L-inf only")
        scratch = torch.empty_like(x)

        def run(d, g, x):
            return inplace_linf(d, g, x, scratch)
    else:
        out = torch.empty_like(x)

        def run(d, g, x):
            return out.copy_(g)

    if peer != "copy":
        tolerance = 1e-6 if dtype == torch.float32 else 8e-3
        want = functional(*(t.clone() for t in (d, g, x)))
        torch.testing.assert_close(run(*(t.clone() for t in (d, g, x))), want, rtol=tolerance, atol=tolerance)
    benchmark.pedantic(run, args=(d, g, x), rounds=11, warmup_rounds=2)
    moved = (2 if peer == "copy" else 4) * x.nbytes
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)
