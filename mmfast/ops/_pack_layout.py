"""The layout of a packed batch from its parts and their order: vectorised, on the device, without waiting for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmfast import _native
from mmfast.layout import MAX_MODALITIES, Layout


class Part(NamedTuple):
    """The items of one modality, behind each other.

    Args:
        tokens: `[Tm, D]`.
        item_lengths: int32 `[Im]` tensor on the tokens' device, or a list: rows of each item; 0 is a missing item.
        positions: int32 `[Tm, A]`, A <= 3 axes, or None.
    """

    tokens: Tensor
    item_lengths: Tensor | Sequence[int]
    positions: Tensor | None = None


class Order(NamedTuple):
    """Which items make up each sample.

    Args:
        samples: int32 `[B]`, number of items per sample; their sum is S.
        part: uint8 `[S]`, part of each item, by its place in the mapping of parts.
        item: int32 `[S]`, number of the item in its part. Every item is used exactly once.
    """

    samples: Tensor
    part: Tensor
    item: Tensor

    @classmethod
    def from_lists(cls, samples: Sequence[Sequence[tuple[str, int]]], names: Sequence[str]) -> Order:
        """From nested lists, for collating on the host: `[[("image", 0), ("text", 0), ("image", 1)], ...]`.

        Args:
            samples: for each sample its (part name, item number) in order.
            names: the parts' names in the order of the mapping given to `pack`.
        """
        ids = {name: i for i, name in enumerate(names)}
        flat = [pair for sample in samples for pair in sample]
        unknown = {name for name, _ in flat} - set(ids)
        if unknown:
            raise ValueError(f"Order.from_lists: {sorted(unknown)} are no parts ({', '.join(ids)})")
        return cls(
            torch.tensor([len(sample) for sample in samples], dtype=torch.int32),
            torch.tensor([ids[name] for name, _ in flat], dtype=torch.uint8),
            torch.tensor([item for _, item in flat], dtype=torch.int32),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Order:
        """The order on another device."""
        return Order(*(t.to(device, non_blocking=non_blocking) for t in self))


def checks_values(device: torch.device) -> bool:
    """Whether values are looked at: where it costs no synchronisation, or with MMFAST_CHECK=1."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or os.environ.get("MMFAST_CHECK", "0") == "1"


def _constants(values: Sequence[int | bool], device: torch.device) -> Tensor:
    """Numbers on the device; a copy from the host's memory would wait for the GPU."""
    if device.type == "cpu":
        return torch.tensor(values)
    return torch.stack([torch.full((), value, device=device) for value in values])


def check_parts(parts: Mapping[str, Part]) -> None:
    """Shapes, dtypes and devices of the parts."""
    if not 1 <= len(parts) <= MAX_MODALITIES:
        raise ValueError(f"pack: got {len(parts)} parts; expected 1 to {MAX_MODALITIES}")
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        tokens, positions = part.tokens, part.positions
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or not tokens.is_floating_point():
            got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"pack: tokens of {name!r} must be a float tensor [Tm, D], got {got}")
        if tokens.dtype != first.tokens.dtype or tokens.device != first.tokens.device:
            what = "dtype" if tokens.dtype != first.tokens.dtype else "device"
            raise ValueError(
                f"pack: {what} of {name!r} is {getattr(tokens, what)}, of {first_name!r} "
                f"{getattr(first.tokens, what)}; convert one of them"
            )
        if tokens.shape[1] != first.tokens.shape[1]:
            raise ValueError(
                f"pack: {name!r} has D = {tokens.shape[1]}, {first_name!r} has {first.tokens.shape[1]}; "
                "project them to one width first"
            )
        if positions is not None and (
            not isinstance(positions, Tensor)
            or positions.dim() != 2
            or positions.shape[0] != tokens.shape[0]
            or not 1 <= positions.shape[1] <= 3
            or positions.is_floating_point()
            or positions.device != tokens.device
        ):
            got = f"{positions.dtype} {list(positions.shape)}" if isinstance(positions, Tensor) else type(positions)
            raise ValueError(
                f"pack: positions of {name!r} must be int32 [{tokens.shape[0]}, A] with 1 to 3 axes on "
                f"{tokens.device}, got {got}"
            )
        if isinstance(part.item_lengths, Tensor):
            lengths = part.item_lengths
            if lengths.dim() != 1 or lengths.is_floating_point() or lengths.device != tokens.device:
                raise ValueError(
                    f"pack: item_lengths of {name!r} must be int32 [Im] on {tokens.device}, "
                    f"got {lengths.dtype} {list(lengths.shape)} on {lengths.device}"
                )


