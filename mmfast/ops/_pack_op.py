"""`mmfast::pack` and its gradient as operators of torch: allocation, the kernels' calls, autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mmfast import _native
from mmfast.ops._library import define, no_double_backward

# Of the CUDA kernels' backward pass: threads that share the rows, about two thirds of what a large GPU holds, and the
# fewest rows whose sums one group of them takes.
_THREADS, _CHUNK_ROWS = 131072, 16

# The arguments that both kernels take, in order.
_CALL = ("tokens", "source", "modality", "position", "type_embedding", "tables", "table_first", "names", "norm")


def _forward_cpu(*call) -> tuple[Tensor, Tensor, Tensor]:
    out = _forward_fake(*call, empty=_native.empty)
    _native.cpu().pack_forward(*call, *out)
    return out


def _forward_triton(*call) -> tuple[Tensor, Tensor, Tensor]:
    from mmfast.kernels import packing as kernels

    out = _forward_fake(*call)
    call = dict(zip((*_CALL, "weight", "bias", "eps", "x", "mean", "rstd"), (*call, *out)))
    del call["names"]
    kernels.pack_forward(**call)
    return out


def _forward_cuda(*call) -> tuple[Tensor, Tensor, Tensor]:
    out = _forward_fake(*call)
    _native.cuda().pack_forward(*call, *out, _native.stream_of(out[0]))
    return out


def _forward_fake(
    tokens,
    source,
    modality,
    position,
    type_embedding,
    tables,
    table_first,
    names,
    norm,
    weight,
    bias,
    eps,
    empty=torch.empty,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = source.shape[0]
    x = empty(rows, tokens[0].shape[1], dtype=tokens[0].dtype, device=tokens[0].device)
    mean = tokens[0].new_empty(rows if norm == 1 else 0, dtype=torch.float32)
    rstd = tokens[0].new_empty(rows if norm else 0, dtype=torch.float32)
    return x, mean, rstd


def _setup_context(ctx, inputs, output):
    tokens, source, modality, position, type_embedding, tables, first, names, norm, weight, bias, _, backend = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.sizes = [t.shape[0] for t in tokens]
    ctx.first, ctx.names, ctx.norm, ctx.backend = first, names, norm, backend
    kept = list(tokens) if norm else []  # without a norm the gradient does not depend on the tokens
    ctx.counts = len(kept), len(tables)
    ctx.save_for_backward(source, modality, position, type_embedding, weight, bias, mean, rstd, *kept, *tables)


def _flags(needs, count: int) -> list[bool]:
    """needs_input_grad of a list argument: one flag per tensor."""
    return list(needs) if isinstance(needs, (list, tuple)) else [bool(needs)] * count


def _backward(ctx, dx, *_):
    if dx is None:
        return (None,) * 13
    source, modality, position, type_embedding, weight, bias, mean, rstd, *rest = ctx.saved_tensors
    tokens, tables = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    asked, parts = ctx.needs_input_grad, len(ctx.sizes)
    needs = [*_flags(asked[0], parts), asked[4], *_flags(asked[5], len(tables)), asked[9], asked[10]]
    grads = _pack_backward(
        dx,
        tokens,
        source,
        modality,
        position,
        type_embedding,
        tables,
        ctx.first,
        ctx.names,
        ctx.norm,
        weight,
        bias,
        mean,
        rstd,
        ctx.sizes,
        needs,
        ctx.backend,
    )
    grads = [g if need else None for g, need in zip(grads, needs)]
    dtokens, dtype_embedding = grads[:parts], grads[parts]
    dtables, (dweight, dbias) = grads[parts + 1 : -2], grads[-2:]
    return dtokens, None, None, None, dtype_embedding, dtables, None, None, None, dweight, dbias, None, None


def _backward_fake(
    dx,
    tokens,
    source,
    modality,
    position,
    type_embedding,
    tables,
    first,
    names,
    norm,
    weight,
    bias,
    mean,
    rstd,
    sizes,
    needs,
    empty=torch.empty,
) -> list[Tensor]:
    """Empty gradients in the order of `needs`: tokens, type_embedding, tables, weight, bias; not needed: empty."""
    shapes = [(size, dx.shape[1]) for size in sizes]
    like = [dx] * len(sizes) + [type_embedding, *tables, weight, bias]
    shapes += [None if t is None else t.shape for t in like[len(sizes) :]]
    return [
        empty(*shape, dtype=t.dtype, device=dx.device) if need else dx.new_empty(0)
        for shape, t, need in zip(shapes, like, needs)
    ]


def _backward_cpu(dx, *arguments) -> list[Tensor]:
    dx, grads, wanted, sizes = _backward_results(_native.empty, dx, *arguments)
    _native.cpu().pack_backward(dx, *arguments[:-2], *wanted, sizes)
    return grads


def _backward_triton(dx, *arguments) -> list[Tensor]:
    from mmfast.kernels import packing as kernels

    dx, grads, (dtokens, dtype_embedding, dtables, dweight, dbias), sizes = _backward_results(
        torch.empty, dx, *arguments
    )
    call = dict(zip((*_CALL, "weight", "bias", "mean", "rstd"), arguments))
    del call["names"], call["bias"]
    kernels.pack_backward(
        dx=dx, **call, dtokens=dtokens, dtype_embedding=dtype_embedding, dtables=dtables, dweight=dweight, dbias=dbias,
        sizes=sizes,
    )  # fmt: skip
    return grads


def _backward_cuda(dx, *arguments) -> list[Tensor]:
    dx, grads, wanted, sizes = _backward_results(torch.empty, dx, *arguments)
    _, dtype_embedding, dtables, dweight, dbias = wanted
    source, first = arguments[1], arguments[6]
    module, stream = _native.cuda(), _native.stream_of(dx)
    axes = sorted({i - begin for begin, end in pairwise(first) for i in range(begin, end) if dtables[i] is not None})
    sums = sum(g is not None for g in (dtype_embedding, dweight, dbias)) + (2 if axes else 0)
    rows, dim = dx.shape
    chunk_rows = max(_CHUNK_ROWS, -(-rows * module.pack_threads(dim) // _THREADS))
    chunks = sum(-(-size // chunk_rows) for size in sizes)
    workspace = dx.new_empty(sums * chunks * dim, dtype=torch.float32)
    for g in dtables:
        if g is not None:
            g.zero_()  # rows of the table that no row of x names are not written
    call = dx, *arguments[:-2]
    for axis in axes or [-1]:
        if axes:
            key = torch.empty_like(source, dtype=torch.int32)
            module.pack_keys(*call, *wanted, sizes, axis, key, stream)
            key, order = torch.sort(key, stable=True)
        else:
            key, order = None, torch.full_like(source, -1)
            module.invert_rows(source, order, stream)
        module.pack_backward(*call, *wanted, sizes, axis, order, key, chunk_rows, workspace, stream)
        wanted = [None] * len(sizes), None, dtables, None, None  # all but the tables belongs to the first pass
    return grads


def _backward_results(empty, dx, *arguments):
    """dx with dense rows, all gradients, those that are wanted in the kernels' order, and the parts' sizes."""
    if dx.stride(1) != 1 and dx.shape[1] > 1:
        dx = dx.contiguous()
    *_, sizes, needs = arguments
    grads = _backward_fake(dx, *arguments, empty=empty)
    wanted = [g if need else None for g, need in zip(grads, needs)]
    parts = len(sizes)
    return dx, grads, (wanted[:parts], wanted[parts], wanted[parts + 1 : -2], wanted[-2], wanted[-1]), sizes


_ROWS = "Tensor source, Tensor modality, Tensor? position, Tensor? type_embedding, Tensor[] tables"
_pack_backward = define(
    f"pack_backward(Tensor dx, Tensor[] tokens, {_ROWS}, SymInt[] table_first, str[] names, int norm, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor rstd, SymInt[] sizes, bool[] needs, str backend) -> Tensor[]",
    cpu=_backward_cpu,
    triton=_backward_triton,
    cuda=_backward_cuda,
    fake=_backward_fake,
    backward=no_double_backward("pack"),
)
_pack = define(
    f"pack(Tensor[] tokens, {_ROWS}, SymInt[] table_first, str[] names, int norm, Tensor? weight, Tensor? bias, "
    "float eps, str backend) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    triton=_forward_triton,
    cuda=_forward_cuda,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
