"""Peak memory of forward and backward, each in a process of its own: it grows with the tokens, not with their square.

`python -m mmfast.testing.memory NAME SIZE ...` prints one JSON line per size: how far the peak of the resident memory
rises over what is resident before the step, beside the bytes of the tensors that the step must leave behind (output,
log-sum-exp and gradients).
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

import mmfast

NAME = "memory"
CONTRASTIVE = (65536, 512)


def measure(contrastive: bool) -> list[dict]:
    """Attention over packed documents, and InfoNCE of 65,536 pairs, a minute's work, where it is asked for."""
    from mmfast.testing.cases.scaling import TOKENS

    rows = _run("attention", *TOKENS)
    return rows + (_run("contrastive", *CONTRASTIVE[:1]) if contrastive else [])


def _run(name: str, *sizes: int) -> list[dict]:
    root = str(Path(mmfast.__file__).resolve().parent.parent)
    start = f"import sys; sys.path.insert(0, {root!r}); from mmfast.testing.memory import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", start, str(torch.get_num_threads()), name, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return [{"name": name, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}]
    return [json.loads(line) for line in done.stdout.splitlines()]


def attention(tokens: int):
    """The step, and the bytes of what it leaves behind."""
    from mmfast.testing import shapes

    load = shapes.documents(tokens)
    q, k, v, dout = load.tensors(torch.float32, requires_grad=True)

    def step():
        out = mmfast.attention(q, k, v, load.layout_q, load.layout_k, load.mask)
        return out, torch.autograd.grad(out, (q, k, v), dout)

    return step, 4 * q.nbytes + 4 * q.shape[0] * q.shape[1], f"attention, {tokens // 1024}k tokens"


def contrastive(n: int):
    from mmfast.testing.cases.contrastive import features, ours

    x, y, scale, bias = features(n, CONTRASTIVE[1], torch.float32)
    inputs = [t.requires_grad_() for t in (x, y, scale)]

    def step():
        loss = ours("infonce", *inputs, bias)
        return loss, torch.autograd.grad(loss, inputs)

    return step, 2 * x.nbytes, f"InfoNCE, {n} x {CONTRASTIVE[1]}"


def main(arguments: list[str]) -> None:
    threads, name, *sizes = arguments
    torch.set_num_threads(int(threads))
    make = {"attention": attention, "contrastive": contrastive}[name]
    make(1024)[0]()  # libraries and threads are there before anything is measured
    for size in map(int, sizes):
        step, needed, title = make(size)
        before = resident()
        forget_peak()
        step()
        peak = resident("VmHWM")
        row = {"name": title, "grows_by": peak - before, "tensors": needed, "peak": peak}
        print(json.dumps(row), flush=True)
        del step


def resident(field: str = "VmRSS") -> int:
    """Bytes that are resident now; "VmHWM": at most, since `forget_peak`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration):  # not Linux: the peak since the start, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Elsewhere than on Linux the peak stays that since the start, which a large step exceeds."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
