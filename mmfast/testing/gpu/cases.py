"""Cases at the sizes of a GPU, most telling first: attention beside GPU libraries, and the other ops."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from functools import partial

import torch

from mmfast import _native
from mmfast.layout import Layout
from mmfast.mask import ModalityMask
from mmfast.ops import _dispatch
from mmfast.testing import cases as suite_cases
from mmfast.testing import shapes
from mmfast.testing.cases import Case, Contest, attention, contrastive, packing, perturbation, rotary
from mmfast.testing.gpu.peers import BUILDERS, DENSE, FLEX, PACKED, installed
from mmfast.testing.shapes import Workload

BOTH = ("forward", "forward+backward")
CUDA = "mmfast, CUDA C++"
CUDA_OPS = ("attention", "pack", "unpack", "perturb", "random_start")
SHORT = ("Q-Former", "cross-attention", "Flamingo", "decoding")  # what the CUDA attention is meant for


def all_cases(small: bool = False) -> list[Case]:
    """Those of this file, then those of the CPU's suite, bfloat16 first, without what speaks of the CPU's allocator."""
    others = [case for case in suite_cases.all_cases(small) if not case.new_pages]
    own = [with_cuda(case) if _wants_cuda(case) else case for case in gpu_cases(small)]
    return own + sorted(others, key=lambda case: case.dtype == torch.float32)


def gpu_cases(small: bool = False) -> list[Case]:
    return [*attention_cases(small), *other_cases(small)]


# Our CUDA kernels, where they are built, beside our Triton kernels


def has_cuda(op: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the CUDA kernels have the op, whose name begins `op`, on the device. Says nothing of its sizes."""
    if _native.cuda_refusal is not None or _native.cuda().device != device.type:
        return False
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.version.hip is not None):
        return False
    return op.startswith(CUDA_OPS) and not (op.startswith("attention") and dtype == torch.float32)


def _wants_cuda(case: Case) -> bool:
    """Cases that run forward each time: a backward pass alone belongs to the kernels that made its graph."""
    if case.measured == "backward" or not has_cuda(case.op, case.dtype, torch.device("cuda")):
        return False
    return case.op != "attention" or any(word in case.workload for word in SHORT)


def with_cuda(case: Case) -> Case:
    """The case with one peer more: the same call with the backend "cuda", held to the oracle like ours."""

    def make(device):
        contest = case.make(device)

        def under(function):
            def run():
                with _dispatch.use_backend("cuda"):
                    return function()

            return run

        def check():
            contest.check()
            under(contest.check)()

        return Contest(contest.ours, {**contest.peers, CUDA: under(contest.ours)}, check, contest.work, contest.fresh)

    return dataclasses.replace(case, peers=(*case.peers, CUDA), make=make)


# Attention


def documents(tokens: int, shortest: int, longest: int, heads: int, dim: int, seed: int = 0) -> Workload:
    """Packed causal documents of random lengths, `tokens` in all."""
    layout = Layout.from_lengths(_lengths(tokens, shortest, longest, seed))
    return Workload("documents", layout, layout, ModalityMask.causal(), heads, heads, dim, "causal")


