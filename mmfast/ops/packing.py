"""Packing: the parts of a batch into one sequence, and back.

    x[t] = norm(tokens[source[t]] + type_embedding[modality[t]] + sum over axes a of table[a][position[t, a]])

Formula and oracle: mmfast/reference/packing.py. The layout's fields are built on the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.layout import Layout
from mmfast.ops._dispatch import choose, cpu_refusal, cuda_refusal, triton_refusal
from mmfast.ops._pack_layout import Order, Part, check_parts, checks_values, pack_layout
from mmfast.ops._pack_op import _pack
from mmfast.ops._rows import gather, scatter
from mmfast.reference import packing as reference

_NORMS = ("none", "layer", "rms")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_MAX_DIM, _CUDA_MAX_DIM = 16384, 8192


class LayerNorm(NamedTuple):
    """Layer norm over D: weight and bias `[D]`, either may be None."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5


class RMSNorm(NamedTuple):
    """RMS norm over D: weight `[D]` or None."""

    weight: Tensor | None = None
    eps: float = 1e-6


def pack(
    parts: Mapping[str, Part | tuple],
    *,
    order: Order | None = None,
    type_embedding: Tensor | None = None,
    position_embedding: Mapping[str, Tensor | Sequence[Tensor]] | None = None,
    norm: LayerNorm | RMSNorm | nn.LayerNorm | nn.RMSNorm | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Layout]:
    """Packs the tokens of several modalities into one sequence, with embeddings and norm, in one pass.

    x[t] = norm(tokens[source[t]] + type_embedding[modality[t]] + sum_a position_embedding[name][a][position[t, a]])

    Sums and statistics are float32; rows are read once and written once.

    Args:
        parts: name -> `Part(tokens [Tm, D], item_lengths int32 [Im], positions int32 [Tm, A] or None)`, or a plain
            tuple. Items (an image, a text, a clip) lie behind each other in `tokens`; their lengths add up to Tm. An
            item may be empty: a missing modality. Tokens may be strided in dimension 0.
        order: None: sample b is the b-th item of every part, in the mapping's order; all parts then have B items.
            `Order` interleaves items freely; every item is used exactly once.
        type_embedding: `[P, D]`, one row per part, or None (aliases: modality, segment or token type embedding).
        position_embedding: name -> `[N, D]`, or a sequence of tables `[N_a, D]`, one for each axis of `positions`.
            Parts that are not named get none. Without positions a row's position is its place in the item.
        norm: `LayerNorm`, `RMSNorm`, their torch.nn modules over D, or None.
        backend: "cpu", "triton", "cuda" or "reference"; None: automatic.

    Returns:
        x `[T, D]` in the tokens' dtype (under autocast: autocast's), and its `Layout`, with names, sizes, modality,
        item, source, and position if any part has positions (parts without: place in the item, other axes 0).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on the CPU, or with MMFAST_CHECK=1, also lengths that do
            not add up, an order that does not use every item once, a position outside its table.
        NotImplementedError: second derivatives; `backend="reference"` has them.

    Differentiable in tokens, type_embedding, position_embedding, and the norm's weight and bias; gradients are
    bit-equal from run to run. Float64 on the CPU runs on the reference backend.
    """
    parts = {name: part if isinstance(part, Part) else Part(*part) for name, part in parts.items()}
    check_parts(parts)
    names = tuple(parts)
    tokens = [part.tokens for part in parts.values()]
    device, dim = tokens[0].device, tokens[0].shape[1]
    tables = _tables(names, dim, device, position_embedding)
    kind, weight, bias, eps = _norm(norm, dim, tokens[0].dtype)
    if type_embedding is not None:
        _check_param("type_embedding", type_embedding, (len(names), dim), device)
    if torch.is_autocast_enabled(device.type) and tokens[0].dtype != torch.float64:
        tokens = [t.to(torch.get_autocast_dtype(device.type)) for t in tokens]

    layout, item_position = pack_layout(parts, order)
    position = layout.position
    if position is None and any(tables):
        position = item_position[:, None]
    axes = 0 if position is None else position.shape[1]
    for name, mine in zip(names, tables):
        if len(mine) > axes:
            raise ValueError(
                f"pack: position_embedding[{name!r}] has {len(mine)} tables, but positions have {axes} axes; "
                "give one table per axis"
            )

    refusals = {
        "cpu": lambda: cpu_refusal(tokens[0], dtypes=_KERNEL_DTYPES),
        "triton": lambda: _triton_refusal(tokens[0]),
        "cuda": lambda: _cuda_refusal(tokens[0]),
    }
    chosen = choose("pack", backend, refusals)
    rows = (layout.source, layout.modality, position)
    if chosen == "reference":
        x = reference.pack_rows(tokens, *rows, type_embedding, tables, kind, weight, bias, eps)
        return x, layout
    dtype = tokens[0].dtype
    if dtype == torch.float16 and chosen == "cpu":
        tokens = [t.float() for t in tokens]
    if chosen != "cpu" and checks_values(device):
        _check_positions(layout.modality, position, names, tables)
    tokens = [t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous() for t in tokens]
    flat = [table for mine in tables for table in mine]
    first = [0]
    for mine in tables:
        first.append(first[-1] + len(mine))
    type_embedding, weight, bias, *flat = _common_dtype(tokens[0].dtype, [type_embedding, weight, bias, *flat])
    x, _, _ = _pack(
        tokens,
        layout.source,
        layout.modality,
        position,
        type_embedding,
        flat,
        first,
        list(names),
        _NORMS.index(kind),
        weight,
        bias,
        eps,
        chosen,
    )
    return x.to(dtype), layout


