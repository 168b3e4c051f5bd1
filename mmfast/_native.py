"""The only importer of the compiled modules: what is there, why not the rest, and how to force an instruction set."""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch  # before the compiled module, so that both use one OpenMP runtime

_cpu: ModuleType | None
cpu_refusal: str | None

try:
    from mmfast import _cpu

    cpu_refusal = None
except ImportError as error:
    _cpu = None
    cpu_refusal = (
        f"the compiled module mmfast._cpu cannot be imported ({error}); "
        "install a C++ compiler and reinstall mmfast to get the CPU kernels"
    )


def cpu() -> ModuleType:
    """The compiled CPU kernels. Raises RuntimeError with the reason where they are missing."""
    if _cpu is None:
        raise RuntimeError(f"mmfast: {cpu_refusal}")
    return _cpu


@contextlib.contextmanager
def use_isa(name: str):
    """Runs the CPU kernels of one instruction set: scalar, avx2, avx512 or avx512_bf16. For tests and benchmarks."""
    before = cpu().isa()
    cpu().set_isa(name)
    try:
        yield
    finally:
        cpu().set_isa(before)


def available_isas() -> tuple[str, ...]:
    """Instruction sets that the module was compiled for and this machine can run, weakest first."""
    names = ("scalar", "avx2", "avx512", "avx512_bf16")
    return names[: names.index(cpu().best_isa()) + 1]


__all__ = ["available_isas", "cpu", "cpu_refusal", "torch", "use_isa"]
