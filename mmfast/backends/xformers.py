"""`memory_efficient_attention` of xformers, for the masks that it can express.

Lefaudeux et al., xFormers (https://github.com/facebookresearch/xformers). Its masks are made of lengths on the host:
they are read once per layout, which waits for the device. Its backward pass may add in another order each time.
"""

from __future__ import annotations

import functools
import importlib
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfast.backends import _masks
from mmfast.layout import Layout
from mmfast.mask import ModalityMask


def refusal(
    q: Tensor, layout_q: Layout, layout_k: Layout, mask: ModalityMask, softcap: float, dropout_p: float, lse: bool
) -> str | None:
    """Why this backend cannot take the call, or None. Waits for the device once per layout."""
    return (
        installed()
        or _masks.tensor_refusal(q, dropout_p)
        or _gpu_refusal(q)
        or ("it has no softcap" if softcap > 0 else None)
        or ("it gives no lse of packed samples" if lse else None)
        or _masks.layout_refusal(mask, layout_q, layout_k)
        or _window_refusal(*_masks.window(mask, layout_q, layout_k))
        or ("under torch.compile it cannot read the lengths" if torch.compiler.is_compiling() else None)
        or _length_refusal(mask, layout_q, layout_k)
        or _masks.alignment_refusal(mask, layout_q, layout_k)
    )


@functools.cache
def installed() -> str | None:
    """None where the package can be imported, else why not."""
    try:
        _fmha()
    except ModuleNotFoundError:
        return "xformers is not installed: pip install xformers"
    except Exception as error:  # a build for another torch or another driver
        return f"xformers cannot be imported: {type(error).__name__}: {error}"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: Layout,
    layout_k: Layout,
    mask: ModalityMask,
    softmax_scale: float,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, None]:
    """out `[Tq, H, D]`; `refusal` gave None."""
    rows_q, heads, _ = q.shape
    first_q, lengths_q, first_k, lengths_k = _lengths(layout_q, layout_k)
    lengths = [(n, m) for n, m in zip(lengths_q, lengths_k) if n]  # else both are 0
    if not lengths:
        return _masks.zeros(q, k, v), None
    left, right = _masks.window(mask, layout_q, layout_k)
    bias = _fmha().BlockDiagonalMask.from_seqlens(*map(list, zip(*lengths)), device=q.device)
    if right == 0 and left >= 0:
        bias = bias.make_local_attention_from_bottomright(left + 1)
    elif right == 0:
        bias = bias.make_causal_from_bottomright()
    q = q[first_q : first_q + sum(lengths_q)]
    k, v = (x[first_k : first_k + sum(lengths_k)] for x in (k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    group = heads // k.shape[1]
    if group > 1 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # it has no backward pass of grouped heads
    elif group > 1:
        q = q.unflatten(1, (-1, group))
        k, v = (x[:, :, None].expand(-1, -1, group, -1) for x in (k, v))
    out = _fmha().memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=softmax_scale)[0]
    out = out.flatten(1, -2)
    return pad(out, (0, 0, 0, 0, first_q, rows_q - first_q - out.shape[0])), None


def _gpu_refusal(q: Tensor) -> str | None:
    found = torch.cuda.get_device_properties(q.device)
    if torch.version.hip is None and found.major < 8:
        return f"{found.name} is sm_{found.major}{found.minor}; sm_80 or newer is needed"
    return None


def _window_refusal(left: int, right: int) -> str | None:
    if right > 0 or (left >= 0 and right < 0):
        return f"its windows look back from a causal mask, and the mask's is ({left}, {right})"
    return None


def _length_refusal(mask: ModalityMask, layout_q: Layout, layout_k: Layout) -> str | None:
    if layout_q.batch == 0:
        return None
    causal = _masks.window(mask, layout_q, layout_k)[1] == 0
    _, lengths_q, _, lengths_k = _lengths(layout_q, layout_k)
    for sample, (n, m) in enumerate(zip(lengths_q, lengths_k)):
        if (n == 0) != (m == 0):
            return f"sample {sample} has {n} queries and {m} keys, and it takes none that is empty on one side"
        if causal and n > m:
            return f"sample {sample} has {n} queries and {m} keys, and its causal mask takes no more queries than keys"
    return None


@_masks.once
def _lengths(layout_q: Layout, layout_k: Layout) -> tuple[int, list[int], int, list[int]]:
    """First row and lengths of either side."""
    ends_q, ends_k = layout_q.cu_seqlens.tolist(), layout_k.cu_seqlens.tolist()
    lengths_q, lengths_k = ([end - begin for begin, end in pairwise(ends)] for ends in (ends_q, ends_k))
    return ends_q[0], lengths_q, ends_k[0], lengths_k


def _fmha():
    return importlib.import_module("xformers.ops.fmha")