def unpack(x: Tensor, layout: Layout, *, backend: str | None = None) -> dict[str, Tensor]:
    """The parts of a packed batch, in their own order: the inverse of `pack`.

    out[name][source[t] - first row of name] = x[t]

    Args:
        x: `[T, ...]`, any dtype.
        layout: as `pack` returned it.
        backend: "cpu", "triton", "cuda" or "reference"; None: automatic.

    Returns:
        name -> `[Tm, ...]`.

    Raises:
        ValueError: the layout does not come from `pack`, or x has another number of rows.

    Differentiable in x, any number of times.
    """
    if layout.source is None or layout.sizes is None:
        raise ValueError("unpack: the layout has no source and sizes; expected the layout that mmfast.pack returned")
    if x.dim() < 1 or x.shape[0] != layout.source.shape[0]:
        raise ValueError(f"unpack: x has shape {list(x.shape)}; expected [T, ...] with T = {layout.source.shape[0]}")
    if sum(layout.sizes) != x.shape[0]:
        raise ValueError(f"unpack: the layout's sizes add up to {sum(layout.sizes)}, but x has {x.shape[0]} rows")
    return dict(zip(layout.names, scatter("unpack", x, layout.source, layout.sizes, backend)))


def to_padded(
    x: Tensor, layout: Layout, length: int | None = None, value: float = 0.0, *, backend: str | None = None
) -> Tensor:
    """A packed batch as a padded tensor.

    out[b, l] = x[cu_seqlens[b] + l] where l is less than the sample's length, else `value`.

    Args:
        x: `[T, ...]`, any dtype.
        layout: of x.
        length: L, at least the longest sample; None: the layout's `max_seqlen`, else the longest sample, which waits
            for the device (under torch.compile: pass it).
        value: filling.
        backend: "cpu", "triton", "cuda" or "reference"; None: automatic.

    Returns:
        `[B, L, ...]`.

    Raises:
        ValueError: on the CPU, or with MMFAST_CHECK=1: a sample longer than L, or a layout that ends after x.

    Differentiable in x, any number of times; rows outside the layout get zero gradients.
    """
    length = _padded_length("to_padded", layout, length)
    start, lengths = layout.cu_seqlens[:-1].long(), layout.lengths().long()
    column = torch.arange(length, device=layout.device)
    index = torch.where(column < lengths[:, None], start[:, None] + column, -1).flatten()
    out = gather("to_padded", x, index, value, backend)
    return out.reshape(layout.batch, length, *x.shape[1:])


def from_padded(x: Tensor, layout: Layout, total: int | None = None, *, backend: str | None = None) -> Tensor:
    """A padded tensor as a packed batch: the inverse of `to_padded`.

    out[cu_seqlens[b] + l] = x[b, l]; rows outside the layout are zero.

    Args:
        x: `[B, L, ...]`, any dtype; L at least the longest sample. Padding is never read.
        layout: of the packed batch.
        total: T; None: the layout's `total`, which waits for the device where no field of the layout tells it.
        backend: "cpu", "triton", "cuda" or "reference"; None: automatic.

    Returns:
        `[T, ...]`.

    Raises:
        ValueError: x has another number of samples; on the CPU, or with MMFAST_CHECK=1: a sample longer than L.

    Differentiable in x, any number of times.
    """
    if x.dim() < 2 or x.shape[0] != layout.batch:
        raise ValueError(f"from_padded: x has shape {list(x.shape)}; expected [B, L, ...] with B = {layout.batch}")
    length = _padded_length("from_padded", layout, x.shape[1])
    sample = layout.samples(layout.total if total is None else total)
    if layout.batch == 0:
        index = torch.full_like(sample, -1)
    else:
        inside = sample.clamp(max=layout.batch - 1)
        column = torch.arange(sample.shape[0], device=layout.device) - layout.cu_seqlens[inside]
        # A sample longer than L must not read its neighbour.
        valid = (sample < layout.batch) & (column < length)
        index = torch.where(valid, sample * length + column, -1)
    return gather("from_padded", x.flatten(0, 1), index, 0.0, backend)


