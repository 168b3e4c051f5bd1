"""attention under every mask of the field, tile classification, and mutations that the comparison must notice."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from test_attention import DTYPES, check, inputs, one_thread, results

import mmfast
from mmfast import Layout, ModalityMask, Rule
from mmfast._native import available_isas, cpu, cpu_refusal
from mmfast.testing import shapes

pytestmark = pytest.mark.skipif(cpu_refusal is not None, reason=str(cpu_refusal))
__all__ = ["one_thread"]

ISAS = available_isas() if cpu_refusal is None else ()


def documents(names, seed=0, batch=4, longest=70):
    rng = random.Random(seed)
    parts = [
        [(rng.randrange(len(names)), rng.randint(1, longest)) for _ in range(rng.randint(1, 5))] for _ in range(batch)
    ]
    return shapes.interleaved(parts, names)


def prefix_lengths():
    layout = Layout.from_lengths([100, 3, 170])
    return layout.with_time("prefix", lengths=torch.tensor([40, 3, 0]))


def block_diffusion():
    """Each sample twice, noisy then clean; time is the block's number in both copies."""
    rows = [(copy, t // 16) for n in (48, 100) for copy in (0, 1) for t in range(n)]
    modality = torch.tensor([m for m, _ in rows], dtype=torch.uint8)
    time = torch.tensor([t for _, t in rows], dtype=torch.int32)
    return dataclasses.replace(Layout.from_lengths([96, 200]), modality=modality, time=time, names=("noisy", "clean"))


def media(seed=0):
    return documents(("text", "image"), seed).with_time("media_count", modalities=("image",))


MASKS = {
    "full": lambda: (documents(("text",)), None, ModalityMask.full()),
    "causal": lambda: (documents(("text",)), None, ModalityMask.causal()),
    "causal window": lambda: (documents(("text",), longest=150), None, ModalityMask.causal(window=(33, -1))),
    "window": lambda: (documents(("text",), longest=150), None, ModalityMask.full(window=(5, 70))),
    "window 0": lambda: (documents(("text",)), None, ModalityMask.full(window=(0, 0))),
    "prefix": lambda: (
        documents(("text", "image")).with_time("prefix", modalities=("image",)),
        None,
        ModalityMask.prefix_lm(),
    ),
    "prefix lengths": lambda: (prefix_lengths(), None, ModalityMask.prefix_lm()),
    "early fusion": lambda: (
        documents(("text", "image")).with_time("segment_start", modalities=("image",)),
        None,
        ModalityMask.early_fusion(),
    ),
    "early fusion window": lambda: (
        documents(("text", "image")).with_time("segment_start", modalities=("image",)),
        None,
        ModalityMask.early_fusion(window=(31, -1)),
    ),
    "flamingo latest": lambda: (
        media().select("text")[0],
        media().select("image")[0],
        ModalityMask.flamingo(),
    ),
    "flamingo all": lambda: (
        media().select("text")[0],
        media().select("image")[0],
        ModalityMask.flamingo(latest=False),
    ),
    "flamingo in place": lambda: (media(), None, ModalityMask.flamingo()),
    "q-former contrastive": lambda: (documents(("query", "text")), None, ModalityMask.q_former("contrastive")),
    "q-former matching": lambda: (documents(("query", "text")), None, ModalityMask.q_former("matching")),
    "q-former generation": lambda: (documents(("query", "text")), None, ModalityMask.q_former("generation")),
    "bottleneck": lambda: (
        documents(("audio", "video", "audio copy", "video copy")),
        None,
        ModalityMask.bottleneck({"audio": "audio copy", "video": "video copy"}),
    ),
    "co-attention": lambda: (documents(("text", "image")), None, ModalityMask.co_attention()),
    "dual encoder": lambda: (documents(("text", "image")), None, ModalityMask.dual_encoder()),
    "dual encoder full": lambda: (
        documents(("text", "image")),
        None,
        ModalityMask.dual_encoder(causal_text=False),
    ),
    "block diffusion": lambda: (block_diffusion(), None, ModalityMask.block_diffusion()),
    "sixteen modalities": lambda: (
        documents([str(i) for i in range(16)], longest=9, batch=12),
        None,
        ModalityMask({(i, (3 * i + j) % 16): 1 + (i + j) % 4 for i in range(16) for j in range(7)}),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    layout, other, mask = MASKS[name]()
    check(inputs(layout, other, heads=2, dim=32, dtype=dtype), layout, other, mask)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["early fusion window", "flamingo in place", "block diffusion"])
def test_masks_on_every_instruction_set(name, isa):
    layout, other, mask = MASKS[name]()
    check(inputs(layout, other, heads=2, dim=32), layout, other, mask, isa=isa)


@pytest.mark.parametrize("name", MASKS)
def test_the_weights_are_zero_exactly_where_the_mask_says(name):
    """With v the identity the output is the weights: the oracle is the brute-force mask."""
    layout, other, mask = MASKS[name]()
    keys = other or layout
    seen = mask.visible(layout, other)
    q, k, _, _ = inputs(layout, other, heads=1, dim=256)
    begins = keys.cu_seqlens[keys.samples().clamp(max=keys.batch - 1)]
    within = torch.arange(keys.total) - begins
    for first in range(0, int(keys.lengths().max()), 256):
        v = torch.zeros(keys.total, 1, 256)
        here = (within >= first) & (within < first + 256)
        v[here, 0, (within[here] - first).long()] = 1
        out = mmfast.attention(q * 0.01, k * 0.01, v, layout, other, mask, backend="cpu")
        for sample in range(layout.batch):
            rows_q = slice(*layout.cu_seqlens[sample : sample + 2].tolist())
            rows_k = slice(*keys.cu_seqlens[sample : sample + 2].tolist())
            expected = seen[rows_q, rows_k][:, first : first + 256]
            assert torch.equal(out[rows_q, 0, : expected.shape[1]] != 0, expected)


@pytest.mark.parametrize("seed", range(20))
def test_random_tables(seed):
    rng = random.Random(seed)
    names = ("a", "b", "c")
    layout = documents(names, seed)
    time = torch.tensor([rng.choice((-(2**31), -3, 0, 1, 2, 5, 2**31 - 1)) for _ in range(layout.total)])
    layout = dataclasses.replace(layout, time=time.to(torch.int32))
    pairs = {(a, b): rng.choice(list(Rule)) for a in names for b in names}
    window = rng.choice(((-1, -1), (3, -1), (-1, 20), (40, 10)))
    mask = ModalityMask(pairs, window=window)
    check(inputs(layout, heads=2, dim=16, seed=seed), layout, None, mask)


@pytest.mark.parametrize("rule", [Rule.SAME, Rule.CAUSAL, Rule.PAST])
@pytest.mark.parametrize("length", [48, 64, 65, 96, 97, 128, 129])
def test_the_last_row_counts_in_the_summary_of_its_tile(length, rule):
    layout = Layout.from_lengths([length] * 4)
    last = (torch.arange(length) == length - 1).repeat(4)
    for time in (last, ~last):
        timed = dataclasses.replace(layout, time=time.to(torch.int32))
        check(inputs(timed, heads=4, dim=32), timed, None, ModalityMask(default=rule))


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_panels_that_nobody_sees_between_others(dtype):
    """Each modality sees itself; its items fill whole panels of 64 keys and lie apart."""
    layout = shapes.interleaved([[(0, 64), (1, 128), (0, 64), (1, 64), (0, 128)]], ("a", "b"))
    check(inputs(layout, dtype=dtype), layout, None, ModalityMask({("a", "a"): "full", ("b", "b"): "full"}))


def test_rows_that_see_nothing():
    layout, _, mask = MASKS["flamingo in place"]()
    blind = ~mask.visible(layout).any(1)
    assert blind.any()
    out, lse, dq, _, _ = results(inputs(layout, heads=2), layout, None, mask)
    assert not out[blind].any() and not dq[blind].any()
    assert bool((lse[:, blind] == -torch.inf).all()) and bool(lse[:, ~blind].isfinite().all())


# Tiles


def test_classify_against_brute_force():
    rng = random.Random(0)
    kinds = [0, 0, 0]
    for _ in range(3000):
        modalities, times = rng.randint(1, 3), rng.randint(1, 4)
        table = ModalityMask({(a, b): rng.choice(list(Rule)) for a in range(3) for b in range(3)}).table()
        left, right = rng.choice(((-1, -1), (rng.randint(0, 6), -1), (-1, rng.randint(0, 6)), (rng.randint(0, 3), 2)))

        def tile(modalities=modalities, times=times):
            first, n = rng.randint(0, 9), rng.randint(1, 4)
            rows = [(rng.randrange(modalities), rng.randrange(times), first + i) for i in range(n)]
            bits = 0
            for m, _, _ in rows:
                bits |= 1 << m
            time = [t for _, t, _ in rows]
            return rows, [bits, min(time), max(time), first, first + n - 1]

        (rows_q, q), (rows_k, k) = tile(), tile()
        seen = [visible((table[a] >> 3 * b) & 7, s, t, i - j, left, right) for a, s, i in rows_q for b, t, j in rows_k]
        kind = cpu().classify_tile(list(table), left, right, q, k)
        kinds[kind] += 1
        assert kind != 0 or not any(seen)
        assert kind != 2 or all(seen)
    assert min(kinds) > 100


def visible(rule, time_q, time_k, distance, left, right):
    holds = {0: False, 1: True, 2: time_k <= time_q, 3: time_k < time_q, 4: time_k == time_q}[rule]
    return holds and (left < 0 or distance <= left) and (right < 0 or -distance <= right)


# Mutations: what the comparison is worth

MUTATIONS = {
    "rule: past for causal": (lambda x: x, ModalityMask(default=Rule.PAST, window=(40, 2))),
    "rule: full for causal": (lambda x: x, ModalityMask(default=Rule.FULL, window=(40, 2))),
    "window left + 1": (lambda x: x, ModalityMask.causal(window=(41, 2))),
    "window left - 1": (lambda x: x, ModalityMask.causal(window=(39, 2))),
    "time + 1": (lambda x: dataclasses.replace(x, time=x.times() + (torch.arange(x.total) == 60)), None),
    "last row": (lambda x: dataclasses.replace(x, seqused=x.lengths() - torch.tensor([0, 1]).int()), None),
    "a row of another sample": (lambda x: Layout.from_lengths([101, 129]), None),
    "start + 1": (lambda x: dataclasses.replace(x, start=torch.tensor([0, 1]).int(), time=x.times()), "keys"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name, dtype, monkeypatch):
    """The kernels run with one argument off by one; the comparison of these tests must fail."""
    change, mutant = MUTATIONS[name]
    layout, mask = Layout.from_lengths([100, 130]), ModalityMask.causal(window=(40, 2))
    tensors = inputs(layout, heads=1, dim=32, dtype=dtype)
    check(tensors, layout, None, mask)
    attention = mmfast.attention

    def mutated(q, k, v, layout_q, layout_k, mask, *, backend, **options):
        if backend != "cpu":
            return attention(q, k, v, layout_q, layout_k, mask, backend=backend, **options)
        layout_k = layout_q
        if mutant == "keys":
            layout_k = change(layout_k)
        else:
            layout_q = layout_k = change(layout_q)
        mask = mutant if isinstance(mutant, ModalityMask) else mask
        return attention(q, k, v, layout_q, layout_k, mask, backend=backend, **options)

    monkeypatch.setattr(mmfast, "attention", mutated)
    with pytest.raises(AssertionError):
        check(tensors, layout, None, mask)
