"""Every mask of the field against a brute-force loop over samples, queries and keys, written from its definition."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import Layout, ModalityMask, Rule
from mmfast.mask import rule_holds, unpack_table

many = settings(max_examples=40, deadline=None)


@st.composite
def batches(draw, names):
    """Samples as lists of items (modality, length), and their layout."""
    item = st.tuples(st.integers(0, len(names) - 1), st.integers(1, 4))
    samples = draw(st.lists(st.lists(item, max_size=5), max_size=4))
    cu, modality, items, number = [0], [], [], 0
    for sample in samples:
        for kind, length in sample:
            modality += [kind] * length
            items += [number] * length
            number += 1
        cu.append(len(modality))
    after = draw(st.integers(0, 2))
    layout = Layout(
        torch.tensor(cu, dtype=torch.int32),
        modality=torch.tensor(modality + [0] * after, dtype=torch.uint8),
        item=torch.tensor(items + [number] * after, dtype=torch.int32),
        names=names,
    )
    return samples, layout


def rows_of(samples, names):
    """Per sample its rows: name, position, number of the item in the sample, first position of the item."""
    out = []
    for sample in samples:
        rows = []
        for i, (kind, length) in enumerate(sample):
            first = len(rows)
            rows += [{"name": names[kind], "p": first + r, "item": i, "first": first} for r in range(length)]
        out.append(rows)
    return out


def brute(samples, layout, sees, names):
    """bool [T, T] by three loops; sees(query row, key row, rows of the sample) speaks of one sample."""
    seen = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    for b, rows in enumerate(rows_of(samples, names)):
        begin = int(layout.cu_seqlens[b])
        for i, query in enumerate(rows):
            for j, key in enumerate(rows):
                seen[begin + i, begin + j] = sees(query, key, rows)
    return seen


def check(batch, layout, mask, sees):
    expected = brute(batch[0], batch[1], sees, layout.names)
    assert torch.equal(mask.visible(layout), expected)


IT = ("image", "text")


@many
@given(batches(IT), st.integers(-1, 5), st.integers(-1, 5))
def test_full_and_causal(batch, left, right):
    def near(q, k):
        return (left == -1 or q["p"] - k["p"] <= left) and (right == -1 or k["p"] - q["p"] <= right)

    check(batch, batch[1], ModalityMask.full(window=(left, right)), lambda q, k, _: near(q, k))
    causal = ModalityMask.causal(window=(left, right))
    check(batch, batch[1], causal, lambda q, k, _: k["p"] <= q["p"] and near(q, k))


@many
@given(batches(IT), st.data())
def test_prefix_lm(batch, data):
    samples, layout = batch
    lengths = [data.draw(st.integers(0, 8)) for _ in samples]
    timed = layout.with_time("prefix", lengths=torch.tensor(lengths, dtype=torch.int32))
    of_sample = {id(rows): n for rows, n in zip(samples, lengths)}
    assert len(of_sample) <= len(samples)
    seen = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    for b, (rows, n) in enumerate(zip(rows_of(samples, IT), lengths)):
        begin = int(layout.cu_seqlens[b])
        for i in range(len(rows)):
            for j in range(len(rows)):
                seen[begin + i, begin + j] = j <= i or (i < n and j < n)
    assert torch.equal(ModalityMask.prefix_lm().visible(timed), seen)


@many
@given(batches(IT), st.sampled_from([(-1, -1), (3, -1), (0, -1), (2, 2)]))
def test_early_fusion(batch, window):
    timed = batch[1].with_time("segment_start", modalities=("image",))

    def sees(q, k, _):
        own_image = q["name"] == k["name"] == "image" and q["item"] == k["item"]
        left = window[0] == -1 or q["p"] - k["p"] <= window[0]
        right = window[1] == -1 or k["p"] - q["p"] <= window[1]
        return (k["p"] <= q["p"] or own_image) and left and right

    check(batch, timed, ModalityMask.early_fusion(window), sees)


@many
@given(batches(IT), st.booleans())
def test_flamingo(batch, latest):
    timed = batch[1].with_time("media_count", modalities=("image",))

    def sees(q, k, rows):
        if q["name"] != "text" or k["name"] != "image":
            return False
        before = [r["item"] for r in rows if r["name"] == "image" and r["p"] < q["p"]]
        return bool(before) and (k["item"] == before[-1] if latest else k["item"] in before)

    mask = ModalityMask.flamingo(latest=latest)
    check(batch, timed, mask, sees)
    # As cross-attention onto the images alone.
    images, index = timed.select("image")
    assert torch.equal(mask.visible(timed, images), mask.visible(timed)[:, index])


def test_flamingo_text_before_any_image_sees_nothing():
    layout = Layout(
        torch.tensor([0, 5, 7], dtype=torch.int32),
        modality=torch.tensor([1, 0, 0, 1, 0, 1, 1], dtype=torch.uint8), names=IT,
    ).with_time("media_count", modalities=("image",))  # fmt: skip
    seen = ModalityMask.flamingo().visible(layout)
    assert seen.any(1).tolist() == [False, False, False, True, False, False, False]
    assert seen[3].nonzero().flatten().tolist() == [1, 2]


@many
@given(batches(("query", "text")), st.sampled_from(["contrastive", "matching", "generation"]))
def test_q_former(batch, objective):
    def sees(q, k, _):
        if objective == "matching":
            return True
        if objective == "contrastive":
            return q["name"] == k["name"]
        if q["name"] == "query":
            return k["name"] == "query"
        return k["name"] == "query" or k["p"] <= q["p"]

    check(batch, batch[1], ModalityMask.q_former(objective), sees)


@many
@given(batches(("video", "audio", "video_fsn", "audio_fsn")))
def test_bottleneck(batch):
    mask = ModalityMask.bottleneck({"video": "video_fsn", "audio": "audio_fsn"})
    check(batch, batch[1], mask, lambda q, k, _: q["name"][:5] == k["name"][:5])


@many
@given(batches(("text", "image", "sensor")))
def test_co_attention(batch):
    check(batch, batch[1], ModalityMask.co_attention(), lambda q, k, _: {q["name"], k["name"]} == {"text", "image"})


@many
@given(batches(IT), st.booleans())
def test_dual_encoder(batch, causal):
    def sees(q, k, _):
        return q["name"] == k["name"] and (q["name"] == "image" or not causal or k["p"] <= q["p"])

    check(batch, batch[1], ModalityMask.dual_encoder(causal_text=causal), sees)


@many
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), max_size=3))
def test_block_diffusion(sizes):
    """Each sample: all noisy blocks, then their clean copies; time is the block's number."""
    cu, modality, time, kinds = [0], [], [], []
    for blocks, width in sizes:
        for copy in range(2):
            for block in range(blocks):
                modality += [copy] * width
                time += [block] * width
        kinds.append([(copy, block) for copy in range(2) for block in range(blocks) for _ in range(width)])
        cu.append(len(time))
    layout = Layout(
        torch.tensor(cu, dtype=torch.int32),
        modality=torch.tensor(modality, dtype=torch.uint8),
        time=torch.tensor(time, dtype=torch.int32),
        names=("noisy", "clean"),
    )
    seen = torch.zeros(len(time), len(time), dtype=torch.bool)
    for b, rows in enumerate(kinds):
        for i, (copy_q, block_q) in enumerate(rows):
            for j, (copy_k, block_k) in enumerate(rows):
                if copy_q == 0:
                    value = block_k == block_q if copy_k == 0 else block_k < block_q
                else:
                    value = copy_k == 1 and block_k <= block_q
                seen[cu[b] + i, cu[b] + j] = value
    assert torch.equal(ModalityMask.block_diffusion().visible(layout), seen)


