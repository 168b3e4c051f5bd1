"""Stamps: pictures of any size and aspect, captions and spoken descriptions; 16 classes and retrieval."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmfast.data import BatchSampler, StampSet, take_ragged
from mmfast.models import AudioEncoder, ImageInput, MultimodalModel
from mmfast.nn import AttentionFusion, ConcatFusion, WeightedFusion
from mmfast.tasks import Batch, Classification, Contrastive, MultiTask
from mmfast.train.batches import SampledBatches
from mmfast.train.recipes.emoji import EmojiRecipe
from mmfast.train.recipes.inputs import audio_input, count_tokens, cut_regions, normalise, text_input

MODALITIES = ("image", "text", "audio")
FUSIONS = {"concat": ConcatFusion, "weighted": WeightedFusion, "attention": AttentionFusion}
WEIGHTINGS = ("none", "equal", "uncertainty")


@dataclasses.dataclass(frozen=True)
class StampsRecipe:
    """Everything that decides about model, data and task; JSON values only.

    Args:
        modalities: what is read, in this order.
        fusion: "concat", "weighted" or "attention"; only with more than one modality.
        multitask: "none": the 16 classes only; "equal" or "uncertainty": also retrieval between each two modalities,
            on the same backbone, with losses weighted so.
        encoders: widths and depths of the encoders; those of the checkpoint that the weights come from.
        audio_depth: transformer layers over speech.
        languages: of the speech.
        region, longest: pictures are cut into regions of this side; their longer side is at most `longest` pixels.
        batch_size: stamps per step.
        dropout, label_smoothing: of the classifier.
        colour: strength of colour changes in training.
    """

    modalities: tuple[str, ...] = ("image",)
    fusion: str | None = None
    multitask: str = "none"
    encoders: EmojiRecipe = dataclasses.field(default_factory=EmojiRecipe)
    audio_depth: int = 2
    languages: tuple[str, ...] = ()
    region: int = 32
    longest: int = 96
    batch_size: int = 64
    dropout: float = 0.1
    label_smoothing: float = 0.1
    colour: float = 0.1

    def __post_init__(self):
        object.__setattr__(self, "modalities", tuple(self.modalities))
        object.__setattr__(self, "languages", tuple(self.languages))
        if isinstance(self.encoders, dict):
            object.__setattr__(self, "encoders", EmojiRecipe(**self.encoders))
        if not self.modalities or any(m not in MODALITIES for m in self.modalities):
            raise ValueError(f"StampsRecipe: modalities is {self.modalities}, expected some of {', '.join(MODALITIES)}")
        if self.fusion is not None and self.fusion not in FUSIONS:
            raise ValueError(f"StampsRecipe: fusion is {self.fusion!r}, expected one of {', '.join(FUSIONS)}")
        if len(self.modalities) > 1 and self.fusion is None:
            raise ValueError(f"StampsRecipe: {len(self.modalities)} modalities need a fusion: {', '.join(FUSIONS)}")
        if self.multitask not in WEIGHTINGS:
            raise ValueError(f"StampsRecipe: multitask is {self.multitask!r}, expected one of {', '.join(WEIGHTINGS)}")
        if self.multitask != "none" and len(self.modalities) < 2:
            raise ValueError("StampsRecipe: multitask needs at least two modalities to retrieve between")

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "modalities": list(self.modalities), "languages": list(self.languages)}

    def model(self) -> MultimodalModel:
        """The untrained model; seed torch before."""
        encoders = {name: x for name, x in self.encoders.model().encoders.items() if name in self.modalities}
        dim = self.encoders.dim
        if "audio" in self.modalities:
            encoders["audio"] = AudioEncoder(dim, self.audio_depth, self.encoders.heads, mlp_ratio=2)
        return MultimodalModel(encoders, dim, self.encoders.embed_dim)

    def task(self, classes: int) -> Classification | MultiTask:
        """The 16 classes, alone or beside retrieval."""
        dim = self.encoders.dim
        fusion = FUSIONS[self.fusion](dict.fromkeys(self.modalities, dim), dim) if self.fusion else None
        classification = Classification(
            classes, dim, self.modalities, fusion=fusion, dropout=self.dropout, label_smoothing=self.label_smoothing
        )
        if self.multitask == "none":
            return classification
        pairs = [(a, b) for i, a in enumerate(self.modalities) for b in self.modalities[i + 1 :]]
        tasks = {"classes": classification} | {f"{a}-{b}": Contrastive(a, b) for a, b in pairs}
        return MultiTask(tasks, weighting=self.multitask)


class StampsData:
    """The stamps as batches for one recipe.

    Args:
        stamps: the set, with speech where the recipe reads audio.
        recipe: see `StampsRecipe`.
    """

    def __init__(self, stamps: StampSet, recipe: StampsRecipe):
        if "audio" in recipe.modalities and not stamps.clips:
            raise ValueError(
                "StampsRecipe: modalities name audio, but the set has no clips; use load_stamps(speech=True)"
            )
        self.stamps, self.recipe = stamps, recipe
        self.texts = recipe.encoders.tokenizer()(stamps.caption)
        first: dict[str, int] = {}
        self.ids = torch.tensor([first.setdefault(c.lower(), i) for i, c in enumerate(stamps.caption)])
        self.clips: list[list[int]] = [[] for _ in stamps.caption]
        for i, (stamp, _) in enumerate(stamps.clips):
            self.clips[stamp].append(i)
        parts = [cut_regions(image, recipe.region, recipe.longest) for image in stamps.images]
        self.regions = torch.cat([regions for regions, _ in parts])
        self.positions = torch.cat([positions for _, positions in parts])
        self.region_counts = torch.tensor([len(regions) for regions, _ in parts])

    def train_batches(self, seed: int = 0) -> SampledBatches:
        """Endless augmented batches of the training stamps."""
        rows = self.stamps.split["train"]
        size = min(self.recipe.batch_size, len(rows))
        sampler = BatchSampler([1] * len(rows), batch_size=size, seed=seed, drop_last=True)
        return SampledBatches(sampler, lambda indices, g: self.batch(rows[torch.tensor(indices)], g), seed)

    def batches(self, split: str, size: int = 128) -> Iterator[Batch]:
        """The stamps of a split, in order, as they are."""
        for rows in self.stamps.split[split].split(size):
            yield self.batch(rows)

    def batch(self, rows: Tensor, generator: torch.Generator | None = None) -> Batch:
        """Some stamps; with a generator, augmented: colours, mirroring, and any of the spoken descriptions."""
        inputs = {}
        for name in self.recipe.modalities:
            if name == "image":
                inputs[name] = self._images(rows, generator)
            elif name == "text":
                inputs[name] = text_input(self.texts.select(rows))
            else:
                inputs[name] = audio_input([self._clip(int(row), generator) for row in rows])
        return Batch(inputs, len(rows), self.ids[rows], self.stamps.label[rows], count_tokens(inputs))

    def _clip(self, row: int, generator: torch.Generator | None) -> Tensor:
        choices = self.clips[row]
        if not choices:
            return self.stamps.mel[:0]
        pick = int(torch.randint(len(choices), (), generator=generator)) if generator is not None else 0
        return self.stamps.clip(choices[pick])

    def _images(self, rows: Tensor, generator: torch.Generator | None) -> ImageInput:
        regions, lengths = take_ragged(self.regions, self.region_counts, rows)
        positions, _ = take_ragged(self.positions, self.region_counts, rows)
        pixels = regions.float() / 255
        if generator is not None:
            image = torch.repeat_interleave(lengths)
            pixels = self._shift_colours(pixels, image, len(rows), generator)
            mirrored = (torch.rand(len(rows), generator=generator) < 0.5)[image]
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
            last = torch.zeros(len(rows), dtype=torch.int32).scatter_reduce(0, image, positions[:, 1], "amax")[image]
            column = torch.where(mirrored, last - positions[:, 1], positions[:, 1])
            positions = torch.stack([positions[:, 0], column], 1)
        return ImageInput(normalise(pixels), lengths.int(), positions)

    def _shift_colours(self, pixels: Tensor, image: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """1 - M (1 - x) with M = I + colour * N(0, 1), one M per image: white stays white, as nothing is padded."""
        matrix = torch.eye(3) + self.recipe.colour * torch.randn(count, 3, 3, generator=generator)
        return (1 - torch.einsum("rij,rjhw->rihw", matrix[image], 1 - pixels)).clamp_(0, 1)

    def evaluate(self, model: nn.Module, task: Classification | MultiTask, split: str = "test") -> dict[str, float]:
        """Accuracy, and for a multi-task recipe retrieval between each two modalities, on one split."""
        batches = list(self.batches(split))
        if isinstance(task, Classification):
            return task.evaluate(model, batches)
        out = {}
        for name, part in task.tasks.items():
            if isinstance(part, Classification):
                figures = part.evaluate(model, batches)
            else:
                figures = part.evaluate(model, [self._having(b, (part.first, part.second)) for b in batches])
            out |= {f"{name}/{k}": v for k, v in figures.items()}
        return out

    def _having(self, batch: Batch, names: tuple[str, str]) -> Batch:
        """The samples of a batch that have both modalities (a stamp without a clip is no query for speech)."""
        if "audio" not in names:
            return batch
        keep = batch.inputs["audio"].lengths > 0
        inputs = dict(batch.inputs)
        for name in names:
            inputs[name] = _select(inputs[name], keep)
        return dataclasses.replace(
            batch, inputs={n: inputs[n] for n in names}, size=int(keep.sum()), ids=batch.ids[keep]
        )


def _select(x, keep: Tensor):
    """The samples of an input where `keep` is true."""
    rows = keep.nonzero()[:, 0]
    if isinstance(x, ImageInput):
        regions, lengths = take_ragged(x.regions, x.lengths, rows)
        return ImageInput(regions, lengths, take_ragged(x.positions, x.lengths, rows)[0])
    if hasattr(x, "frames"):
        frames, lengths = take_ragged(x.frames, x.lengths, rows)
        return audio_input(list(frames.split(lengths.tolist())))
    words, lengths = take_ragged(torch.arange(len(x.offsets)), x.lengths, rows)
    sizes = torch.cat([x.offsets, x.offsets.new_tensor([len(x.ids)])]).diff()
    ids, entries = take_ragged(x.ids, sizes, words)
    return type(x)(ids, entries.cumsum(0) - entries, lengths)
