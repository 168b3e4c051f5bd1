"""Attention of the packages flash-attn (from 2.6 on) and flash-attn-4, for the masks that they can express.

Dao 2023 (arXiv 2307.08691). Both sides are told by cu_seqlens; causal masks and windows are aligned at the last query
and the last key of a sample. Which of the two packages runs: the newer one where it can.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.backends import _masks
from mmfast.layout import Layout
from mmfast.mask import ModalityMask

_COMMON = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size"}
_NEEDED = {
    "flash_attn.cute": {*_COMMON, "softcap", "deterministic", "return_lse"},
    "flash_attn": {*_COMMON, "softcap", "deterministic", "return_attn_probs"},
}


def refusal(
    q: Tensor, layout_q: Layout, layout_k: Layout, mask: ModalityMask, softcap: float, dropout_p: float, lse: bool
) -> str | None:
    """Why this backend cannot take the call, or None."""
    return (
        installed()
        or _masks.tensor_refusal(q, dropout_p)
        or _join(_refusals(q))
        or _masks.layout_refusal(mask, layout_q, layout_k)
        or _masks.alignment_refusal(mask, layout_q, layout_k)
    )


def installed() -> str | None:
    """None where one of the packages can be imported, else why not."""
    return _join({name: _import_refusal(name) for name in _NEEDED})


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
) -> tuple[Tensor, Tensor | None]:
    """out `[Tq, H, D]` and, if asked for, lse float32 `[H, Tq]`; `refusal` gave None. Deterministic.

    `max_seqlen` of the layouts is taken as a bound; a layout without one costs many programs that find nothing to do.
    """
    rows_q, rows_k = q.shape[0], k.shape[0]
    if layout_q.batch == 0 or rows_q == 0 or rows_k == 0:
        lse = torch.full((q.shape[1], rows_q), -torch.inf, device=q.device) if return_lse else None
        return _masks.zeros(q, k, v), lse
    name = next(name for name, reason in _refusals(q).items() if reason is None)
    left, right = _masks.window(mask, layout_q, layout_k)
    longest_q, longest_k = _longest(layout_q, rows_q), _longest(layout_k, rows_k)
    if left >= 0 or right > 0:  # to flash-attn 2 the longest keys are as far as a window needs to reach to the right
        longest_k = max(longest_q, longest_k)
    unlimited = None if name == "flash_attn.cute" else -1
    inside_q, inside_k = _inside(layout_q, rows_q), _inside(layout_k, rows_k)
    result = _function(name)(
        _Rows.apply(q, inside_q),
        _Rows.apply(k, inside_k),
        _Rows.apply(v, inside_k),
        cu_seqlens_q=layout_q.cu_seqlens,
        cu_seqlens_k=layout_k.cu_seqlens,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=softmax_scale,
        causal=right == 0,
        window_size=tuple(unlimited if side < 0 else side for side in (left, right)),
        softcap=softcap,
        deterministic=True,
        **{"return_lse" if name == "flash_attn.cute" else "return_attn_probs": return_lse},
    )
    out, lse = result[:2] if isinstance(result, tuple) else (result, None)
    # The package leaves rows outside the layout as they were in memory.
    out = torch.where(inside_q[:, None, None], out, 0)
    if return_lse:
        # It says +inf, too, of rows that see nothing.
        lse = lse.detach().masked_fill(~inside_q | (lse == torch.inf), -torch.inf)
    return out, lse if return_lse else None


class _Rows(torch.autograd.Function):
    """The tensor itself; its gradient is zero in the rows outside the layout, which the package leaves unwritten."""

    @staticmethod
    def forward(ctx, x, inside):
        ctx.save_for_backward(inside)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return torch.where(inside[:, None, None], grad, 0), None


def _inside(layout: Layout, rows: int) -> Tensor:
    """bool `[T]`: the rows that belong to a sample."""
    row = torch.arange(rows, dtype=torch.int32, device=layout.device)
    return (row >= layout.cu_seqlens[0]) & (row < layout.cu_seqlens[-1])


def _longest(layout: Layout, rows: int) -> int:
    """A bound of the samples' lengths. Never 1: flash-attn 2 would take row b for sample b, and some may be empty."""
    return max(rows if layout.max_seqlen is None else min(layout.max_seqlen, rows), 2)


def _refusals(q: Tensor) -> dict[str, str | None]:
    """Module -> why it cannot run on q's GPU with its head dimension, or None; in order of preference."""
    found = torch.cuda.get_device_properties(q.device)
    gpu = f"{found.name} is sm_{found.major}{found.minor}"
    reasons = {name: _import_refusal(name) for name in _NEEDED}
    if torch.version.hip is None and found.major < 8:
        return {name: reason or f"{gpu}; sm_80 or newer is needed" for name, reason in reasons.items()}
    if torch.version.hip is not None or found.major not in (9, 10, 11) or q.shape[2] > 128:
        limits = "flash-attn-4 is used on NVIDIA GPUs from sm_90 to sm_110, up to D = 128"
        reasons["flash_attn.cute"] = reasons["flash_attn.cute"] or f"{gpu} and D is {q.shape[2]}; {limits}"
    return reasons


def _join(reasons: dict[str, str | None]) -> str | None:
    return None if None in reasons.values() else "; ".join(dict.fromkeys(reasons.values()))


@functools.cache
def _import_refusal(name: str) -> str | None:
    try:
        known = inspect.signature(_function(name)).parameters
    except (ModuleNotFoundError, AttributeError):  # either package alone leaves a folder without the other's functions
        return "flash-attn is not installed: pip install flash-attn"
    except Exception as error:  # a build for another torch or another driver
        return f"{name} cannot be imported: {type(error).__name__}: {error}"
    missing = sorted(_NEEDED[name] - set(known))
    return f"{name} is too old: it lacks {', '.join(missing)}; flash-attn 2.6 or newer is needed" if missing else None


@functools.cache
def _function(name: str) -> Callable:
    return importlib.import_module(name).flash_attn_varlen_func
