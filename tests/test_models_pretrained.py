"""Frozen encoders with public weights: the architecture against a plain one, the real weights where installed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.data.install import cache_dir, installed
from mmfast.layout import Layout
from mmfast.models.efficientnet import EfficientNetLite0
from mmfast.models.minilm import MiniLM, WordPiece, _rename

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "sit", "##ting", "cafe", ",", "!", "play", "##ing"]


@pytest.fixture
def tokeniser() -> WordPiece:
    return WordPiece({word: i for i, word in enumerate(WORDS)})


def test_wordpiece_takes_the_longest_pieces(tokeniser):
    ids = {word: i for i, word in enumerate(WORDS)}
    assert tokeniser("Cats, sitting!") == [2, ids["cat"], ids["##s"], 10, ids["sit"], ids["##ting"], 11, 3]
    assert tokeniser("CAFÉ") == [2, ids["cafe"], 3], "case and accents are dropped"
    assert tokeniser("catx") == [2, 1, 3], "a rest in no piece makes the whole word unknown"
    assert tokeniser("") == [2, 3]
    assert len(tokeniser("a " * 1000)) == 256


def bert_weights(dim: int, hidden: int, layers: int, vocab: int) -> dict:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "embeddings.word_embeddings.weight": (vocab, dim),
        "embeddings.position_embeddings.weight": (512, dim),
        "embeddings.token_type_embeddings.weight": (2, dim),
        "embeddings.LayerNorm.weight": (dim,),
        "embeddings.LayerNorm.bias": (dim,),
    }
    for i in range(layers):
        for name, rows, columns in (
            ("attention.self.query", dim, dim),
            ("attention.self.key", dim, dim),
            ("attention.self.value", dim, dim),
            ("attention.output.dense", dim, dim),
            ("intermediate.dense", hidden, dim),
            ("output.dense", dim, hidden),
        ):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = shapes[f"encoder.layer.{i}.{name}.bias"] = (dim,)
    return {name: torch.randn(shape, generator=g) * 0.3 for name, shape in shapes.items()}


def plain_bert(weights: dict, ids: torch.Tensor, heads: int, layers: int) -> torch.Tensor:
    """One text `[L]` through torch's own encoder layers."""
    w = weights

    def norm(x, name):
        return nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(layers):
        p = f"encoder.layer.{i}"

        def linear(x, name, p=p):
            return nn.functional.linear(x, w[f"{p}.{name}.weight"], w[f"{p}.{name}.bias"])

        q, k, v = (
            linear(x, f"attention.self.{n}").unflatten(-1, (heads, -1)).transpose(0, 1)
            for n in ("query", "key", "value")
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        x = norm(x + linear(y, "attention.output.dense"), f"{p}.attention.output.LayerNorm")
        y = linear(nn.functional.gelu(linear(x, "intermediate.dense")), "output.dense")
        x = norm(x + y, f"{p}.output.LayerNorm")
    return x


def test_packed_bert_equals_the_plain_one(tokeniser):
    weights = bert_weights(dim=32, hidden=64, layers=2, vocab=len(WORDS))
    model = MiniLM(tokeniser, dim=32, heads=4, layers=2, hidden=64)
    model.load_state_dict(_rename(weights, 2))
    texts = ["cats", "a cat sitting, playing!", ""]
    ids = [torch.tensor(tokeniser(t)) for t in texts]
    with torch.no_grad():
        packed = model(torch.cat(ids), Layout.from_lengths([len(i) for i in ids]))
    for got, i in zip(packed.split([len(i) for i in ids]), ids):
        torch.testing.assert_close(got, plain_bert(weights, i, heads=4, layers=2), atol=2e-5, rtol=1e-4)
    vectors = model.encode(texts, batch_tokens=4)
    torch.testing.assert_close(vectors, model.encode(texts, batch_tokens=1000))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


def test_efficientnet_has_the_published_shape():
    model = EfficientNetLite0().eval()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 96)).shape == (2, 1280)
    assert EfficientNetLite0.normalise(torch.full((1,), 127, dtype=torch.uint8)).item() == 0


@pytest.mark.skipif(not installed("minilm"), reason="mmfast data install minilm")
def test_minilm_knows_what_is_alike():
    model = MiniLM.from_folder(cache_dir() / "minilm" / "weights")
    dog, puppy, market = model.encode(["a happy dog", "a joyful puppy", "the stock market crashed"])
    assert dog @ puppy > 0.6 > 0.2 > dog @ market


@pytest.mark.skipif(not installed("efficientnet-lite0"), reason="mmfast data install efficientnet-lite0")
def test_efficientnet_weights_load():
    (path,) = (cache_dir() / "efficientnet-lite0" / "weights").rglob("*.pth")
    model = EfficientNetLite0.from_file(path)
    with torch.no_grad():
        logits = model.classify(EfficientNetLite0.normalise(torch.full((1, 3, 224, 224), 127, dtype=torch.uint8)))
    assert logits.isfinite().all() and logits.std() > 0.1