@many
@given(batches(IT), st.integers(0, 4))
def test_start_aligns_a_cache(batch, extra):
    """New queries behind a cache: start shifts their positions, so causal rules and windows align bottom right."""
    _, keys = batch
    cu, used = [0], []
    for n in keys.lengths().tolist():
        used.append(min(n, extra))
        cu.append(cu[-1] + used[-1])
    queries = Layout(
        torch.tensor(cu, dtype=torch.int32), start=keys.lengths() - torch.tensor(used, dtype=torch.int32), names=IT
    )
    for mask in (ModalityMask.causal(), ModalityMask.causal(window=(2, -1))):
        whole, some = mask.visible(keys), mask.visible(queries, keys)
        rows = [int(keys.cu_seqlens[b + 1]) - used[b] + i for b in range(keys.batch) for i in range(used[b])]
        assert torch.equal(some, whole[torch.tensor(rows, dtype=torch.long)])


# The table


@many
@given(st.dictionaries(st.tuples(st.integers(0, 15), st.integers(0, 15)), st.sampled_from(list(Rule))),
       st.sampled_from(list(Rule)))  # fmt: skip
def test_table(pairs, default):
    table = ModalityMask(pairs, default=default).table()
    assert len(table) == 16 and all(0 <= row < 2**48 for row in table)
    rules = unpack_table(table)
    for a in range(16):
        for b in range(16):
            assert rules[a][b] == pairs.get((a, b), default)


