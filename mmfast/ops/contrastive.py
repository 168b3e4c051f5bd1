"""Contrastive losses over all pairs of two sets of features, in memory that grows with N and not with N^2 for large N.

Formulas: `mmfast/reference/contrastive.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast import _native
from mmfast.ops._dispatch import choose, cpu_refusal, triton_refusal
from mmfast.ops._library import define, no_double_backward
from mmfast.reference import contrastive as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGN = 16  # features are padded with zeros to a multiple of this
_KEPT_PRODUCTS = 1 << 24  # what InfoNCE keeps for its backward pass at most: 64 MiB


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    *,
    scale: Tensor | float,
    kind: str = "infonce",
    bias: Tensor | float | None = None,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of N pairs (x_i, y_i), every other pair a negative.

        z_ij = scale * <x_i, y_j> + bias
        infonce: 1 / (2 N) * sum_i (log sum_j exp z_ij - z_ii) + (log sum_j exp z_ji - z_ii)
        sigmoid: -1 / N * sum_ij log sigmoid(l_ij z_ij), l_ii = 1, l_ij = -1

    Scores are computed in tiles: O(N D) memory and 6 N^2 D operations for the sigmoid loss, whose gradients are made
    with the loss in one pass. InfoNCE keeps up to 64 MiB of its products for the backward pass, all of them up to
    N = 4096; it computes the others again: up to 8 N^2 D operations, still O(N D) memory.

    Args:
        x, y: features `[N, D]`, N >= 1; the caller normalises them. float32, bfloat16, float16 (float64: reference).
            Sums, exponentials and statistics are float32. Under autocast they are cast to its dtype.
        scale: factor of the scores, 1 / temperature (CLIP `logit_scale.exp()`); a number, or a tensor of one element
            on x's device, which receives a gradient.
        kind: "infonce" (CLIP) or "sigmoid" (SigLIP).
        bias: added to the scores (SigLIP `logit_bias`), sigmoid only; as `scale`.
        ids: int64 `[N]`, which thing each pair shows: pairs (i, j != i) with equal ids are no negatives, and left out.
        group: process group whose ranks hold equally many pairs each: the loss is over all their pairs. y is gathered
            once; each rank computes its rows of scores. The value is the same on all ranks. Gradients are those of
            the sum of the ranks' values, so that averaging over ranks (DDP) gives the gradient of one loss.
        backend: "cpu", "triton", "reference", or None for the best that can run.

    Returns:
        float32 scalar (float64 for float64 input). Once differentiable (reference: twice) in x, y, scale, bias.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message says which and how to mend it.
        RuntimeError: the explicit backend cannot run.
        NotImplementedError: second derivatives of the kernels.

    Sources: Radford et al. 2021, figure 3 (CLIP); Zhai et al. 2023, eq. 1 (SigLIP); Cheng et al. 2024 (Inf-CL, tiles).
    """
    op = "contrastive_loss"
    _check(op, x, y, kind, bias, ids)
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        x, y = x.to(torch.get_autocast_dtype(device)), y.to(torch.get_autocast_dtype(device))
    scale = _number(op, "scale", scale, x)
    bias = _number(op, "bias", 0.0 if bias is None else bias, x)
    refusals = {
        "cpu": lambda: cpu_refusal(x, y, dtypes=_DTYPES),
        "triton": lambda: triton_refusal(x, y, dtypes=_DTYPES),
    }
    chosen = choose(op, backend, refusals)
    world = 1 if group is None else dist.get_world_size(group)
    offset = 0
    ids_y = ids
    if world > 1:
        y = _gather(op, y, group)
        ids_y = None if ids is None else _gather(op, ids, group)
        offset = dist.get_rank(group) * x.shape[0]
    if chosen != "reference":
        x, y = _prepared(x, chosen), _prepared(y, chosen)
    if kind == "sigmoid":
        if chosen != "reference":
            gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale, bias))
            loss = _sigmoid(x, y, scale, bias, ids, ids_y, offset, gradients, chosen)[0]
        else:
            loss = reference.sigmoid_rows(x, y, scale, bias, ids, ids_y, offset).mean()
    else:
        if chosen != "reference":
            gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, scale))
            row, column, diagonal, _ = _infonce(x, y, scale, ids, ids_y, offset, gradients, chosen)
        else:
            row, column, diagonal = reference.infonce_statistics(x, y, scale, ids, ids_y, offset)
        if world > 1:
            # Each rank saw some rows of every column.
            parts = _gather(op, column[None], group)
            column = parts.logsumexp(0)[offset : offset + x.shape[0]]
        loss = (0.5 * (row + column) - diagonal).mean()
    if world > 1:
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        loss = loss + (total / world - loss.detach())
    return loss


