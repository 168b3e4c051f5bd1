"""Tokenisers that need no vocabulary file: bytes, and words as bags of hashed trigrams. Ragged results, no padding."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .hashing import mix


def take_ragged(values: torch.Tensor, lengths: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows `index` of a ragged tensor, in that order.

    Args:
        values: [sum(lengths), ...], row i after row i - 1.
        lengths: integer [rows].
        index: integer [n]; rows may repeat.

    Returns:
        values [sum of the chosen lengths, ...] and lengths [n], of the dtype of `lengths`.
    """
    index = index.to(lengths.device).long()
    chosen = lengths[index].long()
    begin = (lengths.long().cumsum(0) - lengths)[index]
    shift = torch.repeat_interleave(begin - (chosen.cumsum(0) - chosen), chosen)
    rows = torch.arange(len(shift), device=shift.device) + shift
    return values[rows.to(values.device)], lengths[index]


def _texts(texts: Sequence[str], name: str) -> list[str]:
    if isinstance(texts, str):
        raise TypeError(f"{name}: texts is one string, expected a list of strings; write [text]")
    return list(texts)


@dataclass(frozen=True)
class Tokens:
    """Token ids of several texts, one after the other.

    Attributes:
        ids: int64 [sum(lengths)].
        lengths: int32 [texts], tokens of each text.
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    def select(self, index: torch.Tensor) -> Tokens:
        """The tokens of the texts `index` (integer [n]), in that order."""
        return Tokens(*take_ragged(self.ids, self.lengths, index))


class ByteTokenizer:
    """One token per UTF-8 byte: ids 0 to 255, then `bos`, `eos` and `mask`.

    Args:
        bos, eos: put the special token before or after each text.
        max_length: cut texts to this many tokens, the special ones included.
    """

    bos_id, eos_id, mask_id, vocab_size = 256, 257, 258, 259

    def __init__(self, *, bos: bool = True, eos: bool = True, max_length: int | None = None) -> None:
        if max_length is not None and max_length <= bos + eos:
            raise ValueError(f"ByteTokenizer: max_length is {max_length}, expected more than {bos + eos}")
        self.bos, self.eos, self.max_length = bos, eos, max_length

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Tokenise a list of strings."""
        room = None if self.max_length is None else self.max_length - self.bos - self.eos
        parts = [text.encode("utf-8", "replace")[:room] for text in _texts(texts, "ByteTokenizer")]
        body = np.array([len(part) for part in parts], dtype=np.int64)
        lengths = body + (self.bos + self.eos)
        ends = lengths.cumsum()
        ids = np.empty(int(lengths.sum()), dtype=np.int64)
        is_byte = np.ones(len(ids), dtype=bool)
        if self.bos:
            ids[ends - lengths], is_byte[ends - lengths] = self.bos_id, False
        if self.eos:
            ids[ends - 1], is_byte[ends - 1] = self.eos_id, False
        ids[is_byte] = np.frombuffer(b"".join(parts), dtype=np.uint8)
        return Tokens(torch.from_numpy(ids), torch.from_numpy(lengths.astype(np.int32)))

    def decode(self, ids: torch.Tensor) -> str:
        """The text of one sequence of ids; special tokens are left out, cut characters become U+FFFD."""
        return bytes(i for i in ids.tolist() if i < 256).decode("utf-8", "replace")


@dataclass(frozen=True)
class WordTokens:
    """Words of several texts; each word is a bag of ids whose embeddings are summed.

    `F.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True)` gives one row per word.

    Attributes:
        ids: int64 [entries]; of each word first the word's own id, then its trigrams'.
        offsets: int64 [words + 1]; word i owns the entries offsets[i]:offsets[i + 1].
        lengths: int32 [texts], words of each text.
    """

    ids: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor

    def select(self, index: torch.Tensor) -> WordTokens:
        """The words of the texts `index` (integer [n]), in that order."""
        words, lengths = take_ragged(torch.arange(len(self.offsets) - 1), self.lengths, index)
        ids, entries = take_ragged(self.ids, self.offsets.diff(), words)
        return WordTokens(ids, torch.cat([entries.new_zeros(1), entries.cumsum(0)]), lengths)


class WordTrigramTokenizer:
    """One token per word: the hashed word and the hashed character trigrams of "<word>".

    Text is normalised (NFKC, case folded) and cut into runs of letters and digits, and single other marks. With the
    SplitMix64 output function m and code points c_0 ... c_{n-1} of "<word>", trigram i has the hash
    m(c_i + 2^21 c_{i+1} + 2^42 c_{i+2}) and the word has m(sum_i m(c_i + 2^21 i)), sums modulo 2^64. Word ids are
    hash mod `words`, trigram ids `words` + hash mod `trigrams`. Source of the idea: Bojanowski et al. 2017 (fastText).

    Args:
        words, trigrams: how many rows of the embedding they share among themselves by hashing.
        max_words: cut texts to this many words.
    """

    _WORD = re.compile(r"[^\W_]+|[^\s\w]|_")

    def __init__(self, *, words: int = 1 << 14, trigrams: int = 1 << 14, max_words: int | None = None) -> None:
        if words < 1 or trigrams < 1 or (max_words is not None and max_words < 1):
            raise ValueError(
                f"WordTrigramTokenizer: words={words}, trigrams={trigrams}, max_words={max_words}, expected 1 or more"
            )
        self.words, self.trigrams, self.max_words = words, trigrams, max_words

    @property
    def vocab_size(self) -> int:
        """Rows that the embedding needs."""
        return self.words + self.trigrams

    def split(self, text: str) -> list[str]:
        """The words of one text, as they are hashed."""
        return self._WORD.findall(unicodedata.normalize("NFKC", text).casefold())[: self.max_words]

    def __call__(self, texts: Sequence[str]) -> WordTokens:
        """Tokenise a list of strings."""
        cut = [self.split(text) for text in _texts(texts, "WordTrigramTokenizer")]
        lengths = torch.tensor([len(words) for words in cut], dtype=torch.int32)
        framed = [f"<{word}>" for words in cut for word in words]
        if not framed:
            return WordTokens(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), lengths)
        code = np.frombuffer("".join(framed).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
        size = np.array([len(word) for word in framed], dtype=np.int64)
        begin = size.cumsum() - size

        place = (np.arange(len(code)) - np.repeat(begin, size)).astype(np.uint64)
        whole = mix(np.add.reduceat(mix(code + (place << np.uint64(21))), begin))
        # Trigrams start anywhere but at the last two places of a framed word.
        starts = np.flatnonzero(place < np.repeat(size - 2, size).astype(np.uint64))
        triple = code[starts] + (code[starts + 1] << np.uint64(21)) + (code[starts + 2] << np.uint64(42))

        offsets = np.concatenate([[0], (size - 1).cumsum()])  # a framed word of n places has n - 2 trigrams
        ids = np.empty(offsets[-1], dtype=np.int64)
        first = np.zeros(len(ids), dtype=bool)
        first[offsets[:-1]] = True
        ids[first] = (whole % np.uint64(self.words)).astype(np.int64)
        ids[~first] = (mix(triple) % np.uint64(self.trigrams)).astype(np.int64) + self.words
        return WordTokens(torch.from_numpy(ids), torch.from_numpy(offsets.astype(np.int64)), lengths)
