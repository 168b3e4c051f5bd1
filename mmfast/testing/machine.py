"""Where a benchmark ran: machine, versions, commit, and the peers that cannot run here."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import torch

import mmfast
from mmfast import _native


def describe() -> dict:
    """For the head of a result file."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction set": _native.cpu().isa() if _native.cpu_refusal is None else None,
        }
        | ({"gpu": gpu()} if torch.cuda.is_available() else {}),
        "versions": {
            "mmfast": mmfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit(),
    }


def gpu() -> str:
    """Name, multiprocessors and memory of the current GPU."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name}, {found.multi_processor_count} multiprocessors, {found.total_memory >> 30} GiB"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that mmfast runs from, with "+" where files differ from it; None where it is installed."""
    root = Path(mmfast.__file__).resolve().parent.parent
    git = ["git", "-C", str(root)]
    try:
        if not (root / ".git").exists():
            return None
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def absent_peers() -> dict[str, str]:
    """Peer -> why it has no column."""
    found = {}
    for module, name in (("flash_attn", "flash-attn"), ("xformers", "xformers")):
        if importlib.util.find_spec(module) is None:
            found[name] = "not installed"
        elif not torch.cuda.is_available():
            found[name] = f"{importlib.metadata.version(name)} is installed, but runs on GPUs only"
    if not torch.cuda.is_available():
        found["flex_attention, backward"] = _refusal(_flex_backward)
        found["varlen_attn"] = _refusal(_varlen)
    return {name: why for name, why in found.items() if why}


def _refusal(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0][:120]}"
    return ""


def _flex_backward() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 1, 16, 16, requires_grad=True)
    flex_attention(q, q, q).sum().backward()


def _varlen() -> None:
    from torch.nn.attention.varlen import varlen_attn

    q, ends = torch.randn(8, 1, 16), torch.tensor([0, 8], dtype=torch.int32)
    varlen_attn(q, q, q, ends, ends, 8, 8)
