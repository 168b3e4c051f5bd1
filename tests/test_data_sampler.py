"""Batches: nothing lost, budgets kept, the same for the same seed, exact resumption."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data.hashing import shuffled
from mmfast.data.sampler import BatchSampler

LENGTHS = torch.randint(1, 60, (997,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_budget_is_kept_and_used(bucket, shuffle):
    batches = list(BatchSampler(LENGTHS, tokens=500, bucket=bucket, shuffle=shuffle))
    assert sorted(i for b in batches for i in b) == list(range(997))
    cost = [len(b) * int(LENGTHS[b].max()) if bucket else int(LENGTHS[b].sum()) for b in batches]
    assert max(cost) <= 500
    assert sum(cost) / len(cost) > 430


def test_order_without_shuffle():
    assert list(BatchSampler([1] * 7, batch_size=3, shuffle=False)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(BatchSampler([1] * 7, batch_size=3, shuffle=False, drop_last=True)) == [[0, 1, 2], [3, 4, 5]]
    # An item that just fits closes the batch; one token more opens another.
    assert list(BatchSampler([4, 6, 1, 5, 5], tokens=10, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_buckets_are_narrow():
    def waste(bucket):
        batches = list(BatchSampler(LENGTHS, batch_size=16, bucket=bucket))
        return sum(len(b) * int(LENGTHS[b].max()) for b in batches) / int(LENGTHS.sum())

    assert waste(True) < 1.1 < 1.5 < waste(False)


def test_buckets_come_in_another_order_each_epoch():
    """All lengths differ, so each epoch has the same batches; only their order can change."""
    sampler = BatchSampler(range(1, 101), batch_size=10, bucket=True)
    first, second = list(sampler), list(sampler)
    assert first != second and sorted(first) == sorted(second)


def test_epochs_and_seeds_differ_and_repeat():
    sampler = BatchSampler(LENGTHS, tokens=500, seed=1)
    first, second = list(sampler), list(sampler)
    assert sampler.epoch == 2 and first != second
    assert list(BatchSampler(LENGTHS, tokens=500, seed=1)) == first
    assert list(BatchSampler(LENGTHS, tokens=500, seed=2)) != first


def test_the_order_is_the_same_on_every_machine():
    assert shuffled(10, 0, 0).tolist() == [0, 1, 9, 4, 2, 3, 6, 8, 7, 5]
    assert sorted(shuffled(1000, 5, 1).tolist()) == list(range(1000))


@settings(max_examples=40, deadline=None)
@given(
    stop=st.integers(0, 250),
    bucket=st.booleans(),
    tokens=st.booleans(),
    world_size=st.integers(1, 3),
    drop_last=st.booleans(),
)
def test_resume_is_exact(stop, bucket, tokens, world_size, drop_last):
    size = {"tokens": 300} if tokens else {"batch_size": 10}
    options = {**size, "bucket": bucket, "world_size": world_size, "rank": world_size - 1, "drop_last": drop_last}

    def stream(sampler):
        while True:
            yield from sampler

    whole = BatchSampler(LENGTHS, **options)
    it = stream(whole)
    for _ in range(stop):
        next(it)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = [next(it) for _ in range(120)]
    resumed = BatchSampler(LENGTHS, **options)
    resumed.load_state_dict(state)
    it = stream(resumed)
    assert [next(it) for _ in range(120)] == expected


def test_leaving_early_and_coming_back():
    expected = list(BatchSampler(LENGTHS, batch_size=50))
    sampler, got = BatchSampler(LENGTHS, batch_size=50), []
    for batch in sampler:
        got.append(batch)
        if len(got) == 4:
            break
    got += list(sampler)
    assert got == expected and sampler.epoch == 1


def test_seek_past_the_end_is_the_next_epoch():
    sampler = BatchSampler(LENGTHS, batch_size=50)
    sampler.seek(2, len(sampler))
    assert (sampler.epoch, sampler.position) == (3, 0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_batches(drop_last):
    alone = list(BatchSampler(LENGTHS, tokens=400))
    ranks = [list(BatchSampler(LENGTHS, tokens=400, rank=r, world_size=4, drop_last=drop_last)) for r in range(4)]
    assert len({len(r) for r in ranks}) == 1
    merged = [batch for step in zip(*ranks, strict=True) for batch in step]
    whole = len(alone) // 4 * 4
    assert len(alone) % 4, "this test needs a remainder"
    assert merged == (alone[:whole] if drop_last else alone + alone[: 4 - len(alone) % 4])


def test_a_state_of_other_data_is_refused():
    state = BatchSampler(LENGTHS, tokens=400).state_dict()
    for other in (BatchSampler(LENGTHS + 1, tokens=400), BatchSampler(LENGTHS, tokens=401)):
        with pytest.raises(ValueError, match="same arguments"):
            other.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"tokens": 9, "batch_size": 9}, "exactly one"),
        ({"batch_size": 0}, "1 or more"),
        ({"tokens": 4}, "item 1 has 5 tokens"),
        ({"batch_size": 1, "rank": 2, "world_size": 2}, "rank is 2"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler([3, 5], **arguments)


def test_no_items():
    assert list(BatchSampler([], batch_size=4, world_size=2)) == []
    assert list(BatchSampler([], tokens=4, bucket=True)) == []


def test_data_loader_takes_it():
    data = torch.arange(997)
    loader = torch.utils.data.DataLoader(data, batch_sampler=BatchSampler(LENGTHS, tokens=500))
    assert sorted(torch.cat(list(loader)).tolist()) == list(range(997))
