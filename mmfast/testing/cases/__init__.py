"""The benchmark cases, each defined once, for `mmfast bench`, for `pytest benchmarks` and for the tests.

A file of this folder has a function `cases(small)` that returns its cases; `small` shrinks them for the tests. To add a
case, add to it:

    def make(device):
        x = torch.randn(1 << 20, device=device)
        peers = {"torch": lambda: torch.sort(x).values}
        ours = lambda: mmfast.sort(x)
        check = lambda: agree([ours()], [torch.sort(x.double()).values], [torch.sort(x).values], results(peers))
        return Contest(ours, peers, check, work=2 * x.nbytes, fresh=(x.nbytes,))

    Case("sort", "1M numbers", "forward", torch.float32, ("torch",), make, ceiling="memory")
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmfast.testing.numeric import assert_close_to_oracle

FILES = ("attention", "scaling", "packing", "rotary", "perturbation", "contrastive", "overhead")
DTYPES = (torch.float32, torch.bfloat16)


@dataclasses.dataclass
class Contest:
    """What one case runs, built just before it is timed.

    Args:
        ours: mmfast's way; returns its results.
        peers: name -> the way of others. The suite takes out those that cannot run here.
        check: raises AssertionError where the results of `ours` and of `peers` do not agree.
        work: useful operations of one run, or bytes that it must move, as the case's ceiling says.
        fresh: bytes of each large tensor that one run allocates and returns.
    """

    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    check: Callable[[], None]
    work: float = 0.0
    fresh: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A line of the suite.

    Args:
        op: what is measured; the table's heading.
        workload: on what; the table's row, and pytest-benchmark's group.
        measured: "forward", "backward", "forward+backward" or "step".
        dtype: of the tensors.
        peers: names of the contest's peers.
        make: device -> contest.
        ceiling: "arithmetic" (multiply-adds on registers), "memory" (a copy of as many bytes) or "" (none).
        quick: also part of `--quick`.
        new_pages: large tensors get new pages of the system each time; else the allocator keeps and reuses memory.
    """

    op: str
    workload: str
    measured: str
    dtype: torch.dtype
    peers: tuple[str, ...]
    make: Callable[[torch.device], Contest]
    ceiling: str = ""
    quick: bool = True
    new_pages: bool = False

    @property
    def dtype_name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def name(self) -> str:
        return f"{self.op}/{self.workload}/{self.measured}/{self.dtype_name}"


class WrongPeer(AssertionError):
    """A peer, whose name is `peer`, computes something else."""

    def __init__(self, peer: str, message: str):
        super().__init__(message)
        self.peer = peer


def all_cases(small: bool = False) -> list[Case]:
    """Every case, in the order of the report."""
    return [case for file in FILES for case in importlib.import_module(f"{__name__}.{file}").cases(small)]


def results(peers: Mapping[str, Callable[[], object]]) -> dict[str, Sequence[Tensor]]:
    """What each peer computes, as a sequence of tensors."""
    found = {name: run() for name, run in peers.items()}
    return {name: [x] if isinstance(x, Tensor) else list(x) for name, x in found.items()}


def agree(
    ours: Sequence[Tensor],
    oracle: Sequence[Tensor],
    plain: Sequence[Tensor],
    peers: Mapping[str, Sequence[Tensor]],
    *,
    gradients_from: int | None = None,
) -> None:
    """Checks ours by the error rule (`mmfast.testing.numeric`), and that the peers compute the same thing.

    Args:
        ours: results in the dtype of the case.
        oracle: the formula in float64.
        plain: the formula in plain PyTorch in the dtype of the case.
        peers: results of each peer; a peer may be five times as far from the oracle as `plain`, plus some roundings.
        gradients_from: from this result on they are gradients.
    """
    first = len(ours) if gradients_from is None else gradients_from
    eps = max(torch.finfo(x.dtype).eps for x in ours)
    for i, (mine, exact, same) in enumerate(zip(ours, oracle, plain, strict=True)):
        mine, exact, same = mine.detach(), exact.detach(), same.detach()
        if mine.dim():
            assert_close_to_oracle(f"mmfast, result {i}", mine, exact, same, gradient=i >= first)
        else:  # one number may be right by chance in plain PyTorch: no measure
            torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=2e-3 if eps > 1e-4 else 2e-6)
    for peer, values in peers.items():
        for i, (value, exact, same) in enumerate(zip(values, oracle, plain, strict=True)):
            error, plain_error = ((x.detach().double() - exact.detach()).abs().max().item() for x in (value, same))
            bound = 5 * plain_error + 16 * eps * exact.abs().max().item()
            if not error <= bound:
                raise WrongPeer(peer, f"{peer}, result {i}: error {error:.3e} exceeds {bound:.3e}")


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies that require gradients, in another dtype if one is given."""
    return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