# Arguments


def _padded_length(op: str, layout: Layout, length: int | None) -> int:
    if length is None:
        length = layout.max_seqlen
    if length is None:
        return int(layout.lengths().max()) if layout.batch else 0
    if checks_values(layout.device) and layout.batch and int(layout.lengths().max()) > length:
        raise ValueError(f"{op}: a sample has {int(layout.lengths().max())} rows, but the padded length is {length}")
    return length


def _check_param(name: str, t: Any, shape: tuple[int | None, ...], device: torch.device) -> None:
    fits = isinstance(t, Tensor) and t.dim() == len(shape)
    fits = fits and (shape[0] is None or t.shape[0] == shape[0]) and t.shape[-1] == shape[-1]
    if not fits:
        expected = ", ".join("N" if size is None else str(size) for size in shape)
        got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(f"pack: {name} must be a tensor [{expected}], got {got}")
    if not t.is_floating_point() or t.device != device:
        raise ValueError(f"pack: {name} is {t.dtype} on {t.device}; expected a float tensor on {device}")


def _tables(names, dim, device, position_embedding) -> list[list[Tensor]]:
    """Position tables per part, in the order of their axes."""
    position_embedding = position_embedding or {}
    for name in position_embedding:
        if name not in names:
            raise ValueError(f"pack: position_embedding names {name!r}, which is no part ({', '.join(names)})")
    tables = []
    for name in names:
        mine = position_embedding.get(name, ())
        mine = [mine] if isinstance(mine, Tensor) else list(mine)
        if len(mine) > 3:
            raise ValueError(f"pack: position_embedding[{name!r}] has {len(mine)} tables; expected at most 3")
        for table in mine:
            _check_param(f"position_embedding[{name!r}]", table, (None, dim), device)
        tables.append(mine)
    return tables


def _norm(norm, dim: int, dtype: torch.dtype) -> tuple[str, Tensor | None, Tensor | None, float]:
    """Kind, weight, bias, eps of a norm spec."""
    if norm is None:
        return "none", None, None, 0.0
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and tuple(norm.normalized_shape) != (dim,):
        raise ValueError(f"pack: norm is over {tuple(norm.normalized_shape)}; expected ({dim},)")
    if isinstance(norm, (LayerNorm, nn.LayerNorm)):
        kind, bias = "layer", norm.bias
    elif isinstance(norm, (RMSNorm, nn.RMSNorm)):
        kind, bias = "rms", None
    else:
        raise ValueError(f"pack: norm is a {type(norm).__name__}; expected LayerNorm, RMSNorm or None")
    for name, t in (("norm's weight", norm.weight), ("norm's bias", bias)):
        if t is not None:
            _check_param(name, t, (dim,), t.device)
    eps = torch.finfo(dtype).eps if norm.eps is None else norm.eps  # as torch.nn.RMSNorm takes it
    return kind, norm.weight, bias, eps


def _triton_refusal(tokens: Tensor) -> str | None:
    if tokens.shape[1] > _TRITON_MAX_DIM:
        return f"D is {tokens.shape[1]}; the Triton kernels hold whole rows, up to {_TRITON_MAX_DIM}"
    return triton_refusal(tokens, dtypes=_KERNEL_DTYPES)


def _cuda_refusal(tokens: Tensor) -> str | None:
    if tokens.shape[1] > _CUDA_MAX_DIM:
        return f"D is {tokens.shape[1]}; the CUDA kernels hold whole rows, up to {_CUDA_MAX_DIM}"
    return cuda_refusal(tokens, dtypes=_KERNEL_DTYPES)


def _check_positions(modality: Tensor, position: Tensor | None, names, tables) -> None:
    """As the CPU kernels check it."""
    for m, mine in enumerate(tables):
        for axis, table in enumerate(mine):
            wrong = (modality == m) & ((position[:, axis] < 0) | (position[:, axis] >= table.shape[0]))
            if bool(wrong.any()):
                t = int(wrong.nonzero()[0])
                raise ValueError(
                    f"pack: position_embedding[{names[m]}]: position {int(position[t, axis])} of row {t} on axis "
                    f"{axis} is outside its table of {table.shape[0]} rows"
                )


def _common_dtype(dtype: torch.dtype, params: list[Tensor | None]) -> list[Tensor | None]:
    """Parameters as the kernels take them: all in the tokens' dtype, else all float32; contiguous rows."""
    given = [t for t in params if t is not None]
    if any(t.dtype != dtype for t in given):
        params = [None if t is None else t.float() for t in params]
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in params]