def _check(op, x, y, kind, bias, ids) -> None:
    if kind not in ("infonce", "sigmoid"):
        raise ValueError(f"{op}: kind is {kind!r}; expected 'infonce' or 'sigmoid'")
    for name, t in (("x", x), ("y", y), *(() if ids is None else (("ids", ids),))):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    if x.dim() != 2 or x.shape[0] < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: x is {_describe(x)}; expected floating-point features [N, D] with N >= 1")
    if y.shape != x.shape or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(
            f"{op}: y is {_describe(y)} on {y.device}; expected x's dtype, shape and device, {_describe(x)} on "
            f"{x.device}: row i of x and row i of y are a pair"
        )
    if bias is not None and kind != "sigmoid":
        raise ValueError(f"{op}: bias belongs to kind='sigmoid'; a constant changes nothing in 'infonce'")
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != x.shape[:1] or ids.device != x.device):
        raise ValueError(f"{op}: ids are {_describe(ids)}; expected int64 [{x.shape[0]}] on {x.device}")


def _number(op: str, name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A tensor of no dimension, float32 unless x is float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number or a torch.Tensor, got {type(value).__name__}")
        return torch.full((), value, dtype=dtype, device=x.device)
    if value.numel() != 1 or value.device != x.device:
        raise ValueError(f"{op}: {name} is {_describe(value)} on {value.device}; expected one number on {x.device}")
    return value.reshape(()).to(dtype)


def _prepared(x: Tensor, backend: str) -> Tensor:
    """A dtype that the kernels take, contiguous, features a multiple of 16."""
    x = x.float() if x.dtype == torch.float16 and backend == "cpu" else x
    if x.shape[1] % _ALIGN or x.shape[1] == 0:
        x = torch.nn.functional.pad(x, (0, (-x.shape[1]) % _ALIGN or _ALIGN))
    return x.contiguous()


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


# All ranks' rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        world = dist.get_world_size(group)
        out = x.new_empty(world * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        # The sum over ranks in float32: bfloat16 would round once per rank.
        total = grad.float().contiguous()
        out = total.new_empty(ctx.rows, *grad.shape[1:])
        dist.reduce_scatter_tensor(out, total, group=ctx.group)
        return out.to(grad.dtype), None


def _gather(op: str, x: Tensor, group) -> Tensor:
    if x.device.type == "cpu" and x.dim() == 2 and x.shape[0] > 1:
        rows = torch.tensor([x.shape[0]])
        every = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, rows, group=group)
        if any(int(r) != x.shape[0] for r in every):
            raise ValueError(f"{op}: the ranks hold {[int(r) for r in every]} pairs; expected equally many on each")
    return _Gather.apply(x, group) if x.is_floating_point() else _Gather.forward(_NoContext(), x, group)


class _NoContext:
    pass


# The kernels


def _codes(ids_x: Tensor | None, ids_y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Ids as int32 that are equal where the ids are. Waits for no GPU, unlike torch.unique."""
    if ids_x is None:
        return None, None
    ordered, place = torch.cat([ids_x, ids_y]).sort()
    codes = torch.empty_like(place, dtype=torch.int32)
    codes[place] = torch.nn.functional.pad((ordered.diff() != 0).int().cumsum(0, dtype=torch.int32), (1, 0))
    return codes[: ids_x.shape[0]].contiguous(), codes[ids_x.shape[0] :].contiguous()


def _products(x, y, gradients):
    """Room for rows of x y^T until the backward pass, in panels of 64 columns; of no size where none are kept."""
    panels = (y.shape[0] + 63) // 64
    kept = min(x.shape[0], _KEPT_PRODUCTS // (64 * panels)) if gradients else 0
    return x.new_empty((panels, kept, 64), dtype=torch.float32)


def _infonce_cpu(x, y, scale, ids_x, ids_y, offset, gradients):
    row, diagonal = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    column, products = torch.empty(y.shape[0], dtype=torch.float32), _products(x, y, gradients)
    codes = _codes(ids_x, ids_y)
    _native.cpu().contrastive_forward(x, y, scale, None, *codes, offset, False, row, column, diagonal, products)
    return row, column, diagonal, products


def _infonce_triton(x, y, scale, ids_x, ids_y, offset, gradients):
    from mmfast.kernels import contrastive as kernels

    row, column, diagonal, products = _infonce_fake(x, y, scale, ids_x, ids_y, offset, gradients)
    kept = _matrix(products, x, y)
    if kept is not None:
        kept[:, y.shape[0] :] = 0  # the kernels leave out columns that do not exist
    kernels.infonce_forward(x, y, scale, *_codes(ids_x, ids_y), offset, row, column, diagonal, kept)
    return row, column, diagonal, products


def _matrix(products, x, y):
    """The kept products as a matrix, or None."""
    stride = (y.shape[0] + 63) // 64 * 64
    size = x.shape[0] * stride
    return products.flatten()[:size].view(-1, stride) if products.numel() >= size else None


def _infonce_fake(x, y, scale, ids_x, ids_y, offset, gradients):
    n, m = x.shape[0], y.shape[0]
    return *(x.new_empty(size, dtype=torch.float32) for size in (n, m, n)), _products(x, y, gradients)


def _sigmoid_cpu(x, y, scale, bias, ids_x, ids_y, offset, gradients):
    n = x.shape[0]
    if not gradients:
        row = torch.empty(n, dtype=torch.float32)
        _native.cpu().contrastive_forward(x, y, scale, bias, *_codes(ids_x, ids_y), offset, True, row, None, None, None)
        return row.mean(), *(torch.empty(0) for _ in range(4))
    loss = torch.empty(1)
    share = torch.full((n,), 1 / n)
    return loss.reshape(()), *_gradients(x, y, scale, bias, ids_x, ids_y, offset, None, None, None, [share], loss=loss)


def _sigmoid_triton(x, y, scale, bias, ids_x, ids_y, offset, gradients):
    arguments = (x, y, scale, bias, ids_x, ids_y, offset, None, None, None, [])
    if not gradients:
        *_, loss = _gradients_triton(*arguments, need_x=False, need_y=False)
        return loss, *(x.new_empty(0, dtype=torch.float32) for _ in range(4))
    *gradients, loss = _gradients_triton(*arguments)
    return loss, *gradients


def _gradients_triton(x, y, scale, bias, ids_x, ids_y, offset, row, column, products, grads, need_x=True, need_y=True):
    """Gradients of x, y, scale and bias, and the loss."""
    from mmfast.kernels import contrastive as kernels

    dx = torch.empty_like(x) if need_x else x.new_empty(0, 0)
    dy = torch.empty_like(y) if need_y else y.new_empty(0, 0)
    grads, wanted = [g.contiguous() for g in grads], (dx if need_x else None, dy if need_y else None)
    sums = kernels.gradients(x, y, scale, bias, *_codes(ids_x, ids_y), offset, row, column, products, grads, *wanted)
    return dx, dy, *(s.clone() for s in sums.unbind())


def _sigmoid_fake(x, y, scale, bias, ids_x, ids_y, offset, gradients):
    number = x.new_empty((), dtype=torch.float32)
    if not gradients:
        return number, *(x.new_empty(0, dtype=torch.float32) for _ in range(4))
    return number, torch.empty_like(x), torch.empty_like(y), torch.empty_like(number), torch.empty_like(number)


def _gradients(
    x, y, scale, bias, ids_x, ids_y, offset, row, column, products, grads, need_x=True, need_y=True, loss=None
):
    dx = torch.empty(x.shape if need_x else (0, 0), dtype=torch.float32)
    dy = torch.empty(y.shape if need_y else (0, 0), dtype=torch.float32)
    dscale, dbias = torch.empty(1), torch.empty(1)
    grads = [g.contiguous() for g in grads] + [None, None]
    _native.cpu().contrastive_backward(
        x,
        y,
        scale,
        bias,
        *_codes(ids_x, ids_y),
        offset,
        column is None,
        row,
        column,
        products,
        *grads[:3],
        dx if need_x else None,
        dy if need_y else None,
        dscale,
        dbias,
        loss,
    )
    return dx.to(x.dtype), dy.to(y.dtype), dscale.reshape(()), dbias.reshape(())


def _backward_cpu(x, y, scale, ids_x, ids_y, offset, row, column, products, grads, need_x, need_y):
    return _gradients(x, y, scale, None, ids_x, ids_y, offset, row, column, products, grads, need_x, need_y)[:3]


def _backward_triton(x, y, scale, ids_x, ids_y, offset, row, column, products, grads, need_x, need_y):
    kept = _matrix(products, x, y)
    return _gradients_triton(x, y, scale, None, ids_x, ids_y, offset, row, column, kept, grads, need_x, need_y)[:3]


def _backward_fake(x, y, scale, ids_x, ids_y, offset, row, column, products, grads, need_x, need_y):
    dx = torch.empty_like(x) if need_x else x.new_empty(0, 0)
    dy = torch.empty_like(y) if need_y else y.new_empty(0, 0)
    return dx, dy, scale.new_empty(())


_backward = define(
    "contrastive_infonce_backward(Tensor x, Tensor y, Tensor scale, Tensor? ids_x, Tensor? ids_y, int offset,"
    " Tensor row, Tensor column, Tensor products, Tensor[] grads, bool need_x, bool need_y, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    triton=_backward_triton,
    fake=_backward_fake,
    setup_context=lambda ctx, inputs, output: None,
    backward=no_double_backward("contrastive_loss"),
)


def _scaled(grad, inputs, gradients):
    return [(grad * g).to(g.dtype) for g in gradients]


# The inputs take part so that a second derivative is noticed.
_sigmoid_backward_op = define(
    "contrastive_sigmoid_backward(Tensor grad, Tensor[] inputs, Tensor[] gradients, str backend) -> Tensor[]",
    cpu=_scaled,
    triton=_scaled,
    fake=lambda grad, inputs, gradients: [torch.empty_like(g) for g in gradients],
    setup_context=lambda ctx, inputs, output: None,
    backward=no_double_backward("contrastive_loss"),
)


def _setup_infonce(ctx, inputs, output):
    x, y, scale, ids_x, ids_y, ctx.offset, _, ctx.backend = inputs
    row, column, _, products = output
    ctx.mark_non_differentiable(products)
    ctx.set_materialize_grads(False)  # zeros as large as the products
    ctx.save_for_backward(x, y, scale, ids_x, ids_y, row, column, products)


def _infonce_backward(ctx, *grads):
    *saved, row, column, products = ctx.saved_tensors
    need_x, need_y, need_scale, *_ = ctx.needs_input_grad
    grads = [torch.zeros_like(like) if g is None else g for g, like in zip(grads, (row, column, row))]
    dx, dy, dscale = _backward(*saved, ctx.offset, row, column, products, grads, need_x, need_y, ctx.backend)
    return *(g if need else None for g, need in ((dx, need_x), (dy, need_y), (dscale, need_scale))), *[None] * 5


def _setup_sigmoid(ctx, inputs, output):
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[-1]
    ctx.save_for_backward(*inputs[:4], *gradients)


def _sigmoid_backward(ctx, grad, *_):
    inputs, gradients = list(ctx.saved_tensors[:4]), list(ctx.saved_tensors[4:])
    if grad is None:
        return (None,) * 9
    result = _sigmoid_backward_op(grad, inputs, gradients, ctx.backend)
    return *(g if need else None for g, need in zip(result, ctx.needs_input_grad)), *[None] * 5


_infonce = define(
    "contrastive_infonce(Tensor x, Tensor y, Tensor scale, Tensor? ids_x, Tensor? ids_y, int offset, bool gradients,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_infonce_cpu,
    triton=_infonce_triton,
    fake=_infonce_fake,
    setup_context=_setup_infonce,
    backward=_infonce_backward,
)

_sigmoid = define(
    "contrastive_sigmoid(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? ids_x, Tensor? ids_y, int offset,"
    " bool gradients, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_sigmoid_cpu,
    triton=_sigmoid_triton,
    fake=_sigmoid_fake,
    setup_context=_setup_sigmoid,
    backward=_sigmoid_backward,
)
