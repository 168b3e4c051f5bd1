"""Attention of other libraries on a GPU. Each builder is as those of `mmfast.testing.cases.attention.PEERS`.

A builder raises where the library is missing or has no words for the mask; the peer is then refused with that reason
when it is first run, and the others are still timed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmfast.mask import Rule, unpack_table
from mmfast.testing.cases import leaves
from mmfast.testing.cases.attention import PEERS as TORCH_PEERS
from mmfast.testing.shapes import Workload

FLASH = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}
DENSE = ("SDPA cuDNN", "SDPA flash")
PACKED = ("varlen_attn", *FLASH, "xformers")
FLEX = ("flex_attention",)


@functools.cache
def absent() -> dict[str, str]:
    """Library -> why it has no column here."""
    found = {}
    for name, module in {**FLASH, "xformers": "xformers.ops"}.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    missing = importlib.util.find_spec("liger_kernel") is None
    found["liger-kernel"] = "not installed" if missing else "its rotary overwrites q and k: another contract"
    return found


def installed(*names: str) -> tuple[str, ...]:
    gone = absent()
    return tuple(name for name in names if name not in gone)


def _deferred(build: Callable) -> Callable:
    """Raises what the builder raises when the peer is run: one that cannot be built is refused, not the whole case."""

    def builder(load, packed):
        try:
            return build(load, packed)
        except Exception as error:
            reason = error

        def refuse(*_):
            raise reason

        return refuse, leaves(packed), _packed

    return builder


def _packed(x, side):
    return x


def _ends(load: Workload, device) -> tuple:
    """cu_seqlens and the longest sample of queries, then of keys."""
    ends = [layout.cu_seqlens.to(device) for layout in (load.layout_q, load.layout_k)]
    return *ends, max(load.lengths_q), max(load.lengths_k)


def _causal(load: Workload) -> bool:
    if not load.rule:
        raise NotImplementedError("it has no modality masks")
    return load.rule == "causal"


def _sdpa(backend: SDPBackend):
    def build(load, packed):
        function, inputs, back = TORCH_PEERS["SDPA"](load, packed)

        def run(*qkv):
            with sdpa_kernel(backend):
                return function(*qkv)

        return run, inputs, back

    return build


def _varlen(load, packed):
    from torch.nn.attention.varlen import varlen_attn

    ends, causal = _ends(load, packed[0].device), _causal(load)
    known = inspect.signature(varlen_attn).parameters  # torch 2.10 has is_causal, later ones window_size
    options = {"is_causal": causal} if "is_causal" in known else {"window_size": (-1, 0 if causal else -1)}
    if "enable_gqa" in known:
        options["enable_gqa"] = load.heads != load.heads_k
    return lambda *qkv: varlen_attn(*qkv, *ends, **options), leaves(packed), _packed


def _flash(module: str):
    def build(load, packed):
        function = importlib.import_module(module).flash_attn_varlen_func
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        options = dict(zip(names, _ends(load, packed[0].device))) | {"causal": _causal(load)}

        def run(*qkv):
            out = function(*qkv, **options)
            return out[0] if isinstance(out, tuple) else out

        return run, leaves(packed), _packed

    return build


def _xformers(load, packed):
    from xformers.ops import fmha, memory_efficient_attention

    if load.heads != load.heads_k:
        raise NotImplementedError("grouped heads take it another layout of q")
    bias = fmha.BlockDiagonalMask.from_seqlens(load.lengths_q, load.lengths_k)
    bias = bias.make_causal() if _causal(load) else bias

    def run(*qkv):
        return memory_efficient_attention(*(x[None] for x in qkv), attn_bias=bias)[0]

    return run, leaves(packed), _packed


def _flex(load, packed):
    """FlexAttention over all tokens as one sequence, compiled; the block mask is made beforehand, compiled too."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = packed[0].device
    total_q, total_k = packed[0].shape[0], packed[1].shape[0]
    visible = _visible(load, total_q, total_k, device)
    mask = torch.compile(create_block_mask)(visible, None, None, total_q, total_k, device=device)
    attention = partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
    if load.heads != load.heads_k:
        attention = partial(attention, enable_gqa=True)
    inputs = [x.transpose(0, 1)[None].contiguous() for x in packed]
    if device.type != "cpu":  # where it has no backward pass, and refuses inputs that require gradients
        inputs = leaves(inputs)
    return attention, inputs, lambda x, side: x[0].transpose(0, 1)


def _visible(load: Workload, total_q: int, total_k: int, device) -> Callable:
    """FlexAttention's function of the mask, as its users write it: one comparison where one rule is all there is."""
    sides = ((load.layout_q, total_q), (load.layout_k, total_k))
    sample_q, sample_k = (layout.samples(n).to(device) for layout, n in sides)
    time_q, time_k = (layout.times(n).to(device) for layout, n in sides)
    kind_q, kind_k = (layout.modalities(n).long() for layout, n in sides)
    rules = torch.tensor(unpack_table(load.mask.table(load.layout_q.names, load.layout_k.names)))
    used = rules[kind_q.unique()][:, kind_k.unique()].unique().tolist()
    rules, kind_q, kind_k = (x.to(device) for x in (rules, kind_q, kind_k))
    none, full, causal, past, same = map(int, Rule)
    tests = {
        full: lambda i, j: sample_q[i] == sample_k[j],
        causal: lambda i, j: time_k[j] <= time_q[i],
        past: lambda i, j: time_k[j] < time_q[i],
        same: lambda i, j: time_k[j] == time_q[i],
    }
    test = tests.get(used[0])

    def one_rule(batch, head, i, j):
        return (sample_q[i] == sample_k[j]) & test(i, j)

    def several(batch, head, i, j):
        rule, before, now = rules[kind_q[i], kind_k[j]], time_k[j] < time_q[i], time_k[j] == time_q[i]
        held = (rule == full) | ((rule == causal) & (before | now)) | ((rule == past) & before) | ((rule == same) & now)
        return (sample_q[i] == sample_k[j]) & held

    return one_rule if len(used) == 1 and used[0] != none else several


BUILDERS = {
    name: _deferred(build)
    for name, build in {
        "SDPA cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "SDPA flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "varlen_attn": _varlen,
        **{name: _flash(module) for name, module in FLASH.items()},
        "xformers": _xformers,
        "flex_attention": _flex,
    }.items()
}
