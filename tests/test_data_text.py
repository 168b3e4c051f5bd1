"""Tokenisers: golden values, so that a hash that changes between machines or versions fails."""

import zlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.data.text import ByteTokenizer, WordTrigramTokenizer, take_ragged


def test_bytes_golden():
    tokens = ByteTokenizer()(["aé", "", "z"])
    assert tokens.ids.tolist() == [256, 97, 195, 169, 257, 256, 257, 256, 122, 257]
    assert tokens.lengths.tolist() == [5, 2, 3]
    assert tokens.ids.dtype == torch.int64 and tokens.lengths.dtype == torch.int32
    assert ByteTokenizer(bos=False, eos=False, max_length=2)(["abc", "é"]).ids.tolist() == [97, 98, 195, 169]
    assert ByteTokenizer(max_length=3)(["abc"]).ids.tolist() == [256, 97, 257]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12), max_size=6))
def test_bytes_round_trip(texts):
    tokenizer = ByteTokenizer()
    tokens = tokenizer(texts)
    parts = tokens.ids.split(tokens.lengths.tolist())
    assert [tokenizer.decode(part) for part in parts] == texts
    assert all(part[0] == 256 and part[-1] == 257 for part in parts)


def test_words_golden():
    tokens = WordTrigramTokenizer(words=1000, trigrams=1000)(["Red fox!", "", "red"])
    assert tokens.lengths.tolist() == [3, 0, 1]
    assert tokens.offsets.tolist() == [0, 4, 8, 10, 14]
    assert tokens.ids.tolist() == [535, 1643, 1974, 1576, 894, 1327, 1466, 1463, 903, 1096, 535, 1643, 1974, 1576]


def test_words_by_the_formula():
    """The documented formula in plain Python integers."""
    mask = 2**64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    text = "naïve 东京 x 😀"
    tokenizer = WordTrigramTokenizer(words=5000, trigrams=3000)
    tokens = tokenizer([text])
    expected = []
    for word in ["naïve", "东京", "x", "😀"]:
        c = [ord(ch) for ch in f"<{word}>"]
        expected.append(mix(sum(mix(v + (i << 21)) for i, v in enumerate(c)) & mask) % 5000)
        expected += [5000 + mix(c[i] + (c[i + 1] << 21) + (c[i + 2] << 42)) % 3000 for i in range(len(c) - 2)]
    assert tokens.ids.tolist() == expected
    assert tokens.lengths.tolist() == [4]
    assert int(tokens.ids.max()) < tokenizer.vocab_size == 8000


def test_words_are_normalised_and_cut():
    tokenizer = WordTrigramTokenizer(max_words=2)
    assert tokenizer.split("\uff26\uff2f\uff38_Straße, 3rd") == ["fox", "_"]
    assert WordTrigramTokenizer().split("Straße 7") == ["strasse", "7"]
    assert tokenizer(["RED Fox"]).ids.equal(tokenizer(["red fox jumps"]).ids)
    assert not tokenizer(["red fox"]).ids.equal(tokenizer(["fox red"]).ids)


def test_words_feed_embedding_bag():
    tokenizer = WordTrigramTokenizer(words=50, trigrams=50)
    tokens = tokenizer(["one two", "three"])
    weight = torch.randn(tokenizer.vocab_size, 4, dtype=torch.float64)
    out = F.embedding_bag(tokens.ids, weight, tokens.offsets, mode="sum", include_last_offset=True)
    begin, end = tokens.offsets[1:3].tolist()
    torch.testing.assert_close(out[1], weight[tokens.ids[begin:end]].sum(0))
    assert len(out) == int(tokens.lengths.sum())


@pytest.mark.parametrize("make", [ByteTokenizer, WordTrigramTokenizer])
def test_select_equals_tokenising_the_selection(make):
    texts = ["a red fox", "", "Čeština je hezká", "x", "one two three four"]
    index = torch.tensor([4, 1, 0, 0, 2])
    got, expected = make()(texts).select(index), make()([texts[i] for i in index])
    assert got.ids.equal(expected.ids) and got.lengths.equal(expected.lengths)
    if make is WordTrigramTokenizer:
        assert got.offsets.equal(expected.offsets)
    empty = make()([])
    assert len(empty.ids) == 0 and len(empty.lengths) == 0


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match=r"write \[text\]"):
        ByteTokenizer()("text")


def test_take_ragged_of_rows():
    lengths = torch.tensor([2, 0, 3])
    values = torch.arange(10).view(5, 2)
    out, got = take_ragged(values, lengths, torch.tensor([2, 1, 0]))
    assert out.tolist() == [[4, 5], [6, 7], [8, 9], [0, 1], [2, 3]] and got.tolist() == [3, 0, 2]


def test_split_places_are_stable():
    from mmfast.data.splits import split_by_group

    labels = [f"item {i}" for i in range(2000)]
    split = split_by_group(list(range(2000)), labels)
    assert sorted(torch.cat(list(split.values())).tolist()) == list(range(2000))
    assert abs(len(split["train"]) - 1600) < 60 and abs(len(split["test"]) - 300) < 50
    assert zlib.crc32(bytes(str(split["val"].tolist()), "ascii")) == 2037319582
