"""Pictures and names of emoji: trained on three artists, tested on the fourth and on concepts never seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmfast.data import BatchSampler, EmojiSet, WordTokens, WordTrigramTokenizer, augment
from mmfast.models import ImageEncoder, MultimodalModel, TextEncoder
from mmfast.tasks import Batch, Contrastive, embed, retrieval
from mmfast.train.batches import SampledBatches
from mmfast.train.recipes.inputs import count_tokens, square_images, text_input

NAME, KEYWORDS, BOTH = range(3)


@dataclasses.dataclass(frozen=True)
class EmojiRecipe:
    """Everything that decides about model, data and loss; JSON values only.

    Args:
        held_out: the artist that is never trained on.
        dim, embed_dim, heads, mlp_ratio: widths of both encoders and the shared space.
        image_depth, text_depth: transformer layers.
        words, trigrams: rows of the text embedding.
        name, keywords: shares of the texts that are the name and the keywords; the rest is both.
        candidates: weight of the loss of a picture against the names of all training concepts.
        batch_size: pictures per step.
        augment: strengths of `mmfast.data.augment`.
    """

    held_out: str = "noto"
    dim: int = 192
    embed_dim: int = 192
    heads: int = 6
    mlp_ratio: float = 3
    image_depth: int = 2
    text_depth: int = 1
    words: int = 8192
    trigrams: int = 8192
    name: float = 0.70
    keywords: float = 0.18
    candidates: float = 1.0
    batch_size: int = 256
    augment: dict = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    def model(self) -> MultimodalModel:
        """The untrained model; seed torch before."""
        shared = {"heads": self.heads, "mlp_ratio": self.mlp_ratio}
        encoders: dict[str, nn.Module] = {
            "image": ImageEncoder(self.dim, self.image_depth, **shared),
            "text": TextEncoder(self.dim, self.text_depth, vocab=self.words + self.trigrams, **shared),
        }
        return MultimodalModel(encoders, self.dim, self.embed_dim)

    def tokenizer(self) -> WordTrigramTokenizer:
        return WordTrigramTokenizer(words=self.words, trigrams=self.trigrams, max_words=24)

    def task(self) -> Contrastive:
        return Contrastive("image", "text", candidates=self.candidates)


class EmojiData:
    """The emoji as batches for one recipe.

    Args:
        emoji: the set.
        recipe: see `EmojiRecipe`.
    """

    def __init__(self, emoji: EmojiSet, recipe: EmojiRecipe):
        if recipe.held_out not in emoji.artists:
            raise ValueError(
                f"EmojiRecipe: held_out is {recipe.held_out!r}, expected one of {', '.join(emoji.artists)}"
            )
        self.emoji, self.recipe = emoji, recipe
        self.seen_artists = [a for a in emoji.artists if a != recipe.held_out]
        tokenizer = recipe.tokenizer()
        keywords = [" ".join(words) for words in emoji.keywords]
        both = [f"{name} {words}" for name, words in zip(emoji.names, keywords)]
        self.concepts = len(emoji.names)
        # Kind k of concept c is text k * concepts + c.
        self.texts: WordTokens = tokenizer([*emoji.names, *(k or n for k, n in zip(keywords, emoji.names)), *both])
        # Concepts of one name are one thing for the losses and for retrieval.
        first: dict[str, int] = {}
        self.ids = torch.tensor([first.setdefault(name, i) for i, name in enumerate(emoji.names)])
        self.train_rows = emoji.rows(self.seen_artists, "train")
        self.names = self._unique(emoji.split["train"])

    def _unique(self, concepts: Tensor) -> Tensor:
        """The first concept of each name."""
        seen: set[int] = set()
        return concepts[torch.tensor([not (i in seen or seen.add(i)) for i in self.ids[concepts].tolist()])]

    def train_batches(self, seed: int = 0) -> SampledBatches:
        """Endless augmented batches of the training artists and concepts."""
        count = len(self.train_rows)
        size = min(self.recipe.batch_size, count)
        sampler = BatchSampler([1] * count, batch_size=size, seed=seed, drop_last=True)
        return SampledBatches(sampler, self._collate, seed)

    def _collate(self, indices: list[int], generator: torch.Generator) -> Batch:
        recipe = self.recipe
        rows = self.train_rows[torch.tensor(indices)]
        concept = self.emoji.concept[rows]
        pixels = augment(self.emoji.images[rows], generator=generator, **recipe.augment)
        draw = torch.rand(len(rows), generator=generator)
        kind = torch.full_like(concept, BOTH)
        kind[draw < recipe.name + recipe.keywords] = KEYWORDS
        kind[draw < recipe.name] = NAME
        texts = self.texts.select(kind * self.concepts + concept)
        batch = self._batch({"image": square_images(pixels), "text": text_input(texts)}, self.ids[concept])
        if not recipe.candidates:
            return batch
        names = text_input(self.texts.select(self.names))
        return dataclasses.replace(batch, candidates=names, candidate_ids=self.ids[self.names])

    def _batch(self, inputs: dict, ids: Tensor) -> Batch:
        return Batch(inputs, len(ids), ids=ids, tokens=count_tokens(inputs))

    def image_batches(self, rows: Tensor, size: int = 512) -> Iterator[Batch]:
        """The pictures of some rows, in order, as they are."""
        for part in rows.split(size):
            images = square_images(self.emoji.images[part])
            yield self._batch({"image": images}, self.ids[self.emoji.concept[part]])

    def name_batches(self, concepts: Tensor, size: int = 1024) -> Iterator[Batch]:
        """The names of some concepts, in order; a name that several share appears once."""
        concepts = self._unique(concepts)
        for part in concepts.split(size):
            yield self._batch({"text": text_input(self.texts.select(part))}, self.ids[part])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Retrieval figures, as "held-out artist/image->text R@1" and so on.

        held-out artist: pictures of the artist never seen, training concepts; candidates are all training names.
        held-out concepts: pictures of all artists, test concepts; candidates are all test names.
        """
        emoji = self.emoji
        tests = {
            "held-out artist": (emoji.rows(self.recipe.held_out, "train"), emoji.split["train"]),
            "held-out concepts": (emoji.rows(None, "test"), emoji.split["test"]),
        }
        out = {}
        for name, (rows, concepts) in tests.items():
            x, x_ids = embed(model, self.image_batches(rows), "image")
            y, y_ids = embed(model, self.name_batches(concepts), "text")
            out |= {f"{name}/{k}": v for k, v in retrieval(x, y, x_ids, y_ids).items()}
        return out