def pack_layout(parts: Mapping[str, Part], order: Order | None) -> tuple[Layout, Tensor]:
    """The layout of the packed batch, and each row's place in its item, int32 `[T]`."""
    names = tuple(parts)
    sizes = tuple(part.tokens.shape[0] for part in parts.values())
    device = next(iter(parts.values())).tokens.device
    lengths = [torch.as_tensor(part.item_lengths, device=device) for part in parts.values()]
    counts = [x.shape[0] for x in lengths]
    if order is not None:
        _check_order(counts, order, device)
    elif any(n != counts[0] for n in counts):  # a set would fix the numbers under torch.compile
        got = ", ".join(f"{name} {n}" for name, n in zip(names, counts))
        raise ValueError(
            f"pack: without order= every part must have one item per sample (length 0: missing), got {got}"
        )
    rows = _rows_cpu(lengths, sizes, order)
    make = Layout if rows is None else Layout.unchecked
    if rows is None:
        lengths = [x.to(torch.int64) for x in lengths]
        if checks_values(device):
            _check_values(names, sizes, lengths, order)
        rows = _rows_torch(lengths, sum(sizes), order)
    cu_seqlens, source, place, modality, item = rows
    position = _positions(parts, source, modality, place)
    layout = make(cu_seqlens, modality=modality, position=position, item=item, source=source, names=names, sizes=sizes)
    return layout, place


def _rows_cpu(lengths: Sequence[Tensor], sizes: Sequence[int], order: Order | None) -> tuple[Tensor, ...] | None:
    """cu_seqlens, and per row source, place, modality and item in one compiled pass.

    None where it cannot run or values do not fit together.
    """
    tensors = (*lengths, *(order or ()))
    if _native.cpu_refusal is not None or torch.compiler.is_compiling():
        return None
    if not all(type(t) is Tensor and t.is_cpu for t in tensors):
        return None
    batch = lengths[0].shape[0] if order is None else order.samples.shape[0]
    total = sum(sizes)
    rows = [torch.empty(total, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.int32)]
    rows = (torch.empty(batch + 1, dtype=torch.int32), *rows)
    lengths = [(x if x.dtype == torch.int32 else x.to(torch.int64)).contiguous() for x in lengths]
    orders = (None, None, None) if order is None else tuple(t.contiguous() for t in order)
    return rows if _native.cpu().pack_layout(lengths, sizes, *orders, *rows) else None


def _rows_torch(lengths: Sequence[Tensor], total: int, order: Order | None) -> tuple[Tensor, ...]:
    """The same as `_rows_cpu` in torch, on any device, without waiting for it."""
    counts, device = [x.shape[0] for x in lengths], lengths[0].device
    if order is None:
        # Slot b * P + p of the packed batch is item b of part p.
        batch, parts = counts[0], len(counts)
        slot = torch.arange(batch * parts, device=device).view(parts, batch).t().flatten()
        part = torch.arange(parts, dtype=torch.uint8, device=device).repeat(batch)
        ends = torch.arange(batch + 1, device=device) * parts
    else:
        part = order.part
        first = _constants([0, *counts[:-1]], device).cumsum(0)
        slot = first[part.long()] + order.item
        ends = pad(order.samples.long().cumsum(0), (1, 0))
    item_lengths = torch.cat(lengths)
    item_first = item_lengths.cumsum(0) - item_lengths  # row of the concatenated parts
    slot_lengths = item_lengths[slot]
    slot_ends = pad(slot_lengths.cumsum(0), (1, 0))
    # Per slot what a row needs to know, spread over its rows.
    row_slot = torch.repeat_interleave(slot_lengths, output_size=total)
    rows = torch.arange(total, device=device)
    source = rows + (item_first[slot] - slot_ends[:-1])[row_slot]
    place = rows - slot_ends[row_slot]
    cu_seqlens = slot_ends[ends].to(torch.int32)
    return cu_seqlens, source, place.to(torch.int32), part[row_slot], row_slot.to(torch.int32)


