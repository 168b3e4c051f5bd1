"""The only importer of the compiled modules: what is there, why not the rest, and how to force an instruction set."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
import weakref
from types import ModuleType

import torch  # before the compiled module, so that both use one OpenMP runtime

_cpu: ModuleType | None
_cuda: ModuleType | None
cpu_refusal: str | None
cuda_refusal: str | None

try:
    from mmfast import _cpu

    cpu_refusal = None
except ImportError as error:
    _cpu = None
    cpu_refusal = (
        f"the compiled module mmfast._cpu cannot be imported ({error}); "
        "install a C++ compiler and reinstall mmfast to get the CPU kernels"
    )


try:
    from mmfast import _cuda

    cuda_refusal = None
except ImportError as error:
    _cuda = None
    cuda_refusal = (
        f"the compiled module mmfast._cuda cannot be imported ({error}); "
        "install the CUDA toolkit (nvcc) and reinstall mmfast to get the CUDA kernels"
    )


def cpu() -> ModuleType:
    """The compiled CPU kernels. Raises RuntimeError with the reason where they are missing."""
    if _cpu is None:
        raise RuntimeError(f"mmfast: {cpu_refusal}")
    return _cpu


def cuda() -> ModuleType:
    """The compiled CUDA kernels. Raises RuntimeError with the reason where they are missing."""
    if _cuda is None:
        raise RuntimeError(f"mmfast: {cuda_refusal}")
    return _cuda


def stream_of(tensor: torch.Tensor) -> int:
    """The handle of the current stream of the tensor's device, for `cuda()`'s functions; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


@contextlib.contextmanager
def use_cuda(module: ModuleType):
    """Within the context `cuda()` is another module. For tests, which build one that runs on the CPU."""
    global _cuda, cuda_refusal
    before = _cuda, cuda_refusal
    _cuda, cuda_refusal = module, None
    try:
        yield
    finally:
        _cuda, cuda_refusal = before


# From this size on glibc maps every block anew (its M_MMAP_THRESHOLD grows to 32 MiB at most), and each of its pages is
# a fault: several times what a kernel takes. Smaller blocks come from memory that was in use before.
_MAPPED_BYTES = 32 << 20
_KEPT_BYTES = 256 << 20  # at most, of blocks that no tensor uses
_BLOCK = 4 << 20  # sizes are multiples of this, so that batches of about the same size share blocks
_kept: list[mmap.mmap] = []


def empty(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """torch.empty for the outputs of CPU kernels: large ones reuse the memory of large ones that are gone.

    Up to 256 MiB of unused memory is kept for that.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _MAPPED_BYTES or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device=device)
    block = min((b for b in _kept if size <= len(b) <= 2 * size), key=len, default=None)
    try:
        _kept.remove(block)
    except ValueError:  # none fits, or another thread took it
        block = mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    memory = (ctypes.c_char * size).from_buffer(block)  # lives as long as the tensor's storage
    weakref.finalize(memory, _keep, block).atexit = False
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """`empty` with x's shape and dtype; where it is small, PyTorch takes half the time if it need not read a shape."""
    if x.nbytes < _MAPPED_BYTES:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return empty(*x.shape, dtype=x.dtype)


def _keep(block: mmap.mmap) -> None:
    _kept.append(block)
    while sum(map(len, _kept)) > _KEPT_BYTES:
        _kept.pop(0)


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


__all__ = [
    "available_isas",
    "cpu",
    "cpu_refusal",
    "cuda",
    "cuda_refusal",
    "empty",
    "empty_like",
    "stream_of",
    "torch",
    "use_cuda",
    "use_isa",
]
