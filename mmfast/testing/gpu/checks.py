"""Checks of every op that only a GPU can answer, beside the oracle: same bits, no waiting for the device, graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmfast.testing.cases import agree
from mmfast.testing.gpu.probes import Probe
from mmfast.testing.numeric import poisoned_empty

REPEATS = 50


def inputs_in(probe: Probe, dtype: torch.dtype, seed: int | None = None) -> list[Tensor]:
    """Fresh inputs; those without dimensions stay float32 unless all is float64. With a seed: other random values."""
    found = []
    for i, x in enumerate(probe.inputs):
        kept = x.dim() == 0 and dtype != torch.float64
        x = x.detach().to(torch.float32 if kept else dtype, copy=True)
        if seed is not None and x.dim():  # a row permutation: the same range and norms, other values
            order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed + i))
            x = x[order.to(x.device)]
        found.append(x.requires_grad_(i < probe.leaves))
    return found


def forward(probe: Probe, backend: str, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(probe.function(backend, *inputs))


def gradients(probe: Probe, out: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    if not probe.leaves:
        return []
    wanted = list(inputs[: probe.leaves])
    return list(torch.autograd.grad(out, wanted, [g.to(x.dtype) for g, x in zip(grads, out)], retain_graph=True))


def both(probe: Probe, backend: str, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    out = forward(probe, backend, inputs)
    return [x.detach() for x in [*out, *gradients(probe, out, inputs, grads)]]


def output_grads(probe: Probe, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of the outputs: of the dtype's numbers, the same for oracle and kernel."""
    out = forward(probe, backend, inputs_in(probe, dtype))
    g = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=g).to(x.device, x.dtype) for x in out]


def check_oracle(probe: Probe, backend: str, dtype: torch.dtype) -> None:
    """Forward and backward against the reference in float64, by the error rule, with poisoned outputs."""
    inputs, grads = inputs_in(probe, dtype), output_grads(probe, backend, dtype)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]  # of the same, rounded numbers
    with poisoned_empty():
        actual = both(probe, backend, inputs, grads)
    oracle = both(probe, "reference", exact, grads)
    plain = both(probe, "reference", inputs, grads)
    first = len(forward(probe, backend, inputs))
    agree(actual, oracle, plain, {}, gradients_from=first)


def check_same_bits(probe: Probe, backend: str, dtype: torch.dtype, repeats: int = REPEATS) -> None:
    """Forward and backward, again and again."""
    inputs, grads = inputs_in(probe, dtype), output_grads(probe, backend, dtype)
    first = both(probe, backend, inputs, grads)
    for i in range(1, repeats):
        for j, (a, b) in enumerate(zip(first, both(probe, backend, inputs, grads))):
            if not torch.equal(a, b):
                worst = (a.double() - b.double()).abs().max().item()
                raise AssertionError(f"result {j} of run {i} differs from the first by {worst:.1e}")


@contextlib.contextmanager
def waiting_is_an_error():
    """Within the context, what makes the host wait for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def check_no_waiting(probe: Probe, backend: str, dtype: torch.dtype) -> None:
    """Forward and backward of warm kernels never wait for the device."""
    inputs, grads = inputs_in(probe, dtype), output_grads(probe, backend, dtype)
    both(probe, backend, inputs, grads)
    with waiting_is_an_error():
        both(probe, backend, inputs, grads)


def check_graph(probe: Probe, backend: str, dtype: torch.dtype) -> None:
    """Captured once, replayed on other inputs: the same bits as without a graph."""
    inputs, grads = inputs_in(probe, dtype), output_grads(probe, backend, dtype)
    run = captured(lambda: both(probe, backend, inputs, grads))
    for seed in (100, 200):
        others = inputs_in(probe, dtype, seed)
        with torch.no_grad():
            for x, other in zip(inputs, others):
                x.copy_(other)
        found, wanted = run(), both(probe, backend, others, grads)
        for j, (a, b) in enumerate(zip(found, wanted, strict=True)):
            if not torch.equal(a, b):
                raise AssertionError(f"result {j} of the replayed graph differs by {(a - b).abs().max().item():.1e}")


def captured(function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Runs as a CUDA graph; each call replays it and returns the same tensors, filled anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a warm-up outside the default stream, as capturing needs
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def run():
        graph.replay()
        return out

    return run


CHECKS = {
    "oracle": check_oracle,
    "same bits 50 times": check_same_bits,
    "no waiting": check_no_waiting,
    "CUDA graph": check_graph,
}