def fusion(tokens: int, longest: int, heads: int, dim: int, irregular: bool = False) -> Workload:
    """Documents of text and images, bidirectional inside an image; irregular: images see nothing but themselves."""
    rng, found = random.Random(0), []
    for length in _lengths(tokens, longest // 4, longest, 0):
        document, left = [], length
        while left:
            kind = len(document) % 2
            rows = min(left, rng.choice((longest // 16, longest // 4)) if kind else rng.randint(1, longest // 8))
            document.append((kind, rows))
            left -= rows
        found.append(document)
    layout = shapes.interleaved(found, ("text", "image")).with_time("segment_start", modalities=("image",))
    mask = ModalityMask.early_fusion()
    if irregular:
        rules = {("text", "text"): "causal", ("text", "image"): "causal", ("image", "image"): "same"}
        mask = ModalityMask(rules, time="segment_start")
    return Workload("fusion", layout, layout, mask, heads, heads, dim)


def decoding(batch: int, shortest: int, longest: int, heads: int, heads_k: int, dim: int) -> Workload:
    """One query per sample onto its cache."""
    rng = random.Random(0)
    layout_k = Layout.from_lengths([rng.randint(shortest, longest) for _ in range(batch)])
    layout_q = Layout.from_lengths([1] * batch)
    return Workload("decoding", layout_q, layout_k, ModalityMask.full(), heads, heads_k, dim, "full")


def _lengths(tokens: int, shortest: int, longest: int, seed: int) -> list[int]:
    rng, found = random.Random(seed), []
    while tokens > longest:
        found.append(rng.randint(shortest, longest))
        tokens -= found[-1]
    return [*found, tokens]


def attention_cases(small: bool) -> list[Case]:
    k = 1024
    sizes: dict[str, tuple[Callable[[], Workload], tuple[str, ...]]] = {
        "packed documents, 32k, D 128": (partial(documents, 32 * k, 256, 4 * k, 16, 128), PACKED + FLEX),
        "early fusion, 32k, D 128": (partial(fusion, 32 * k, 4 * k, 16, 128), FLEX),
        "dense 1x16k, D 128": (partial(shapes.dense, 1, 16 * k, 16, 128), DENSE + PACKED),
        "causal 1x16k, D 128": (partial(shapes.causal, 1, 16 * k, 16, 128), DENSE + PACKED),
        "images see themselves, 32k, D 128": (partial(fusion, 32 * k, 4 * k, 16, 128, True), FLEX),
        "Q-Former, 128 x 32 queries onto 1024, D 64": (partial(shapes.q_former, 128, 32, k), DENSE + PACKED),
        "packed documents, 32k, D 64": (partial(documents, 32 * k, 256, 4 * k, 32, 64), PACKED + FLEX),
        "dense 1x16k, D 64": (partial(shapes.dense, 1, 16 * k, 32, 64), DENSE + PACKED),
        "causal 1x16k, D 64": (partial(shapes.causal, 1, 16 * k, 32, 64), DENSE + PACKED),
        "dense 16x1k, D 128": (partial(shapes.dense, 16, k, 16, 128), DENSE + PACKED),
        "packed documents, 8k, D 128": (partial(documents, 8 * k, 64, 2 * k, 16, 128), PACKED + FLEX),
        "packed documents, 2k, D 64": (partial(documents, 2 * k, 16, 512, 16, 64), PACKED + FLEX),
        "ragged cross-attention, 128 texts onto images, D 64": (partial(shapes.cross_attention, 128), PACKED),
        "Flamingo, 32 texts, D 64": (partial(shapes.flamingo, 32), FLEX),
    }
    if small:
        sizes = {
            "documents": (partial(documents, 50, 3, 30, 2, 16), (*PACKED[:1], *FLEX)),
            "images see themselves": (partial(fusion, 50, 32, 2, 16, True), FLEX),
            "dense": (partial(shapes.dense, 1, 16, 2, 16), DENSE),
        }
    decode = partial(decoding, 3, 5, 30, 4, 2, 16) if small else partial(decoding, 64, k, 8 * k, 32, 8, 128)
    found = [_attention(name, load, peers, measured) for name, (load, peers) in sizes.items() for measured in BOTH]
    return [*found, _attention("decoding, 64 x 1 onto 1k to 8k, 32 heads on 8, D 128", decode, PACKED, "forward")]


def _attention(name: str, load: Callable[[], Workload], peers: tuple[str, ...], measured: str) -> Case:
    dtype = torch.bfloat16
    here = installed(*peers)
    make = partial(attention.contest, load, dtype, measured != "forward", here)
    return Case("attention", name, measured, dtype, here, partial(_with_builders, make), "arithmetic")


def _with_builders(make: Callable, device: torch.device):
    return make(device, BUILDERS)


# The other ops, whose cases are the CPU's at larger sizes, beside torch.compile too


def other_cases(small: bool) -> list[Case]:
    dtype = torch.bfloat16
    samples, dim = (4, 24) if small else (512, 1024)
    rows = (3, 40) if small else (256, 512)
    images = (3, 3, 8, 8) if small else (256, 3, 224, 224)
    pairs = ((33, 16),) if small else ((16384, 768), (8192, 512))
    found = []
    for measured in ("forward", "backward"):
        back = measured == "backward"
        for norm in packing.NORMS:
            for lengths in packing.LENGTHS:
                make = partial(packing.pack_contest, dtype, norm, lengths, back, samples, dim, compiled=True)
                found.append(_memory("pack", f"{samples} samples x {dim}, {norm}; {lengths}", measured, "chain", make))
        make = partial(packing.unpack_contest, dtype, "ragged", back, samples, dim)
        found.append(_memory("unpack", f"{samples} samples x {dim}", measured, "indexing", make))
        for norm in (False, True):
            make = partial(rotary.rotary_contest, dtype, norm, "1 axis", "ragged", back, *rows, compiled=True)
            workload = f"{rows[0]} samples{', q and k normed' if norm else ''}"
            found.append(_memory("rotary", workload, measured, "rotate_half", make))
    for norm, name in perturbation.NAMES.items():
        make = partial(perturbation.contest, norm, images, dtype)
        found.append(_memory("perturb", f"{name}, {'x'.join(map(str, images))}", "step", "perturb", make))
    for kind, name in contrastive.KINDS.items():
        for n, d in pairs:
            make = partial(contrastive.contest, kind, n, d, dtype)
            workload = f"{name}, {n}x{d}"
            found.append(
                Case("contrastive", workload, "forward+backward", dtype, contrastive.PEERS, make, "arithmetic")
            )
    return found


PEERS = {
    "chain": ("torch chain", "torch.compile"),
    "indexing": ("torch indexing",),
    "rotate_half": ("rotate_half", "torch.compile"),
    "perturb": perturbation.PEERS,
}


def _memory(op: str, workload: str, measured: str, peers: str, make: Callable) -> Case:
    return Case(op, workload, measured, torch.bfloat16, PEERS[peers], make, "memory")
