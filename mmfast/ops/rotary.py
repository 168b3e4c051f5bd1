"""Rotary embedding of queries and keys with one or several position axes, and RMS norm before it, in one pass.

Formula and oracle: mmfast/reference/rotary.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast import _native
from mmfast.layout import Layout
from mmfast.ops._dispatch import choose, cpu_refusal, triton_refusal
from mmfast.ops._library import define, no_double_backward
from mmfast.reference import rotary as reference

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rotary(
    q: Tensor,
    k: Tensor,
    layout_q: Layout,
    layout_k: Layout | None = None,
    *,
    base: float = 10000.0,
    sections: Sequence[int] | None = None,
    qk_norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by their rows' positions.

    angle[t, j] = position[t, axis(j)] * base^(-2 j / D);  (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin)

    with (x1, x2) = (x[j], x[j + D/2]) as in Llama. Angles are computed in float64, so that positions of millions keep
    float32 accuracy; cosines and sines are computed once per row and shared by all heads.

    Args:
        q: `[Tq, H, D]`, D even; may be strided in the first two dimensions.
        k: `[Tk, Hk, D]`, same dtype.
        layout_q: its `position` (A axes), else the position in the sample (`start` included), turns q. Rows outside
            the layout are never read, and zero in the output.
        layout_k: of k; None: layout_q.
        base: wavelengths grow from 2 pi to 2 pi base (alias: rope_theta).
        sections: frequencies of each axis, their sum is D / 2 (M-RoPE's `mrope_section`; Qwen2-VL: 16, 24, 24). A
            layout without positions uses the position in the sample on every axis. None: equal parts, the first axes
            one more where D / 2 cannot be divided.
        qk_norm: `(q_weight [D] or None, k_weight [D] or None, eps)`: RMS norm over D before the rotation.
        interleaved: pairs are (x[2 j], x[2 j + 1]), as in GPT-J.
        backend: "cpu", "triton" or "reference"; None: automatic.

    Returns:
        q and k turned, contiguous, in their dtype (under autocast: autocast's).

    Raises:
        ValueError: shapes, dtypes, devices or sections that do not fit.
        NotImplementedError: second derivatives; `backend="reference"` has them.

    Differentiable in q, k and the norm's weights; weight gradients are bit-equal from run to run.

    Source: Su et al., RoFormer (arXiv 2104.09864), equation 34; sections: Qwen2-VL (arXiv 2409.12191), section 2.1.
    """
    _check(q, k)
    shared = layout_k is None
    layout_k = layout_q if layout_k is None else layout_k
    for name, x, layout in (("q", q, layout_q), ("k", k, layout_k)):
        if layout.device != x.device:
            raise ValueError(f"rotary: layout_{name} is on {layout.device}, {name} on {x.device}; move one with .to()")
        for field in ("position", "modality", "time"):
            value = getattr(layout, field)
            if value is not None and value.shape[0] != x.shape[0]:
                raise ValueError(f"rotary: {name} has {x.shape[0]} rows, layout_{name}.{field} {value.shape[0]}")
    sections = _sections(sections, q.shape[2] // 2, layout_q, layout_k)
    norm, q_weight, k_weight, eps = _norm(qk_norm, q)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k = q.to(dtype), k.to(dtype)

    refusals = {
        "cpu": lambda: cpu_refusal(q, dtypes=_KERNEL_DTYPES),
        "triton": lambda: triton_refusal(q, dtypes=_KERNEL_DTYPES),
    }
    chosen = choose("rotary", backend, refusals)
    if chosen == "reference":
        options = (base, sections, interleaved, norm)
        return (
            reference.rotate(q, *_rows(layout_q, q.shape[0], sections), *options, q_weight, eps),
            reference.rotate(k, *_rows(layout_k, k.shape[0], sections), *options, k_weight, eps),
        )
    dtype = q.dtype
    if dtype == torch.float16 and chosen == "cpu":
        q, k = q.float(), k.float()
    weights = [None if w is None else w.float().contiguous() for w in (q_weight, k_weight)]
    options = (base, sections, norm, eps, interleaved, chosen)
    fields = [(x.cu_seqlens, x.seqused, x.start, x.position) for x in (layout_q, layout_k)]
    if shared:
        q, k = _rotary([q, k], weights[0], weights[1], *fields[0], *options)
    else:
        (q,) = _rotary([q], weights[0], None, *fields[0], *options)
        (k,) = _rotary([k], weights[1], None, *fields[1], *options)
    return q.to(dtype), k.to(dtype)


def _check(q: Tensor, k: Tensor) -> None:
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 3 or not x.is_floating_point():
            raise ValueError(f"rotary: {name} must be a float tensor [T, H, D], got {x.dtype} {list(x.shape)}")
    if q.shape[2] % 2 or q.shape[2] < 2:
        raise ValueError(f"rotary: D is {q.shape[2]}; it must be even")
    for what, a, b in (("D", q.shape[2], k.shape[2]), ("dtype", q.dtype, k.dtype), ("device", q.device, k.device)):
        if a != b:
            raise ValueError(f"rotary: q has {what} {a}, k has {b}; they must be equal")


def _sections(sections, half: int, layout_q: Layout, layout_k: Layout) -> list[int]:
    axes = {x.position.shape[1] for x in (layout_q, layout_k) if x.position is not None}
    if len(axes) > 1:
        raise ValueError(f"rotary: layout_q and layout_k have {sorted(axes)} position axes; expected the same number")
    count = axes.pop() if axes else None
    if sections is None:
        count = count or 1
        return [half // count + (a < half % count) for a in range(count)]
    sections = list(sections)
    if sum(sections) != half or not 1 <= len(sections) <= 3 or min(sections) < 0:
        raise ValueError(f"rotary: sections is {sections}; expected 1 to 3 numbers whose sum is D / 2 = {half}")
    if count is not None and len(sections) != count:
        raise ValueError(f"rotary: sections has {len(sections)} numbers, the layout's position has {count} axes")
    return sections


def _norm(qk_norm, q: Tensor) -> tuple[bool, Tensor | None, Tensor | None, float]:
    if qk_norm is None:
        return False, None, None, 0.0
    if len(qk_norm) != 3:
        raise ValueError(f"rotary: qk_norm must be (q_weight, k_weight, eps), got {len(qk_norm)} values")
    for name, w in zip(("q_weight", "k_weight"), qk_norm):
        if w is not None and (w.shape != q.shape[2:] or not w.is_floating_point() or w.device != q.device):
            raise ValueError(
                f"rotary: {name} of qk_norm must be a float tensor [{q.shape[2]}] on {q.device}, "
                f"got {w.dtype} {list(w.shape)} on {w.device}"
            )
    return True, *qk_norm


def _rows(layout: Layout, rows: int, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Position `[T, A]` and which rows the layout holds."""
    inside = layout.samples(rows) < layout.batch
    if layout.position is not None:
        return layout.position, inside
    return layout.positions(rows)[:, None].expand(-1, len(sections)), inside


# The op: one or two tensors that share a layout


def _forward(x, weight, weight_1, *fields):
    x, out = [_dense(t) for t in x], [_native.empty_like(t) for t in x]
    _native.cpu().rotary(x, [], out, [weight, weight_1][: len(x)], [], *fields)
    return out


def _forward_triton(x, weight, weight_1, *fields):
    from mmfast.kernels import rotary as kernels

    x, out = [_dense(t) for t in x], _forward_fake(x)
    kernels.rotary(x, [], out, [weight, weight_1][: len(x)], [], *fields)
    return out


def _forward_fake(x, *_):
    return [t.new_empty(t.shape) for t in x]


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 else t.contiguous()


def _setup_context(ctx, inputs, output):
    x, weight, weight_1, cu_seqlens, seqused, start, position, *ctx.options = inputs
    ctx.set_materialize_grads(True)
    ctx.count = len(x)
    ctx.save_for_backward(*x, weight, weight_1, cu_seqlens, seqused, start, position)


def _backward(ctx, grads):
    saved = ctx.saved_tensors
    x, (weight, weight_1, *layout) = saved[: ctx.count], saved[ctx.count :]
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, x)]
    out = _rotary_backward(grads, list(x), weight, weight_1, *layout, *ctx.options)
    dx, dweights = out[: ctx.count], out[ctx.count :]
    dweights = [g if w is not None else None for g, w in zip([*dweights, None], (weight, weight_1))]
    return list(dx), *dweights, *[None] * (4 + len(ctx.options))


def _backward_cpu(grads, x, weight, weight_1, *fields):
    call, out = _backward_call(_native.empty, grads, x, weight, weight_1)
    _native.cpu().rotary(*call, *fields)
    return out


def _backward_triton(grads, x, weight, weight_1, *fields):
    from mmfast.kernels import rotary as kernels

    call, out = _backward_call(torch.empty, grads, x, weight, weight_1)
    kernels.rotary(*call, *fields)
    return out


def _backward_call(empty, grads, x, weight, weight_1):
    """The kernels' tensors, and the op's result, which they fill."""
    grads, x = [_dense(g) for g in grads], [_dense(t) for t in x]
    weights = [weight, weight_1][: len(x)]
    out = _backward_fake(grads, x, weight, weight_1, empty=empty)
    dweights = [g if w is not None else None for g, w in zip(out[len(x) :], weights)]
    return (x, grads, out[: len(x)], weights, dweights), out


def _backward_fake(grads, x, weight, weight_1, *_, empty=torch.empty):
    """Gradients of x, then of the weights (an absent weight's is empty)."""
    weights = [weight, weight_1][: len(x)]
    return [
        *(empty(*t.shape, dtype=t.dtype, device=t.device) for t in x),
        *(x[0].new_empty(0 if w is None else w.shape[0], dtype=torch.float32) for w in weights),
    ]


_LAYOUT = (
    "Tensor? weight, Tensor? weight_1, Tensor cu_seqlens, Tensor? seqused, Tensor? start, Tensor? position, "
    "float base, SymInt[] sections, bool norm, float eps, bool interleaved, str backend"
)
_rotary_backward = define(
    f"rotary_backward(Tensor[] grads, Tensor[] x, {_LAYOUT}) -> Tensor[]",
    cpu=_backward_cpu,
    triton=_backward_triton,
    fake=_backward_fake,
    backward=no_double_backward("rotary"),
)
_rotary = define(
    f"rotary(Tensor[] x, {_LAYOUT}) -> Tensor[]",
    cpu=_forward,
    triton=_forward_triton,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
