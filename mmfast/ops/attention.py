"""Attention over packed samples with a modality mask.

out_i = sum_j drop_ij softmax_j(rule(softcap(scale * q_i k_j))) v_j, over the keys j of the same sample that i sees.
Vaswani et al. 2017 (arXiv 1706.03762); the kernels follow FlashAttention-2 (Dao 2023, arXiv 2307.08691).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast import _native
from mmfast.backends import flash_attn, xformers
from mmfast.layout import Layout
from mmfast.mask import ModalityMask
from mmfast.ops import _attention_cuda, _dispatch, _library
from mmfast.reference import attention as _reference

_FULL = ModalityMask.full()
_PEERS = {"flash_attn": flash_attn, "xformers": xformers}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FIELDS = ("cu_seqlens", "seqused", "modality", "time", "start")

_REFUSALS = {
    "cpu": lambda q, k, v, layout_q, *_: _dispatch.cpu_refusal(
        q, k, v, layout_q.cu_seqlens, dtypes=(*_DTYPES, torch.int32)
    ),
    "triton": lambda q, k, v, *_: _dispatch.triton_refusal(q, k, v, dtypes=_DTYPES),
    "cuda": lambda q, k, v, *_: _attention_cuda.refusal(q, k, v),
}
_PEER_REFUSALS = {
    name: lambda q, k, v, *rest, peer=peer: peer.refusal(q, *rest) for name, peer in _PEERS.items()
}  # only when asked for


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout_q: Layout,
    layout_k: Layout | None = None,
    mask: ModalityMask | None = None,
    *,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries onto packed keys; each sample sees itself only, and of itself what the mask shows.

    Order: scale, softcap `softcap * tanh(s / softcap)`, rule, softmax, dropout. A row that sees nothing gives zeros
    and zero gradients. Rows outside the layout are never read; output and gradients are zero there. A NaN or infinity
    inside the layout stays within its sample, but may reach rows of it that do not see it: hidden cells of a mixed tile
    get weight 0, and 0 * NaN is NaN.

    Args:
        q: `[Tq, H, D]`; D a multiple of 8 up to 256. float32, bfloat16, float16 or float64 (reference only).
        k, v: `[Tk, Hk, D]`, dtype of q, `H % Hk == 0`: query head h reads key head `h // (H // Hk)`. q, k and v may
            be strided views whose last dimension is contiguous, such as slices of a fused `[T, 3, H, D]`.
        layout_q: which rows of q belong to which sample, with their modality and time.
        layout_k: the same for k and v, with the same number of samples; None: `layout_q` (self-attention).
        mask: who sees whom; None: `ModalityMask.full()`.
        softmax_scale: factor of the scores; None: `D ** -0.5`.
        softcap: limit of the scores, in units of the scaled scores; 0: none (logit soft-capping of Gemma 2).
        dropout_p: probability that a weight is dropped; the others are scaled by `1 / (1 - dropout_p)`.
        dropout_seed: int64, one element, on q's device; needed with dropout. The decision for (query head, sample,
            query row in the sample, key row in the sample) is a Philox number: equal on all backends and in backward.
        return_lse: also return the logarithm of the softmax's denominator.
        backend: "cpu", "triton" or "reference"; None: chosen. Never chosen by itself: "cuda", for few queries or few
            keys per sample, in bfloat16 or float16 with D of 64 or 128; and other libraries where they are installed,
            on a GPU, for one rule, FULL or CAUSAL, without dropout: "flash_attn"; "xformers", whose backward pass is
            not deterministic.

    Returns:
        out `[Tq, H, D]`, dtype of q (under autocast its dtype); with `return_lse` also lse float32 `[H, Tq]`, natural
        logarithm, -inf for rows that see nothing.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message says which and how to mend it.
        RuntimeError: the explicit backend cannot run.

    Differentiable in q, k and v once (twice with `backend="reference"`), deterministic; lse is not differentiable.

    Source: Vaswani et al. 2017, equation 1; Gemma 2 (arXiv 2408.00118) for the softcap.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention: {name} must be a torch.Tensor, got {type(x).__name__}")
    q, k, v = _autocast(q, k, v)
    layout_k = layout_q if layout_k is None else layout_k
    mask = _FULL if mask is None else mask
    _check(q, k, v, layout_q, layout_k, mask, softcap, dropout_p, dropout_seed)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale):
        raise ValueError(f"attention: softmax_scale is {scale}; expected a finite number")
    asked_for_peer = backend is not None and backend not in _dispatch.BACKENDS
    refusals = {**_REFUSALS, **_PEER_REFUSALS} if asked_for_peer else _REFUSALS
    call = (q, k, v, layout_q, layout_k, mask, softcap, dropout_p, return_lse)
    chosen = _dispatch.choose("attention", backend, refusals, *call)
    if chosen in _PEERS:
        out, lse = _PEERS[chosen].attention(q, k, v, layout_q, layout_k, mask, scale, softcap, return_lse)
    elif chosen == "reference":
        out, lse = _reference.attention(
            q,
            k,
            v,
            layout_q,
            layout_k,
            mask,
            softmax_scale=scale,
            softcap=softcap,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
        )
        lse = lse.float()
    else:
        half = chosen == "cpu" and q.dtype == torch.float16
        if half:
            q, k, v = q.float(), k.float(), v.float()
        out, lse = _attention(
            q,
            k,
            v,
            *_fields(layout_q),
            *_fields(layout_k),
            mask.table(layout_q.names, layout_k.names),
            *mask.window,
            scale,
            softcap,
            dropout_p,
            dropout_seed if dropout_p > 0 else None,
            chosen,
        )
        if half:
            out = out.half()
    return (out, lse) if return_lse else out


def _fields(layout: Layout) -> tuple[Tensor | None, ...]:
    return layout.cu_seqlens, layout.seqused, layout.modality, layout.time, layout.start


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    kind = "cpu" if tensors[0].is_cpu else tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


def _check(q, k, v, layout_q, layout_k, mask, softcap, dropout_p, dropout_seed) -> None:
    device = q.device
    alike = q.dim() == k.dim() == v.dim() == 3 and q.dtype == k.dtype == v.dtype and device == k.device == v.device
    if not alike or not q.is_floating_point():
        _explain_tensors(q, k, v)
    shape_k = k.shape
    (rows, heads, dim), (rows_k, heads_k, dim_k) = q.shape, shape_k
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"attention: D is {dim}; expected a multiple of 8 up to 256; pad q, k and v with zeros")
    if shape_k != v.shape:
        raise ValueError(f"attention: v has shape {list(v.shape)}; expected k's {list(shape_k)}")
    if dim_k != dim:
        raise ValueError(f"attention: k has D = {dim_k}, q has {dim}; they must be equal")
    if heads_k == 0 or heads % heads_k:
        raise ValueError(f"attention: k has {heads_k} heads, which must divide q's {heads}")
    sides = [("layout_q", layout_q, rows, "q")]
    if layout_k is not layout_q or rows_k != rows:
        sides.append(("layout_k", layout_k, rows_k, "k"))
    for name, layout, described, tensor in sides:
        if not isinstance(layout, Layout):
            raise TypeError(f"attention: {name} must be a mmfast.Layout, got {type(layout).__name__}")
        if layout.cu_seqlens.device != device:
            raise ValueError(f"attention: {name} is on {layout.device}, q on {device}; move it with .to()")
        for field in (layout.modality, layout.time):
            if field is not None and field.shape[0] != described:
                raise ValueError(
                    f"attention: {name} describes {field.shape[0]} rows, {tensor} has {described}; "
                    "pass the layout that the tokens were packed with"
                )
    if len(sides) > 1 and layout_k.cu_seqlens.shape[0] != layout_q.cu_seqlens.shape[0]:
        raise ValueError(
            f"attention: layout_q has {layout_q.batch} samples, layout_k {layout_k.batch}; they must have the same"
        )
    if not isinstance(mask, ModalityMask):
        raise TypeError(f"attention: mask must be a mmfast.ModalityMask, got {type(mask).__name__}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"attention: softcap is {softcap}; expected 0 (none) or a positive limit")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"attention: dropout_p is {dropout_p}; expected 0 <= dropout_p < 1")
    if dropout_p > 0:
        if not isinstance(dropout_seed, Tensor) or dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
            raise ValueError("attention: dropout needs dropout_seed, an int64 tensor of one element on q's device")
        if dropout_seed.device != device:
            raise ValueError(f"attention: dropout_seed is on {dropout_seed.device}, q on {device}; move it there")


def _explain_tensors(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"attention: {name} must be [T, heads, D], got {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"attention: {name} has dtype {x.dtype}; expected a floating-point dtype")
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} has dtype {x.dtype}, q has {q.dtype}; convert them to one dtype")
        if x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, q on {q.device}; move them to one device")


# torch.library

_LAYOUTS = ", ".join(
    f"Tensor cu_seqlens_{side}, " + ", ".join(f"Tensor? {field}_{side}" for field in _FIELDS[1:]) for side in "qk"
)
_OPTIONS = (
    "int[] rules, int window_left, int window_right, float scale, float softcap, float dropout_p, "
    "Tensor? dropout_seed, str backend"
)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _forward_cpu(q, k, v, *rest):
    out = _native.empty_like(q)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    _native.cpu().attention_forward(_rows(q), _rows(k), _rows(v), out, lse, rest[:5], rest[5:10], *rest[10:])
    return out, lse


def _forward_triton(q, k, v, *rest):
    from mmfast.kernels import attention as kernels

    out, lse = _forward_fake(q, k, v)
    kernels.forward(q, k, v, out, lse, rest[:5], rest[5:10], *rest[10:])
    return out, lse


def _forward_cuda(q, k, v, *rest):
    out, lse = _forward_fake(q, k, v)
    _attention_cuda.forward(q, k, v, out, lse, rest[:5], rest[5:10], *rest[10:])
    return out, lse


def _forward_fake(q, k, v, *rest):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    *inputs, seed, ctx.backend = inputs
    tensors, ctx.options = inputs[:13], inputs[13:]
    out, lse = output
    ctx.save_for_backward(*tensors, seed, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    *inputs, seed, out, lse = ctx.saved_tensors
    if dout is None:
        return (None,) * 21
    dq, dk, dv = _attention_backward(dout, *inputs[:3], out, lse, *inputs[3:], *ctx.options, seed, ctx.backend)
    return (dq, dk, dv) + (None,) * 18


def _backward_cpu(dout, q, k, v, out, lse, *rest):
    dq, dk, dv = _native.empty_like(q), _native.empty_like(k), _native.empty_like(v)
    _native.cpu().attention_backward(
        _rows(dout), _rows(q), _rows(k), _rows(v), out, lse, dq, dk, dv, rest[:5], rest[5:10], *rest[10:]
    )
    return dq, dk, dv


def _backward_triton(dout, q, k, v, out, lse, *rest):
    from mmfast.kernels import attention as kernels

    dq, dk, dv = _backward_fake(dout, q, k, v)
    kernels.backward(dout, q, k, v, out, lse, dq, dk, dv, rest[:5], rest[5:10], *rest[10:])
    return dq, dk, dv


def _backward_cuda(dout, q, k, v, out, lse, *rest):
    dq, dk, dv = _backward_fake(dout, q, k, v)
    _attention_cuda.backward(dout, q, k, v, out, lse, dq, dk, dv, rest[:5], rest[5:10], *rest[10:])
    return dq, dk, dv


def _backward_fake(dout, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


_attention_backward = _library.define(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LAYOUTS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    triton=_backward_triton,
    cuda=_backward_cuda,
    fake=_backward_fake,
    backward=_library.no_double_backward("attention"),
)

_attention = _library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_LAYOUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    cpu=_forward_cpu,
    triton=_forward_triton,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