def _positions(parts: Mapping[str, Part], source: Tensor, modality: Tensor, place: Tensor) -> Tensor | None:
    given = [part.positions is not None for part in parts.values()]
    if not any(given):
        return None
    axes = max(part.positions.shape[1] for part in parts.values() if part.positions is not None)
    concatenated = []
    for part in parts.values():
        if part.positions is None:
            concatenated.append(torch.zeros(part.tokens.shape[0], axes, dtype=torch.int32, device=source.device))
        else:
            concatenated.append(pad(part.positions.to(torch.int32), (0, axes - part.positions.shape[1])))
    position = torch.cat(concatenated)[source]
    if all(given):
        return position
    own = pad(place[:, None], (0, axes - 1))
    return torch.where(_constants(given, source.device)[modality.long()][:, None], position, own)


def _check_order(counts: Sequence[int], order: Order, device: torch.device) -> None:
    slots = order.part.shape[0] if order.part.dim() == 1 else -1
    for field, dtype in (("samples", torch.int32), ("part", torch.uint8), ("item", torch.int32)):
        value = getattr(order, field)
        if value.dtype != dtype or value.dim() != 1 or value.device != device:
            raise ValueError(
                f"pack: order.{field} must be {dtype} with one dimension on {device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
    if order.item.shape[0] != slots or slots != sum(counts):
        raise ValueError(
            f"pack: order names {slots} parts and {order.item.shape[0]} items; expected the {sum(counts)} items "
            "of the parts, each once"
        )


def _check_values(names: Sequence[str], sizes: Sequence[int], lengths: Sequence[Tensor], order: Order | None) -> None:
    for name, size, mine in zip(names, sizes, lengths):
        if mine.numel() and int(mine.min()) < 0:
            raise ValueError(f"pack: item_lengths of {name!r} holds {int(mine.min())}; expected 0 or more")
        if int(mine.sum()) != size:
            raise ValueError(
                f"pack: item_lengths of {name!r} add up to {int(mine.sum())}, but its tokens have {size} rows"
            )
    if order is not None:
        _check_items(names, [x.shape[0] for x in lengths], order)


def _check_items(names: Sequence[str], counts: Sequence[int], order: Order) -> None:
    slots, device = order.part.shape[0], order.part.device
    if (order.samples.numel() and int(order.samples.min()) < 0) or int(order.samples.sum()) != slots:
        raise ValueError(f"pack: order.samples add up to {int(order.samples.sum())}; expected {slots}")
    if not slots:
        return
    if int(order.part.max()) >= len(names):
        raise ValueError(f"pack: order.part holds {int(order.part.max())}; expected less than {len(names)}")
    of_part = torch.tensor(counts, device=device)[order.part.long()]
    wrong = (order.item < 0) | (order.item >= of_part)
    if bool(wrong.any()):
        s = int(wrong.nonzero()[0])
        name, item = names[int(order.part[s])], int(order.item[s])
        raise ValueError(f"pack: order names item {item} of {name!r}, which has {int(of_part[s])} items")
    first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)
    used = torch.bincount(first[order.part.long()] + order.item, minlength=slots)
    if bool((used != 1).any()):
        i = int((used != 1).nonzero()[0])
        p = int((first <= i).nonzero()[-1])
        raise ValueError(
            f"pack: order uses item {i - int(first[p])} of {names[p]!r} {int(used[i])} times; expected once"
        )
