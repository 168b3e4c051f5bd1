"""Layout against slow loops over samples in plain Python."""

import dataclasses
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree

from mmfast import Layout
from mmfast.layout import MAX_MODALITIES

many = settings(max_examples=60, deadline=None)
lengths_st = st.lists(st.integers(0, 6), max_size=6)


def i32(values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def layouts(draw, dense=False):
    """A random layout with any subset of its fields, rows before the first and after the last sample, and gaps."""
    lengths = draw(lengths_st)
    before = 0 if dense else draw(st.integers(0, 2))
    after = 0 if dense else draw(st.integers(0, 3))
    cu, total = [before], before + sum(lengths) + after
    for n in lengths:
        cu.append(cu[-1] + n)
    rows = lambda low, high: draw(st.lists(st.integers(low, high), min_size=total, max_size=total))  # noqa: E731
    fields = {"modality": torch.tensor(rows(0, 2), dtype=torch.uint8), "names": ("image", "text", "sensor")}
    if not dense and draw(st.booleans()):
        fields["seqused"] = i32([draw(st.integers(0, n)) for n in lengths])
    if draw(st.booleans()):
        fields["start"] = i32([draw(st.integers(-3, 9)) for _ in lengths])
    if draw(st.booleans()):
        # New items begin at random rows; adjacent items of one modality are separate.
        fields["item"] = i32(rows(0, 1)).cumsum(0).to(torch.int32)
    if draw(st.booleans()):
        fields["position"] = i32(rows(0, 50)).view(-1, 1).repeat(1, draw(st.integers(1, 3)))
    return Layout(i32(cu), **fields)


def loops(layout):
    """sample and position of each row, by loops."""
    total = layout.modality.shape[0]
    sample, position = [layout.batch] * total, [0] * total
    for b in range(layout.batch):
        begin, end = int(layout.cu_seqlens[b]), int(layout.cu_seqlens[b + 1])
        used = end - begin if layout.seqused is None else int(layout.seqused[b])
        for i in range(used):
            sample[begin + i] = b
            position[begin + i] = i + (0 if layout.start is None else int(layout.start[b]))
    return sample, position


def first_rows_of_items(layout):
    """Whether each row begins an item, by loops; only rows of samples count."""
    sample, _ = loops(layout)
    modality = layout.modality.tolist()
    item = layout.item.tolist() if layout.item is not None else modality
    first = []
    for t in range(len(sample)):
        new = t == 0 or sample[t] != sample[t - 1] or item[t] != item[t - 1]
        first.append(new)
    return first


# Constructors


@many
@given(lengths_st)
def test_from_lengths(lengths):
    expected = [0]
    for n in lengths:
        expected.append(expected[-1] + n)
    layout = Layout.from_lengths(lengths, name="text")
    assert layout.cu_seqlens.tolist() == expected and layout.cu_seqlens.dtype == torch.int32
    assert layout.max_seqlen == max(lengths, default=0) and layout.names == ("text",)
    assert layout.batch == len(lengths) and layout.total == sum(lengths) and layout.lengths().tolist() == lengths
    tensor = Layout.from_lengths(torch.tensor(lengths, dtype=torch.int64))
    assert tensor.cu_seqlens.tolist() == expected and tensor.max_seqlen is None and tensor.names == ()


@many
@given(st.integers(0, 4), st.integers(0, 5), st.data())
def test_padded(batch, length, data):
    used = data.draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    layout = Layout.padded(batch, length, None if used is None else i32(used), names=("text",))
    assert layout.cu_seqlens.tolist() == [b * length for b in range(batch + 1)]
    assert layout.max_seqlen == length and layout.names == ("text",)
    expected = []
    for b in range(batch):
        expected += [b if used is None or i < used[b] else batch for i in range(length)]
    assert layout.samples().tolist() == expected
    assert layout.lengths().tolist() == ([length] * batch if used is None else used)


@many
@given(st.integers(0, 4), st.integers(0, 5), st.data())
def test_from_padding_mask(batch, length, data):
    rows = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(rows, dtype=torch.bool).view(batch, length)
    for total in (None, sum(rows)):
        layout, index = Layout.from_padding_mask(mask, total)
        assert index.tolist() == [i for i, keep in enumerate(rows) if keep]
        assert layout.lengths().tolist() == [sum(rows[b * length : (b + 1) * length]) for b in range(batch)]
        assert layout.max_seqlen == length


@many
@given(st.lists(layouts(dense=True), min_size=1, max_size=3), layouts())
def test_concat(parts, last):
    if int(last.cu_seqlens[0]) == 0:
        parts = [*parts, last]
    sample, position, time, modality, axes, items, offset = [], [], [], [], [], [], 0
    batch = sum(x.batch for x in parts)
    widths = {x.position.shape[1] for x in parts if x.position is not None}
    if len(widths) > 1:
        with pytest.raises(ValueError, match="position axes"):
            Layout.concat(parts)
        return
    whole = Layout.concat(parts)
    width = max(widths, default=1)
    for x in parts:
        own_sample, own_position = loops(x)
        sample += [b + offset if b < x.batch else batch for b in own_sample]
        offset += x.batch
        position += own_position
        time += own_position
        modality += x.modality.tolist()
        axes += x.position.tolist() if x.position is not None else [[p] * width for p in own_position]
        items.append(x)
    assert whole.samples().tolist() == sample
    assert whole.positions().tolist() == position and whole.times().tolist() == time
    assert whole.modalities().tolist() == modality and whole.names == ("image", "text", "sensor")
    if whole.position is not None:
        assert whole.position.tolist() == axes
    expected = [flag for x in parts for flag in first_rows_of_items(x)]
    if all(x.item is not None for x in parts):
        # Items never join across layouts.
        begin = 0
        for x in parts[:-1]:
            begin += x.modality.shape[0]
            if 0 < begin < len(expected):
                assert whole.item[begin] != whole.item[begin - 1]
    inside = [b < batch for b in sample]
    got = whole._first_of_item().tolist()
    assert [g for g, i in zip(got, inside) if i] == [e for e, i in zip(expected, inside) if i]


def test_concat_defaults_and_errors():
    a, b = Layout.from_lengths([2, 1], name="text"), Layout.from_lengths([3], name="text")
    whole = Layout.concat([a, b])
    assert whole.cu_seqlens.tolist() == [0, 2, 3, 6] and whole.modality is None and whole.names == ("text",)
    timed = dataclasses.replace(b, time=i32([5, 5, 6]), modality=torch.zeros(3, dtype=torch.uint8))
    whole = Layout.concat([a, timed])
    assert whole.time.tolist() == [0, 1, 0, 5, 5, 6] and whole.modality.tolist() == [0] * 6
    outside = Layout(i32([0, 1]), modality=torch.zeros(3, dtype=torch.uint8))
    assert Layout.concat([a, outside]).cu_seqlens.tolist() == [0, 2, 3, 4]
    for layouts in ([outside, a], [a, Layout(i32([1, 2]))]):
        with pytest.raises(ValueError, match="may stand only before the first and after the last"):
            Layout.concat(layouts)
    with pytest.raises(ValueError, match="at least one"):
        Layout.concat([])
    with pytest.raises(ValueError, match="name their modalities differently"):
        Layout.concat([a, Layout.from_lengths([3], name="image")])


# Rows


@many
@given(layouts())
def test_rows(layout):
    sample, position = loops(layout)
    assert layout.samples().tolist() == sample
    assert layout.positions().tolist() == position and layout.positions().dtype == torch.int32
    assert layout.times().tolist() == position
    assert layout.modalities().tolist() == layout.modality.tolist()
    assert layout.total == len(sample)
    bare = dataclasses.replace(layout, modality=None, item=None, position=None)
    assert bare.samples(len(sample)).tolist() == sample
    assert bare.positions(len(sample)).tolist() == position
    assert bare.modalities(len(sample)).tolist() == [0] * len(sample)
    assert bare.total == int(layout.cu_seqlens[-1])


@many
@given(layouts(), st.sampled_from(["image", "text", "sensor", 0, 2]))
def test_select(layout, name):
    layout = layout.with_time("media_count", modalities=("image",))
    sample, position = loops(layout)
    wanted = layout.names.index(name) if isinstance(name, str) else name
    rows = [t for t, m in enumerate(layout.modality.tolist()) if m == wanted and sample[t] < layout.batch]
    for size in (None, len(rows)):
        chosen, index = layout.select(name, size)
        assert index.tolist() == rows
        assert chosen.batch == layout.batch and chosen.names == layout.names
        assert chosen.lengths().tolist() == [sum(sample[t] == b for t in rows) for b in range(layout.batch)]
        assert chosen.modality.tolist() == [wanted] * len(rows)
        assert chosen.time.tolist() == [int(layout.time[t]) for t in rows]
        own = layout.position.tolist() if layout.position is not None else [[p] for p in position]
        assert chosen.position.tolist() == [own[t] for t in rows]
        items = layout.items().tolist()
        assert chosen.item.tolist() == [items[t] for t in rows]


@many
@given(layouts(), st.data())
def test_with_time(layout, data):
    sample, position = loops(layout)
    modality, first = layout.modality.tolist(), first_rows_of_items(layout)
    inside = [b < layout.batch for b in sample]
    names = data.draw(st.lists(st.sampled_from(layout.names), min_size=1, unique=True))
    member = [layout.names[m] in names for m in modality]

    def check(kind, expected, **kwargs):
        timed = layout.with_time(kind, **kwargs)
        if expected is None:
            assert timed.time is None and timed.times().tolist() == position
        else:
            assert timed.time.dtype == torch.int32
            got = timed.time.tolist()
            assert [g for g, i in zip(got, inside) if i] == [e for e, i in zip(expected, inside) if i], kind
        assert timed.cu_seqlens is layout.cu_seqlens and timed.modality is layout.modality

    check("index", None)
    check("prefix", [0 if m else p for m, p in zip(member, position)], modalities=names)
    prefix = [data.draw(st.integers(0, 7)) for _ in range(layout.batch)]
    expected = []
    for t, b in enumerate(sample):
        row = t - int(layout.cu_seqlens[b]) if inside[t] else 0
        expected.append(0 if inside[t] and row < prefix[b] else position[t])
    check("prefix", expected, lengths=i32(prefix))
    segment, media, count, start = [], [], 0, 0
    for t in range(len(sample)):
        if t == 0 or sample[t] != sample[t - 1]:
            count = 0
        if first[t]:
            start = position[t]
            count += member[t]
        segment.append(start if member[t] else position[t])
        media.append(count)
    check("segment_start", segment, modalities=names)
    check("media_count", media, modalities=names)


def test_adjacent_images_are_separate_items():
    layout = Layout(
        i32([0, 6]), modality=torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.uint8), item=i32([3, 3, 4, 4, 5, 5]),
        names=("image", "text"),
    )  # fmt: skip
    assert layout.with_time("media_count", modalities=("image",)).time.tolist() == [1, 1, 2, 2, 2, 2]
    assert layout.with_time("segment_start", modalities=("image",)).time.tolist() == [0, 0, 2, 2, 4, 5]
    merged = dataclasses.replace(layout, item=None)
    assert merged.with_time("media_count", modalities=("image",)).time.tolist() == [1] * 6


