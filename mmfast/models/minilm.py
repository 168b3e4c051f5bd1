"""all-MiniLM-L6-v2: a frozen English sentence encoder with public weights, on packed tokens.

BERT (Devlin et al. 2019): embeddings, 6 post-norm layers of width 384, mean over a text's tokens. Texts of any length
are one ragged batch, so nothing is padded. Source of the weights' recipe: Wang et al. 2020, "MiniLM"; Reimers and
Gurevych 2019, "Sentence-BERT".
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfast.layout import Layout
from mmfast.nn.pooling import segment_mean
from mmfast.ops.attention import attention

_MAX_TOKENS = 256


class WordPiece:
    """BERT's uncased tokeniser: lower case, no accents, punctuation apart, then greedy longest pieces.

    Args:
        vocab: piece -> id, with [UNK], [CLS] and [SEP].

    Source: Devlin et al. 2019, section 3; Wu et al. 2016, section 4.1.
    """

    def __init__(self, vocab: Mapping[str, int]):
        self.vocab = dict(vocab)
        self.unknown, self.first, self.last = (self.vocab[t] for t in ("[UNK]", "[CLS]", "[SEP]"))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> WordPiece:
        """From a vocabulary with one piece per line."""
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return cls({piece: i for i, piece in enumerate(lines) if piece})

    def words(self, text: str) -> list[str]:
        """Lower-cased words and single punctuation marks; each Chinese character is a word."""
        spaced = []
        for c in unicodedata.normalize("NFD", text.lower()):
            kind = unicodedata.category(c)
            if kind == "Mn" or (kind.startswith("C") and c not in "\t\n\r"):
                continue
            apart = kind.startswith("P") or _ascii_symbol(c) or 0x4E00 <= ord(c) <= 0x9FFF or 0x3400 <= ord(c) <= 0x4DBF
            spaced.append(f" {c} " if apart else c)
        return "".join(spaced).split()

    def pieces(self, word: str) -> list[int]:
        """Ids of the longest pieces from the left; [UNK] where some rest is in no piece."""
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if prefix + word[start:e] in self.vocab), None)
            if end is None or len(word) > 100:
                return [self.unknown]
            found.append(self.vocab[prefix + word[start:end]])
            start = end
        return found

    def __call__(self, text: str) -> list[int]:
        """Ids with [CLS] and [SEP], at most 256."""
        ids = [i for word in self.words(text) for i in self.pieces(word)]
        return [self.first, *ids[: _MAX_TOKENS - 2], self.last]


def _ascii_symbol(c: str) -> bool:
    return 33 <= ord(c) <= 126 and not c.isalnum()


class _Layer(nn.Module):
    """Post-norm BERT layer on packed tokens."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-12), nn.LayerNorm(dim, eps=1e-12)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        x = self.norm1(x + self.out(attention(q, k, v, layout).flatten(1)))
        return self.norm2(x + self.mlp(x))


class MiniLM(nn.Module):
    """22.7 M parameters; `encode(texts)` gives unit vectors `[B, 384]`."""

    def __init__(self, tokeniser: WordPiece, *, dim: int = 384, heads: int = 12, layers: int = 6, hidden: int = 1536):
        super().__init__()
        self.tokeniser = tokeniser
        self.words = nn.Embedding(max(tokeniser.vocab.values()) + 1, dim)
        self.places = nn.Embedding(512, dim)
        self.kind = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(_Layer(dim, heads, hidden) for _ in range(layers))

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> MiniLM:
        """From a folder with `model.safetensors` and `vocab.txt`, in evaluation mode."""
        from safetensors.torch import load_file

        model = cls(WordPiece.from_file(Path(path) / "vocab.txt"))
        model.load_state_dict(_rename(load_file(Path(path) / "model.safetensors"), len(model.layers)))
        return model.eval()

    def forward(self, ids: Tensor, layout: Layout) -> Tensor:
        """Token ids int64 `[T]` and their layout -> tokens `[T, dim]`."""
        x = self.norm(self.words(ids) + self.places(layout.positions(ids.shape[0]).long()) + self.kind)
        for layer in self.layers:
            x = layer(x, layout)
        return x

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_tokens: int = 4096) -> Tensor:
        """Unit vectors `[B, dim]`, float32.

        Args:
            texts: B texts; an empty text still has its two special tokens.
            batch_tokens: tokens per forward pass.
        """
        ids = [self.tokeniser(text) for text in texts]
        device, out, batch, count = self.kind.device, [], [], 0
        for i, text in enumerate(ids):
            batch.append(text)
            count += len(text)
            if count >= batch_tokens or i + 1 == len(ids):
                layout = Layout.from_lengths([len(t) for t in batch]).to(device)
                tokens = self(torch.tensor([j for t in batch for j in t], device=device), layout)
                out.append(nn.functional.normalize(segment_mean(tokens, layout).float(), dim=-1))
                batch, count = [], 0
        return torch.cat(out) if out else torch.zeros(0, self.kind.shape[0], device=device)


def _rename(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """BERT's names to ours; query, key and value become one projection."""
    out = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        "places.weight": weights["embeddings.position_embeddings.weight"],
        "kind": weights["embeddings.token_type_embeddings.weight"][0],
    }
    names = {"embeddings.LayerNorm": "norm"}
    for i in range(layers):
        old, new = f"encoder.layer.{i}", f"layers.{i}"
        names |= {
            f"{old}.attention.output.dense": f"{new}.out",
            f"{old}.attention.output.LayerNorm": f"{new}.norm1",
            f"{old}.intermediate.dense": f"{new}.mlp.0",
            f"{old}.output.dense": f"{new}.mlp.2",
            f"{old}.output.LayerNorm": f"{new}.norm2",
        }
        for kind in ("weight", "bias"):
            parts = [weights[f"{old}.attention.self.{x}.{kind}"] for x in ("query", "key", "value")]
            out[f"{new}.qkv.{kind}"] = torch.cat(parts)
    for old, new in names.items():
        for kind in ("weight", "bias"):
            out[f"{new}.{kind}"] = weights[f"{old}.{kind}"]
    return out
