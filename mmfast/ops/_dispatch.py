"""Which backend runs an op, and why another cannot.

An explicit `backend=` beats the environment variable MMFAST_BACKEND (read once, at import), which beats the
automatic choice. An explicit backend that cannot run raises and says why. The automatic choice falls back to the
reference with one log line per op and reason, never silently.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping

import torch

from mmfast import _native

logger = logging.getLogger("mmfast")

BACKENDS = ("cpu", "triton", "cuda", "reference")
_ONLY_ASKED_FOR = ("cuda",)  # no measurement says that they are faster than another

_forced: str | None = os.environ.get("MMFAST_BACKEND") or None
# Triton reads the variable when kernels are defined, so that it cannot change later.
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
no_triton = None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"
_logged: set[tuple[str, str]] = set()


@contextlib.contextmanager
def use_backend(name: str | None):
    """Within the context every op without an explicit `backend=` runs on `name`, as with MMFAST_BACKEND."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def wish(backend: str | None) -> str | None:
    """The backend that the caller or else the environment asks for; None: the best that can run."""
    return backend or _forced


def choose(op: str, backend: str | None, refusals: Mapping[str, Callable[..., str | None]], *call) -> str:
    """The backend that runs `op`.

    Args:
        op: name for messages.
        backend: the caller's explicit choice, or None.
        refusals: backend name to a function of `call` that returns None where it can run, else the reason why not; in
            order of preference. `reference` needs no entry: it always runs.
        call: what the functions are asked about.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: the explicit or forced backend cannot run; the message says why.
    """
    wanted = wish(backend)
    if wanted is not None:
        known = dict.fromkeys((*BACKENDS, *refusals))
        if wanted not in known:
            source = "backend" if backend else "MMFAST_BACKEND"
            raise ValueError(f"{op}: {source} is {wanted!r}; expected one of {', '.join(known)}")
        if wanted == "reference":
            return wanted
        reason = refusals[wanted](*call) if wanted in refusals else f"{op} has no such implementation"
        if reason is not None:
            raise RuntimeError(f"{op}: backend {wanted!r} cannot run: {reason}")
        return wanted
    reasons = []
    for name, refusal in refusals.items():
        if name in _ONLY_ASKED_FOR:
            continue
        reason = refusal(*call)
        if reason is None and name == "triton" and interpreted:
            reason = 'interpreted kernels are slow and run only with backend="triton" or MMFAST_BACKEND=triton'
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if not torch.compiler.is_compiling():
        _log_once(op, "; ".join(reasons))
    return "reference"


def _log_once(op: str, reason: str) -> None:
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        logger.warning("%s runs on the slow reference backend: %s", op, reason)


def cpu_refusal(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the CPU kernels cannot take these tensors, or None: module missing, another device, another dtype."""
    if _native.cpu_refusal is not None:
        return _native.cpu_refusal
    for t in tensors:
        if not t.is_cpu:
            return f"the tensors are on {t.device}, not on the CPU"
        if t.dtype not in dtypes:
            return f"dtype {str(t.dtype).removeprefix('torch.')} is not supported by the CPU kernels"
    return None


def triton_refusal(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None: no triton, no GPU it compiles for, another dtype.

    Under TRITON_INTERPRET=1 they take tensors on the CPU (and only those, and no bfloat16, whose products the
    interpreter gets wrong).
    """
    if no_triton is not None:
        return no_triton
    for t in tensors:
        name = str(t.dtype).removeprefix("torch.")
        if t.dtype not in dtypes:
            return f"dtype {name} is not supported by the Triton kernels"
        if interpreted:
            if t.device.type != "cpu":
                return f"TRITON_INTERPRET=1 runs kernels on the CPU, and the tensors are on {t.device}"
            if t.dtype == torch.bfloat16:
                return "Triton's interpreter gets products in bfloat16 wrong"
        elif t.device.type != "cuda":
            return f"the tensors are on {t.device}, not on a GPU"
        elif (reason := gpu_refusal(t.device)) is not None:
            return reason
    return None


def cuda_refusal(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the CUDA kernels cannot take these tensors, or None: module missing, no NVIDIA GPU from sm_80 on, dtype."""
    if _native.cuda_refusal is not None:
        return _native.cuda_refusal
    for t in tensors:
        if t.dtype not in dtypes:
            return f"dtype {str(t.dtype).removeprefix('torch.')} is not supported by the CUDA kernels"
        if t.device.type != _native.cuda().device:
            return f"the tensors are on {t.device}, not on a GPU"
        if t.is_cuda:
            if torch.version.hip is not None:
                return "the CUDA kernels are NVIDIA's only, and this is a GPU of AMD"
            if (reason := gpu_refusal(t.device)) is not None:
                return reason
    return None


def gpu_refusal(device: torch.device | int) -> str | None:
    """Why the GPU kernels cannot run on this device, or None: NVIDIA from sm_80 on, or AMD."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None and properties.major < 8:
        return f"{properties.name} is sm_{properties.major}{properties.minor}; sm_80 or newer is needed"
    return None