def test_table_by_name_and_two_layouts():
    mask = ModalityMask({("text", "image"): "same", ("text", "text"): Rule.CAUSAL})
    rules = unpack_table(mask.table(("text",), ("image", "text")))
    assert rules[0][0] == Rule.SAME and rules[0][1] == Rule.CAUSAL and sum(map(sum, rules)) == 6
    rules = unpack_table(mask.table(("image", "text")))
    assert rules[1][0] == Rule.SAME and rules[1][1] == Rule.CAUSAL
    assert ModalityMask((("a", "b"), 1) for _ in range(1)).table(("a", "b"))[0] == 1 << 3
    assert hash(mask) == hash(dataclasses.replace(mask)) and mask == dataclasses.replace(mask)


def test_rules_are_looked_up_without_a_copy_from_the_host():
    """On a GPU a tensor made of a list, or a number read back, waits for the device."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func is torch.ops.aten.lift_fresh.default and args[0].dim() > 0
            assert not made and func is not torch.ops.aten._local_scalar_dense.default, func
            return func(*args, **(kwargs or {}))

    table = ModalityMask.q_former("generation").table(("query", "text"))
    place = torch.arange(6, dtype=torch.int32)
    modality = (place > 2).to(torch.uint8)
    side_q, side_k = ((x[:, None] for x in (modality, place, place)), (modality, place, place))
    with Watch():
        seen = rule_holds(table, (2, -1), *side_q, *side_k)
    assert torch.equal(
        seen,
        ModalityMask.q_former("generation", 0, 1).visible(Layout(torch.tensor([0, 6]).int(), modality=modality))
        & (place[:, None] - place <= 2),
    )
    with Watch(), pytest.raises(AssertionError):
        torch.tensor([1, 2])
    with Watch(), pytest.raises(AssertionError):
        int(place[0])


def test_repr():
    assert repr(ModalityMask.full()) == "ModalityMask(all FULL; time index)"
    assert repr(ModalityMask()) == "ModalityMask(all NONE; time index)"
    assert repr(ModalityMask.early_fusion((7, -1))) == "ModalityMask(all CAUSAL; window (7, -1); time segment_start)"
    text = repr(ModalityMask({("a", "b"): "past"}, default="same"))
    assert text == "ModalityMask(a -> b PAST, otherwise SAME; time index)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ModalityMask({("a", "b"): "never"}), "a rule is 'never'; expected one of none, full, causal"),
        (lambda: ModalityMask({("a", "b"): 5}), "a rule is 5"),
        (lambda: ModalityMask(default="x"), "a rule is 'x'"),
        (lambda: ModalityMask({("a",): "full"}), "a pair must be"),
        (lambda: ModalityMask({("a", 1.5): "full"}), "a pair must be"),
        (lambda: ModalityMask(window=(1,)), "window must be"),
        (lambda: ModalityMask(window=(-2, 0)), "window must be"),
        (lambda: ModalityMask(window=(0.5, 0)), "window must be"),
        (
            lambda: ModalityMask({("a", "b"): "full"}).table(("a",)),
            r"'b' is no modality of the key layout \(it has a\)",
        ),
        (lambda: ModalityMask({("c", "a"): "full"}).table(("a",)), "'c' is no modality of the query layout"),
        (lambda: ModalityMask({(16, 0): "full"}).table(), "modality 16 is out of range"),
        (lambda: ModalityMask.q_former("other"), "objective is 'other'"),
        (lambda: ModalityMask.full().visible(Layout.from_lengths([1]), Layout.from_lengths([1, 1])), "1 samples.* 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
