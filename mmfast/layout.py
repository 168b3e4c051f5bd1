"""The packed layout: which rows belong to which sample, and what each row is.

A batch is tokens `[T, ...]` plus a `Layout`: sample b owns rows `cu_seqlens[b]:cu_seqlens[b + 1]`; each row has a
modality and a time. `mmfast.mask` turns modality and time into what attends to what.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree

MAX_MODALITIES = 16

_TENSOR_FIELDS = ("cu_seqlens", "seqused", "modality", "time", "position", "start", "item", "source")
_STATIC_FIELDS = ("names", "sizes", "max_seqlen")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Rows of a packed batch. Frozen, a pytree, safe to share between layers.

    Args:
        cu_seqlens: int32 `[B + 1]`, cumulative lengths; a sample may be empty. Rows from `cu_seqlens[B]` on are
            outside the layout: never read, and zero in every output.
        seqused: int32 `[B]`, optional: only the first `seqused[b]` rows of sample b exist.
        modality: uint8 `[T]`, at most 16 modalities; None: all rows have modality 0.
        time: int32 `[T]`, the order that mask rules compare; None: the row's position in its sample.
        position: int32 `[T, A]`, A <= 3 axes for rotary and position embeddings; None: the position in the sample.
        start: int32 `[B]`, position of a sample's first row (`len_k - len_q` for cached queries); None: 0.
        item: int32 `[T]`, number of the item (an image, a text, a clip) that the row belongs to, increasing along
            the rows; None: a new item begins where the modality changes.
        source: int64 `[T]`, row of the concatenated parts that the row came from; set by `mmfast.pack`.
        names: names of the modalities, by id.
        sizes: rows of each part; set by `mmfast.pack`.
        max_seqlen: a hint, never needed for correctness.
    """

    cu_seqlens: Tensor
    seqused: Tensor | None = None
    modality: Tensor | None = None
    time: Tensor | None = None
    position: Tensor | None = None
    start: Tensor | None = None
    item: Tensor | None = None
    source: Tensor | None = None
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = None
    max_seqlen: int | None = None

    def __post_init__(self):
        # Tracing and pytree transformations pass placeholders, which have nothing to check.
        if not isinstance(self.cu_seqlens, Tensor) or torch.compiler.is_compiling():
            return
        object.__setattr__(self, "names", tuple(self.names))
        self._check()

    def _check(self) -> None:
        batch = self.cu_seqlens.shape[0] - 1 if self.cu_seqlens.dim() == 1 else -1
        if self.cu_seqlens.dtype != torch.int32 or batch < 0:
            raise ValueError(f"Layout: cu_seqlens must be int32 [B + 1], got {_describe(self.cu_seqlens)}")
        if len(self.names) > MAX_MODALITIES or len(set(self.names)) != len(self.names):
            raise ValueError(f"Layout: names must be at most {MAX_MODALITIES} different names, got {self.names}")
        rows = None
        for field, dtype, dims in (
            ("seqused", torch.int32, 1),
            ("start", torch.int32, 1),
            ("modality", torch.uint8, 1),
            ("time", torch.int32, 1),
            ("position", torch.int32, 2),
            ("item", torch.int32, 1),
            ("source", torch.int64, 1),
        ):
            value = getattr(self, field)
            if value is None:
                continue
            expected = f"{str(dtype).removeprefix('torch.')} {'[T, A]' if dims == 2 else '[T]'}"
            if field in ("seqused", "start"):
                expected = f"int32 [{batch}]"
                fits = value.shape == (batch,)
            else:
                rows = value.shape[0] if rows is None and value.dim() else rows
                fits = value.dim() == dims and value.shape[0] == rows
            if value.dtype != dtype or not fits:
                size = f" with T = {rows}" if "T" in expected and rows is not None else ""
                raise ValueError(f"Layout: {field} must be {expected}{size}, got {_describe(value)}")
            if value.device != self.cu_seqlens.device:
                raise ValueError(
                    f"Layout: {field} is on {value.device}, cu_seqlens on {self.cu_seqlens.device}; "
                    "build the layout on one device, or move it with .to()"
                )
        if self.position is not None and not 1 <= self.position.shape[1] <= 3:
            raise ValueError(f"Layout: position must have 1 to 3 axes, got {self.position.shape[1]}")
        if self.cu_seqlens.device.type == "cpu":
            self._check_values(rows)

    def _check_values(self, rows: int | None) -> None:
        """Values, where looking at them costs no synchronisation."""
        lengths = self.cu_seqlens.diff()
        if self.cu_seqlens[0] < 0 or bool((lengths < 0).any()):
            raise ValueError(
                "Layout: cu_seqlens must begin at 0 or later and never decrease, got "
                f"{self.cu_seqlens.tolist()[:12]}; it is the cumulative sum of the lengths"
            )
        if rows is not None and int(self.cu_seqlens[-1]) > rows:
            raise ValueError(f"Layout: cu_seqlens ends at row {int(self.cu_seqlens[-1])}, but T is {rows}")
        if self.seqused is not None and bool(((self.seqused < 0) | (self.seqused > lengths)).any()):
            raise ValueError("Layout: seqused must be between 0 and each sample's length")
        if self.modality is not None and self.modality.numel():
            highest = int(self.modality.max())
            limit = len(self.names) or MAX_MODALITIES
            if highest >= limit:
                raise ValueError(f"Layout: modality holds the id {highest}; expected less than {limit}")

    # Constructors

    @classmethod
    def unchecked(cls, cu_seqlens: Tensor, **fields) -> Layout:
        """The layout of fields that are known to fit, whose checks would take longer than building them."""
        layout = object.__new__(cls)
        layout.__dict__.update(cu_seqlens=cu_seqlens, **fields)  # those not given are found in the class
        return layout

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, *, name: str | None = None, device: torch.device | str | None = None
    ) -> Layout:
        """One layout of a single modality from the samples' lengths.

        Args:
            lengths: B lengths in rows, as numbers or an integer tensor; 0 is an empty sample.
            name: name of the modality.
            device: where the layout lies; default the lengths' device.
        """
        max_seqlen = None
        if not isinstance(lengths, Tensor):
            max_seqlen = max(lengths, default=0)
            lengths = torch.tensor(lengths, dtype=torch.int64)
        if lengths.dim() != 1 or lengths.is_floating_point():
            raise ValueError(f"Layout.from_lengths: lengths must be B integers, got {_describe(lengths)}")
        cu_seqlens = torch.nn.functional.pad(lengths.to(device).cumsum(0), (1, 0)).to(torch.int32)
        return cls(cu_seqlens, names=(name,) if name else (), max_seqlen=max_seqlen)

    @classmethod
    def padded(cls, batch: int, length: int, seqused: Tensor | None = None, **fields) -> Layout:
        """A padded tensor `[B, L, ...]`, flattened to `[B * L, ...]`, used without a copy.

        Args:
            batch, length: B and L.
            seqused: int32 `[B]`, real length of each sample.
            fields: further fields of the layout.
        """
        device = seqused.device if seqused is not None else None
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        return cls(cu_seqlens, seqused=seqused, max_seqlen=length, **fields)

    @classmethod
    def from_padding_mask(cls, mask: Tensor, total: int | None = None) -> tuple[Layout, Tensor]:
        """The layout of the rows that a padding mask keeps, and the index that packs them.

        Args:
            mask: bool `[B, L]`, True where a token is real.
            total: number of True entries; where it is not given, it is counted, which waits for the device once.

        Returns:
            layout, and rows int64 `[total]`: `x.flatten(0, 1)[rows]` packs a padded `x [B, L, ...]`.
        """
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"Layout.from_padding_mask: mask must be bool [B, L], got {_describe(mask)}")
        flat = mask.flatten()
        if total is None:
            total = int(flat.sum())
        rows = torch.nonzero_static(flat, size=total)[:, 0]
        layout = cls.from_lengths(mask.sum(1))
        return dataclasses.replace(layout, max_seqlen=mask.shape[1]), rows

    @classmethod
    def concat(cls, layouts: Sequence[Layout]) -> Layout:
        """Batches behind each other: the samples of all layouts, in order. The tokens are concatenated likewise.

        Fields that some layouts have and others lack take their default values. Rows outside a layout
        may stand only before the first and after the last one. `start`, `seqused` and `time` are kept.
        The default `position` is the position in the sample, on every axis.
        """
        if not layouts:
            raise ValueError("Layout.concat: expected at least one layout, got none")
        names = max((x.names for x in layouts), key=len)
        for x in layouts:
            if x.names != names[: len(x.names)]:
                raise ValueError(f"Layout.concat: the layouts name their modalities differently: {names} and {x.names}")
        axes = {x.position.shape[1] for x in layouts if x.position is not None}
        if len(axes) > 1:
            raise ValueError(f"Layout.concat: the layouts have {sorted(axes)} position axes; expected the same number")
        if layouts[0].device.type == "cpu" and not torch.compiler.is_compiling():
            for i, x in enumerate(layouts):
                first, last = int(x.cu_seqlens[0]), int(x.cu_seqlens[-1])
                if (i and first) or (i + 1 < len(layouts) and last != x.total):
                    raise ValueError(
                        f"Layout.concat: layout {i} holds rows {first} to {last} of {x.total}; rows outside a layout "
                        "may stand only before the first and after the last one"
                    )
        ends = torch.stack([x.cu_seqlens[-1] for x in layouts]).cumsum(0)
        cu_seqlens = [layouts[0].cu_seqlens] + [x.cu_seqlens[1:] + end for x, end in zip(layouts[1:], ends)]
        fields = {}
        defaults = {
            "seqused": lambda x: x.cu_seqlens.diff(),
            "start": lambda x: torch.zeros_like(x.cu_seqlens[1:]),
            "modality": lambda x: torch.zeros(x.total, dtype=torch.uint8, device=x.device),
            "time": lambda x: x.times(),
            "position": lambda x: x.positions()[:, None].expand(-1, *axes),
        }
        for field, default in defaults.items():
            if any(getattr(x, field) is not None for x in layouts):
                values = [getattr(x, field) if getattr(x, field) is not None else default(x) for x in layouts]
                fields[field] = torch.cat(values)
        if any(x.item is not None for x in layouts):
            items, offset = [], 0
            for x in layouts:
                item = x.items() + offset
                offset = item[-1] + 1 if item.numel() else offset
                items.append(item)
            fields["item"] = torch.cat(items).to(torch.int32)
        return cls(torch.cat(cu_seqlens).to(torch.int32), names=names, **fields)

    # What a layout says of its rows

    @property
    def batch(self) -> int:
        """Number of samples B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def total(self) -> int:
        """Rows T. Where no per-row field tells it, it is read from `cu_seqlens`, which waits for the device."""
        for field in (self.modality, self.time, self.position, self.item, self.source):
            if field is not None:
                return field.shape[0]
        if self.sizes is not None:
            return sum(self.sizes)
        return int(self.cu_seqlens[-1])

    def lengths(self) -> Tensor:
        """int32 `[B]`: rows of each sample that exist."""
        return self.seqused if self.seqused is not None else self.cu_seqlens.diff()

    def samples(self, total: int | None = None) -> Tensor:
        """int64 `[T]`: the sample of each row; B for rows outside the layout."""
        rows = torch.arange(self.total if total is None else total, dtype=torch.int32, device=self.device)
        sample = torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows, right=True)
        before_first = rows < self.cu_seqlens[0]
        sample = torch.where(before_first, self.batch, sample)
        if self.seqused is None or self.batch == 0:
            return sample
        inside = sample.clamp(max=self.batch - 1)
        return torch.where(rows - self.cu_seqlens[inside] < self.seqused[inside], sample, self.batch)

    def positions(self, total: int | None = None) -> Tensor:
        """int32 `[T]`: `start[b] + row` within the sample; 0 for rows outside the layout."""
        sample = self.samples(total)
        if self.batch == 0:
            return torch.zeros_like(sample, dtype=torch.int32)
        inside = sample.clamp(max=self.batch - 1)
        rows = torch.arange(sample.shape[0], dtype=torch.int32, device=self.device)
        position = rows - self.cu_seqlens[inside]
        if self.start is not None:
            position = position + self.start[inside]
        return torch.where(sample < self.batch, position, 0).to(torch.int32)

    def times(self, total: int | None = None) -> Tensor:
        """int32 `[T]`: `time`, or its default, the position."""
        return self.time if self.time is not None else self.positions(total)

    def modalities(self, total: int | None = None) -> Tensor:
        """uint8 `[T]`: `modality`, or its default, 0."""
        if self.modality is not None:
            return self.modality
        return torch.zeros(self.total if total is None else total, dtype=torch.uint8, device=self.device)

    def items(self) -> Tensor:
        """int64 `[T]`: number of each row's item; where `item` is not given, runs of one modality in one sample."""
        if self.item is not None:
            return self.item.long()
        key = self.samples() * MAX_MODALITIES + self.modalities().long()
        return torch.nn.functional.pad((key.diff() != 0).long(), (1, 0)).cumsum(0)[: key.shape[0]]

    def modality_id(self, name: str | int) -> int:
        """The id of a modality by its name."""
        if isinstance(name, int):
            if not 0 <= name < MAX_MODALITIES:
                raise ValueError(f"Layout: modality {name} is out of range; expected 0 to {MAX_MODALITIES - 1}")
            return name
        if name not in self.names:
            known = ", ".join(self.names) or "it has no names: use numbers, or pass names="
            raise ValueError(f"Layout: {name!r} is no modality of this layout ({known})")
        return self.names.index(name)

    # New layouts from this one

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        """The layout on another device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Layout:
        """The layout in page-locked memory."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function) -> Layout:
        tensors = {f: getattr(self, f) for f in _TENSOR_FIELDS}
        return dataclasses.replace(self, **{f: function(t) for f, t in tensors.items() if t is not None})

    def select(self, name: str | int, size: int | None = None) -> tuple[Layout, Tensor]:
        """The rows of one modality, as a layout with the same samples (cross-attention from or onto one modality).

        Args:
            name: modality.
            size: number of its rows; where it is not given, it is counted, which waits for the device once.

        Returns:
            layout, and rows int64 `[size]`: `x[rows]` are its tokens. Time and position stay those of the whole.
        """
        sample = self.samples()
        chosen = (self.modalities() == self.modality_id(name)) & (sample < self.batch)
        if size is None:
            size = int(chosen.sum())
        rows = torch.nonzero_static(chosen, size=size)[:, 0]
        counts = torch.zeros(self.batch + 1, dtype=torch.int64, device=self.device)
        counts.index_add_(0, sample, chosen.long())
        cu_seqlens = torch.nn.functional.pad(counts[: self.batch].cumsum(0), (1, 0)).to(torch.int32)
        layout = Layout(
            cu_seqlens,
            modality=self.modalities()[rows],
            time=self.times()[rows],
            position=(self.position if self.position is not None else self.positions()[:, None])[rows],
            item=self.items()[rows].to(torch.int32),
            names=self.names,
        )
        return layout, rows

    def with_time(self, kind: str, *, modalities: Sequence[str | int] = (), lengths: Tensor | None = None) -> Layout:
        """The same layout with another time; everything else is shared.

        Args:
            kind: what a row's time is:
                "index": its position in the sample (text decoder).
                "prefix": 0 on the prefix, else the position (prefix LM). The prefix is the first `lengths[b]`
                    rows of sample b, or all rows of `modalities`.
                "segment_start": rows of `modalities` carry the position of their item's first row, the others their
                    own (images bidirectional inside a causal stream).
                "media_count": how many items of `modalities` began so far, the own one included: images are
                    numbered from 1, a text's time is the number of images before it (Flamingo).
            modalities: names or ids that the kind speaks of.
            lengths: int32 `[B]`, prefix lengths.
        """
        if kind == "index":
            return dataclasses.replace(self, time=None)
        position = self.positions()
        if kind == "prefix" and lengths is not None:
            if lengths.shape != (self.batch,):
                raise ValueError(f"Layout.with_time: lengths must be [{self.batch}], got {_describe(lengths)}")
            if self.batch == 0:
                return dataclasses.replace(self, time=position)
            sample = self.samples().clamp(max=self.batch - 1)
            start = self.start[sample] if self.start is not None else 0
            time = torch.where(position - start < lengths.to(self.device)[sample], 0, position)
            return dataclasses.replace(self, time=time.to(torch.int32))
        if not modalities:
            raise ValueError(f"Layout.with_time: kind {kind!r} needs modalities=(...), the names it speaks of")
        modality = self.modalities()
        member = torch.zeros_like(modality, dtype=torch.bool)
        for name in modalities:  # numbers of the host in a kernel, where an index of them would wait for the device
            member = member | (modality == self.modality_id(name))
        if kind == "prefix":
            time = torch.where(member, 0, position)
        elif kind == "segment_start":
            time = torch.where(member, position - self._rows_into_item(), position)
        elif kind == "media_count":
            time = self._items_begun(member)
        else:
            raise ValueError(
                f"Layout.with_time: kind is {kind!r}; expected 'index', 'prefix', 'segment_start' or 'media_count'"
            )
        return dataclasses.replace(self, time=time.to(torch.int32))

    def _first_of_item(self) -> Tensor:
        """bool `[T]`: the row begins an item; an item never spans two samples."""
        key = torch.stack([self.items(), self.samples()])
        return torch.nn.functional.pad((key.diff(dim=1) != 0).any(0), (1, 0), value=True)[: key.shape[1]]

    def _rows_into_item(self) -> Tensor:
        rows = torch.arange(self.total, device=self.device)
        first = torch.where(self._first_of_item(), rows, 0).cummax(0).values
        return rows - first

    def _items_begun(self, member: Tensor) -> Tensor:
        """int64 `[T]`: items with `member` rows that began in the sample up to and with this row."""
        begun = (self._first_of_item() & member).long().cumsum(0)
        before = torch.nn.functional.pad(begun, (1, 0))
        sample = self.samples().clamp(max=max(self.batch - 1, 0))
        return begun - before[self.cu_seqlens[sample].long()]

    def __repr__(self) -> str:
        if not isinstance(self.cu_seqlens, Tensor) or self.cu_seqlens.is_meta or self.device.type != "cpu":
            return f"Layout(B={getattr(self.cu_seqlens, 'shape', ['?'])[0]} - 1, on {self.device}, names={self.names})"
        lengths = self.lengths()
        text = f"Layout({self.batch} samples, {int(lengths.sum())} of {self.total} rows"
        if self.batch:
            text += f", lengths {int(lengths.min())} to {int(lengths.max())}"
        if self.modality is not None:
            inside = self.modality[self.samples() < self.batch].long()
            counts = torch.bincount(inside, minlength=max(len(self.names), 1)).tolist()
            named = [f"{self.names[i] if i < len(self.names) else i} {n}" for i, n in enumerate(counts) if n]
            text += "; " + ", ".join(named)
        elif self.names:
            text += f"; {self.names[0]}"
        given = [f for f in ("seqused", "time", "position", "start") if getattr(self, f) is not None]
        return text + (f"; with {', '.join(given)}" if given else "") + ")"


def _describe(value) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _flatten(layout: Layout):
    return [getattr(layout, f) for f in _TENSOR_FIELDS], tuple(getattr(layout, f) for f in _STATIC_FIELDS)


def _flatten_with_keys(layout: Layout):
    children, context = _flatten(layout)
    return [(_pytree.GetAttrKey(f), c) for f, c in zip(_TENSOR_FIELDS, children)], context


def _unflatten(children, context) -> Layout:
    return Layout(**dict(zip(_TENSOR_FIELDS, children)), **dict(zip(_STATIC_FIELDS, context)))


_pytree.register_pytree_node(
    Layout,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="mmfast.Layout",
)