# As an object


@many
@given(layouts())
def test_pytree_and_to(layout):
    leaves, spec = _pytree.tree_flatten(layout)
    for again in (
        _pytree.tree_unflatten(leaves, spec),
        layout.to("cpu"),
        layout.to("cpu", non_blocking=True),
        _pytree.tree_map_only(torch.Tensor, torch.clone, layout),
    ):
        assert isinstance(again, Layout)
        for field in dataclasses.fields(Layout):
            a, b = getattr(layout, field.name), getattr(again, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    # Placeholders pass through; so does another device.
    assert _pytree.tree_unflatten([object()] * len(leaves), spec).names == layout.names
    assert layout.to("meta").device.type == "meta" and "Layout(" in repr(layout.to("meta"))


def test_frozen_and_pickled():
    layout = Layout.from_lengths([1, 2], name="text")
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.start = i32([0, 0])
    buffer = io.BytesIO()
    torch.save(layout, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert again.cu_seqlens.tolist() == [0, 1, 3] and again.names == ("text",)


def test_names_may_be_a_list():
    assert Layout(i32([0, 1]), names=["a", "b"]).names == ("a", "b")


def test_repr():
    layout = Layout(
        i32([0, 2, 5]), modality=torch.tensor([0, 1, 1, 1, 0, 0], dtype=torch.uint8), start=i32([0, 1]),
        names=("image", "text"),
    )  # fmt: skip
    assert repr(layout) == "Layout(2 samples, 5 of 6 rows, lengths 2 to 3; image 2, text 3; with start)"
    assert repr(Layout.from_lengths([3], name="text")) == "Layout(1 samples, 3 of 3 rows, lengths 3 to 3; text)"
    assert repr(Layout.from_lengths([])) == "Layout(0 samples, 0 of 0 rows)"


def bad(**fields):
    return lambda: Layout(i32([0, 2, 4]), **fields)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Layout(torch.tensor([0, 2])), r"cu_seqlens must be int32 \[B \+ 1\], got int64 \[2\]"),
        (lambda: Layout(i32([])), r"cu_seqlens must be int32 \[B \+ 1\]"),
        (lambda: Layout(i32([[0]])), r"cu_seqlens must be int32 \[B \+ 1\]"),
        (lambda: Layout(i32([0, 3, 2])), "never decrease"),
        (lambda: Layout(i32([-1, 3])), "never decrease"),
        (bad(seqused=i32([1])), r"seqused must be int32 \[2\], got int32 \[1\]"),
        (bad(seqused=i32([1, 3])), "seqused must be between 0 and"),
        (bad(seqused=i32([-1, 1])), "seqused must be between 0 and"),
        (bad(start=torch.zeros(2)), r"start must be int32 \[2\], got float32 \[2\]"),
        (bad(modality=torch.zeros(4)), r"modality must be uint8 \[T\] with T = 4, got float32 \[4\]"),
        (bad(modality=torch.zeros(3, dtype=torch.uint8)), "ends at row 4, but T is 3"),
        (bad(modality=torch.full((4,), 16, dtype=torch.uint8)), "holds the id 16; expected less than 16"),
        (bad(modality=torch.ones(4, dtype=torch.uint8), names=("a",)), "holds the id 1; expected less than 1"),
        (bad(modality=torch.zeros(4, dtype=torch.uint8), time=i32([0] * 5)), r"time must be int32 \[T\] with T = 4"),
        (bad(position=i32([0] * 4)), r"position must be int32 \[T, A\]"),
        (bad(position=torch.zeros(4, 4, dtype=torch.int32)), "1 to 3 axes, got 4"),
        (bad(item=torch.zeros(4, dtype=torch.int64)), "item must be int32"),
        (bad(source=i32([0] * 4)), "source must be int64"),
        (bad(time=torch.zeros(4, dtype=torch.int32, device="meta")), "time is on meta, cu_seqlens on cpu"),
        (bad(names=("a", "a")), "different names"),
        (bad(names=tuple(map(str, range(17)))), "at most 16"),
        (lambda: Layout.from_lengths(torch.tensor([1.0])), "lengths must be B integers"),
        (lambda: Layout.from_lengths(torch.tensor([[1]])), "lengths must be B integers"),
        (lambda: Layout.from_lengths([2, -1]), "never decrease"),
        (lambda: Layout.from_padding_mask(torch.ones(2, 2)), r"mask must be bool \[B, L\]"),
        (lambda: Layout.from_padding_mask(torch.ones(2, dtype=torch.bool)), r"mask must be bool \[B, L\]"),
        (lambda: Layout.from_lengths([2], name="a").modality_id("b"), r"'b' is no modality of this layout \(a\)"),
        (lambda: Layout.from_lengths([2]).modality_id("b"), "it has no names"),
        (lambda: Layout.from_lengths([2]).modality_id(MAX_MODALITIES), "out of range"),
        (lambda: Layout.from_lengths([2]).with_time("prefix"), "needs modalities"),
        (lambda: Layout.from_lengths([2]).with_time("later", modalities=(0,)), "kind is 'later'"),
        (lambda: Layout.from_lengths([2]).with_time("prefix", lengths=i32([1, 1])), r"lengths must be \[1\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
