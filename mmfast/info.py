"""What this machine can run, and why not the rest: `mmfast info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

import mmfast
from mmfast import _native
from mmfast.backends import flash_attn, xformers
from mmfast.ops import _dispatch

EXTRAS = {
    "data": ("PIL", "fontTools", "resvg_py", "soundfile", "tqdm"),
    "train": ("tqdm", "tensorboard"),
    "plot": ("matplotlib",),
}


def collect() -> dict[str, dict[str, str]]:
    """Sections of name -> text: versions, instruction sets, backends, threads, data sets, extras."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "backends": _backends(),
        "data sets": _data_sets(),
        "extras": _extras(),
    }


def _versions() -> dict[str, str]:
    found = {"mmfast": mmfast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "safetensors", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    lines = {"system": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    lines["threads"] = f"{torch.get_num_threads()} (OMP_NUM_THREADS or torch.set_num_threads change it)"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            lines[f"GPU {i}"] = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    else:
        lines["GPU"] = "none that torch can use" + ("" if torch.version.cuda else " (this torch is built for the CPU)")
    return lines


def _backends() -> dict[str, str]:
    lines = {}
    if _native.cpu_refusal is None:
        compiled = _native.available_isas()
        module = _native.cpu()
        lines["cpu"] = f"runs; instruction set {module.isa()} of {', '.join(compiled)} that this machine can run"
    else:
        lines["cpu"] = f"refused: {_native.cpu_refusal}"
    lines["triton"] = _triton()
    lines["cuda"] = _cuda()
    lines["reference"] = "runs everywhere (plain PyTorch, slow)"
    for name, peer in (("flash_attn", flash_attn), ("xformers", xformers)):
        reason = peer.installed()
        lines[name] = f"refused: {reason}" if reason else f'installed: attention with backend="{name}" on a GPU'
    if forced := os.environ.get("MMFAST_BACKEND"):
        lines["MMFAST_BACKEND"] = f"{forced} is forced for every op"
    return lines


def _triton() -> str:
    if _dispatch.no_triton is not None:
        return f"refused: {_dispatch.no_triton}"
    if _dispatch.interpreted:
        return 'interpreted on the CPU (TRITON_INTERPRET=1), for tests: only where backend="triton" is asked for'
    if not torch.cuda.is_available():
        return "refused: there is no GPU that torch can use; TRITON_INTERPRET=1 interprets the kernels on the CPU"
    reason = _dispatch.gpu_refusal(torch.cuda.current_device())
    return f"refused: {reason}" if reason else "runs on the GPU"


def _cuda() -> str:
    if _native.cuda_refusal is not None:
        return f"refused: {_native.cuda_refusal}"
    if torch.version.hip is not None:
        return "refused: built, but for NVIDIA's GPUs only"
    if not torch.cuda.is_available():
        return "refused: built, but there is no GPU that torch can use"
    reason = _dispatch.gpu_refusal(torch.cuda.current_device())
    return f"refused: {reason}" if reason else 'built; runs where backend="cuda" or MMFAST_BACKEND=cuda asks for it'


def _data_sets() -> dict[str, str]:
    from mmfast.data import cache_dir, installed
    from mmfast.data.catalog import SETS

    lines = {"folder": str(cache_dir())}
    for name, recipe in SETS.items():
        there = installed(name) is not None
        how = f"not installed ({recipe.megabytes:.0f} MB): mmfast data install {name}"
        lines[name] = f"installed: {recipe.summary}" if there else how
    return lines


def _extras() -> dict[str, str]:
    lines = {}
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        lines[extra] = f"missing {', '.join(missing)}: pip install 'mmfast[{extra}]'" if missing else "complete"
    return lines


def show(file=None) -> None:
    """Print every section."""
    for section, lines in collect().items():
        print(section, file=file or sys.stdout)
        width = max(map(len, lines))
        for name, text in lines.items():
            print(f"  {name.ljust(width)}  {text}", file=file or sys.stdout)
