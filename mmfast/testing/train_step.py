"""A whole train step: mmfast beside the same model in padded PyTorch.

The step is forward (image, byte text and speech encoders), contrastive and classification loss, backward, AdamW. Peers
share the initial parameters and see the same samples: padded to the longest sample of the batch with SDPA, the same
with attention written out, padded in length buckets, and a loop over the samples. Before anything is timed, the losses
of all must agree over several steps in float32. Batch norm uses fixed statistics in all of them: padded regions or
single samples would otherwise change what the model computes.

Batches are synthetic, with lengths as the stamps have them (`mmfast data install stamps`): images of up to 160 x 160
pixels and any aspect, captions of 4 to 180 bytes with a median of 14, clips of 0.3 to 12 s with a median of 1.1 s; or
the stamps themselves; or equal lengths, where packing has nothing to save.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmfast.models import (
    AudioEncoder,
    AudioInput,
    ImageEncoder,
    ImageInput,
    MultimodalModel,
    TextEncoder,
    TextInput,
)
from mmfast.models.stem import FRAMES_PER_TOKEN
from mmfast.testing import machine
from mmfast.testing.bench import interleaved
from mmfast.testing.padded import PaddedModel, pad_input

CLASSES = 16
PEERS = {
    "padded, SDPA": {"parts": 1, "attention": "sdpa"},
    "padded, bmm": {"parts": 1, "attention": "bmm"},
    "4 buckets, SDPA": {"parts": 4, "attention": "sdpa"},
    "4 buckets, bmm": {"parts": 4, "attention": "bmm"},
    "loop over samples": {"parts": None, "attention": "sdpa"},
}


def ragged_batch(samples: int, seed: int, size: int = 32, largest: int = 5) -> tuple[dict, Tensor]:
    """Inputs by modality and class labels int64 `[B]`, with the lengths of the stamps (see the module's docstring)."""
    g = torch.Generator().manual_seed(seed)

    def spread(median: float, sigma: float, low: int, high: int) -> Tensor:
        x = median * torch.exp(sigma * torch.randn(samples, generator=g))
        return x.round().clamp(low, high).to(torch.int32)

    rows, columns = spread(4.2, 0.5, 1, largest), spread(4.2, 0.5, 1, largest)
    image_lengths = rows * columns
    positions = torch.cat([torch.cartesian_prod(torch.arange(r), torch.arange(c)) for r, c in zip(rows, columns)])
    text_lengths = spread(14, 0.75, 4, 180)
    ids = torch.randint(0, 256, (int(text_lengths.sum()),), generator=g)
    heard = torch.rand(samples, generator=g) < 0.97
    frame_lengths = torch.where(heard, spread(112, 0.55, 34, 1156), 0).to(torch.int32)
    inputs = {
        "image": ImageInput(
            torch.randn(int(image_lengths.sum()), 3, size, size, generator=g),
            image_lengths,
            positions.view(-1, 2).to(torch.int32),
        ),
        "text": TextInput(ids, torch.arange(ids.shape[0]), text_lengths),
        "audio": _audio(torch.randn(int(frame_lengths.sum()), 80, generator=g), frame_lengths),
    }
    return inputs, torch.randint(0, CLASSES, (samples,), generator=g)


def _audio(frames: Tensor, lengths: Tensor) -> AudioInput:
    return AudioInput(frames, lengths, int(((lengths + FRAMES_PER_TOKEN - 1) // FRAMES_PER_TOKEN).sum()))


def stamp_batches(samples: int, count: int, size: int = 32) -> list[tuple[dict, Tensor]]:
    """Real stamps at native size up to 160 px, English captions as bytes, French speech; installs the set at first."""
    from torch.nn.functional import interpolate

    from mmfast.data import load_stamps

    stamps = load_stamps(speech=True, languages=("fr",))
    clip_of = {stamp: i for i, (stamp, _) in enumerate(stamps.clips)}
    order = torch.randperm(len(stamps.images), generator=torch.Generator().manual_seed(0))
    batches = []
    for chosen in order.split(samples)[:count]:
        regions, positions, texts, frames = [], [], [], []
        for i in chosen.tolist():
            image = stamps.images[i].float() / 255
            grid = [max(round(side / size), 1) for side in image.shape[1:]]
            image = interpolate(image[None], [n * size for n in grid], mode="bilinear", antialias=True)[0]
            cut = image.unflatten(2, (-1, size)).unflatten(1, (-1, size))
            regions.append((cut.permute(1, 3, 0, 2, 4).flatten(0, 1) - 0.5) * 4)
            positions.append(torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 2))
            texts.append(torch.tensor(list(stamps.caption[i].encode())))
            frames.append(stamps.clip(clip_of[i]).float() if i in clip_of else torch.zeros(0, 80))
        text_lengths = torch.tensor([len(x) for x in texts], dtype=torch.int32)
        ids = torch.cat(texts)
        inputs = {
            "image": ImageInput(
                torch.cat(regions),
                torch.tensor([len(x) for x in regions], dtype=torch.int32),
                torch.cat(positions).to(torch.int32),
            ),
            "text": TextInput(ids, torch.arange(len(ids)), text_lengths),
            "audio": _audio(torch.cat(frames), torch.tensor([len(x) for x in frames], dtype=torch.int32)),
        }
        batches.append((inputs, stamps.label[chosen]))
    return batches


def equal_batch(samples: int, seed: int, size: int = 32) -> tuple[dict, Tensor]:
    """The same with equal lengths: nothing for packing to save."""
    g = torch.Generator().manual_seed(seed)
    positions = torch.cartesian_prod(torch.arange(3), torch.arange(3)).repeat(samples, 1).to(torch.int32)
    lengths = torch.full((samples,), 9, dtype=torch.int32)
    inputs = {
        "image": ImageInput(torch.randn(9 * samples, 3, size, size, generator=g), lengths, positions),
        "text": TextInput(
            torch.randint(0, 256, (20 * samples,), generator=g),
            torch.arange(20 * samples),
            torch.full((samples,), 20, dtype=torch.int32),
        ),
        "audio": _audio(torch.randn(128 * samples, 80, generator=g), torch.full((samples,), 128, dtype=torch.int32)),
    }
    return inputs, torch.randint(0, CLASSES, (samples,), generator=g)


class Learner(nn.Module):
    """The model, a classifier over the joined pooled vectors, and the losses."""

    def __init__(self, dim: int = 192, heads: int = 6, stem: tuple[int, ...] = (32, 64, 128, 192)):
        super().__init__()
        encoders = {
            "image": ImageEncoder(dim, 2, heads, stem_widths=stem),
            "text": TextEncoder(dim, 1, heads, vocab=256),
            "audio": AudioEncoder(dim, 2, heads),
        }
        self.model = MultimodalModel(encoders, dim, dim)
        self.classifier = nn.Linear(3 * dim, CLASSES)

    def fix_statistics(self, inputs: dict) -> None:
        """Batch norm statistics of one batch, then fixed; scale and shift still learn."""
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            self.model({name: x.to(self.classifier.weight.device) for name, x in inputs.items()})
        for norm in norms:
            norm.eval()

    def loss(self, pooled: dict[str, Tensor], here: dict[str, Tensor], labels: Tensor) -> Tensor:
        """InfoNCE image-text and audio-text over the samples that have both, and cross-entropy of the classes."""
        scale = self.model.logit_scale.exp()
        vectors = {name: self.model.project(name, x) for name, x in pooled.items()}
        total = cross_entropy(self.classifier(torch.cat(list(pooled.values()), 1)), labels)
        for name in ("image", "audio"):
            rows = here[name].nonzero()[:, 0]
            logits = scale * vectors[name][rows] @ vectors["text"][rows].T
            target = torch.arange(rows.shape[0], device=rows.device)
            total = total + (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        return total


class Contender:
    """One way to run the step, where the learner is: `step(i)` trains on batch i and returns the loss."""

    def __init__(self, learner: Learner, batches: list, parts: int | None = 0, attention: str = "", bf16: bool = False):
        self.learner, self.bf16 = copy.deepcopy(learner), bf16
        self.optimizer = torch.optim.AdamW(self.learner.parameters(), lr=3e-4, weight_decay=0.05, fused=True)
        # With a short warm-up rounding alone drives even the padded peers apart: 1e-4 after 20 steps, SDPA against bmm.
        self.warmup = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: min(1, (i + 1) / 1000))
        self.packed = parts == 0
        self.peer = None if self.packed else PaddedModel(self.learner.model, attention)
        self.device = next(self.learner.parameters()).device
        self.batches = []
        for inputs, labels in batches:
            here = {name: x.lengths > 0 for name, x in inputs.items()}
            ours = inputs if self.packed else {name: pad_input(x, parts) for name, x in inputs.items()}
            ours = {
                name: x.to(self.device) if self.packed else [part.to(self.device) for part in x]
                for name, x in ours.items()
            }
            here = {name: x.to(self.device) for name, x in here.items()}
            self.batches.append((ours, here, labels.to(self.device)))

    def step(self, i: int) -> float:
        inputs, here, labels = self.batches[i % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            pooled = self.learner.model(inputs) if self.packed else self.peer(inputs, labels.shape[0])
            loss = self.learner.loss(pooled, here, labels)
        loss.backward()
        self.optimizer.step()
        self.warmup.step()
        return loss.item()


def contenders(batches: list, learner: Learner, names: list[str] | None = None, bf16: bool = False) -> dict:
    """mmfast and its peers, by name."""
    chosen = {name: options for name, options in PEERS.items() if names is None or name in names}
    return {
        "mmfast": Contender(learner, batches, bf16=bf16),
        **{name: Contender(learner, batches, **options, bf16=bf16) for name, options in chosen.items()},
    }


def check_agreement(runs: dict, steps: int, tolerance: float = 1e-5) -> dict:
    """Trains all on the same batches; raises where a loss differs by more than `tolerance`, relative.

    Returns:
        "steps", "worst_relative_difference", and under "losses" every curve.
    """
    losses: dict[str, list[float]] = {name: [] for name in runs}
    worst = 0.0
    for i in range(steps):
        for name, run in runs.items():
            losses[name].append(run.step(i))
        expected = losses["padded, SDPA"][-1]
        for name, curve in losses.items():
            error = abs(curve[-1] - expected) / abs(expected)
            worst = max(worst, error)
            if not error <= tolerance:
                raise AssertionError(
                    f"step {i}: loss of {name} is {curve[-1]:.8f}, expected {expected:.8f}: {error:.1e}"
                )
    return {"steps": steps, "worst_relative_difference": worst, "losses": losses}


def padding_share(batches: list) -> dict[str, float]:
    """Share of padded tokens in a padded batch, by modality."""
    share = {}
    for name in batches[0][0]:
        masks = [pad_input(inputs[name])[0].mask for inputs, _ in batches]
        share[name] = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    return share


LENGTHS = ("ragged", "equal", "stamps")


def make_batches(lengths: str, samples: int, count: int) -> list:
    if lengths == "stamps":
        return stamp_batches(samples, count)
    return [(equal_batch if lengths == "equal" else ragged_batch)(samples, seed) for seed in range(count)]


def run(
    lengths: str = "ragged",
    *,
    samples: int = 32,
    rounds: int = 9,
    steps: int = 32,
    bf16: Sequence[bool] = (False,),
    quick: bool = False,
    device: torch.device | str = "cpu",
    learner: Callable[[], Learner] = Learner,
    tolerance: float = 1e-5,
) -> list[dict]:
    """The whole comparison, for float32 or bfloat16 autocast or both; the losses are compared once, in float32.

    Each step reads its loss, so that the host's clock is right on a GPU too.
    """
    torch.manual_seed(0)
    if quick:
        samples, rounds = min(samples, 8), 3
    batches = make_batches(lengths, samples, 2 if quick else 4)
    learner = learner().to(device)
    learner.fix_statistics(batches[0][0])
    agreement = check_agreement(contenders(batches, learner), steps, tolerance)
    results = []
    for autocast in bf16:
        ways = {name: _steps(way) for name, way in contenders(batches, learner, bf16=autocast).items()}
        times = interleaved(ways, seconds=0, rounds=(rounds, rounds))
        results.append(
            {
                "batches": lengths if lengths == "stamps" else f"{lengths} lengths",
                "threads": torch.get_num_threads(),
                "dtype": "bf16 autocast" if autocast else "fp32",
                "samples": samples,
                "padding": padding_share(batches),
                "losses_agree": agreement,
                "step": {name: {"wall_ms": 1e3 * statistics.median(t)} for name, t in times.items()},
                "rounds": times,
            }
        )
    return results


def _steps(way: Contender) -> Callable[[], float]:
    """One step on the next batch with each call."""
    count = iter(range(1 << 30))
    return lambda: way.step(next(count))


def ratios_of(result: dict) -> dict[str, float]:
    """How many times as long as mmfast each takes."""
    return {name: t["wall_ms"] / result["step"]["mmfast"]["wall_ms"] for name, t in result["step"].items()}


def show(result: dict) -> str:
    """One comparison as a few lines."""
    padding = ", ".join(f"{name} {share:.0%}" for name, share in result["padding"].items())
    agree, ratios = result["losses_agree"], ratios_of(result)
    lines = [
        f"train step, {result['samples']} samples, {result['batches']}, {result['dtype']}; padding: {padding}",
        f"losses agree over {agree['steps']} steps within {agree['worst_relative_difference']:.1e} (fp32)",
        *(f"  {name:20} {t['wall_ms']:8.1f} ms {ratios[name]:5.2f}x" for name, t in result["step"].items()),
    ]
    return "\n".join(lines)


def markdown(results: Sequence[dict]) -> str:
    """One table: a row for each comparison."""
    names = list(results[0]["step"])
    lines = [f"| train step | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for result in results:
        cells = []
        for name, ratio in ratios_of(result).items():
            cell = f"{result['step'][name]['wall_ms']:.0f} ms"
            cells.append(
                cell if name == "mmfast" else f"{cell}, {ratio:.2f}x" if ratio >= 1 else f"{cell}, **{ratio:.2f}x**"
            )
        what = f"{result['samples']} samples, {result['batches']}, {result['dtype']}"
        lines.append(f"| {what} | {' | '.join(cells)} |")
    agree = results[0]["losses_agree"]
    text = (
        f"The losses of all agree over {agree['steps']} steps within {agree['worst_relative_difference']:.1e} (fp32)."
    )
    return "\n".join([*lines, "", text]) + "\n"


def suite(folder: Path, quick: bool) -> int:
    """`mmfast bench --suite train`: ragged and equal lengths, float32 and bfloat16."""
    results = []
    for lengths in LENGTHS[:2]:
        for result in run(lengths, bf16=(False, True), quick=quick):
            print(show(result), flush=True)
            results.append(result)
    text = markdown(results)
    whole = machine.describe() | {"suite": "train", "quick": quick, "comparisons": results}
    (folder / "train.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "train.md").write_text(text)
    slower = [
        f"slower than {name}, {ratio:.2f}x: {result['batches']}, {result['dtype']}"
        for result in results
        for name, ratio in ratios_of(result).items()
        if ratio < 1
    ]
    print("\nWhat we lose:", *(slower or ["slower than a peer: nowhere"]), sep="\n  ")
    print(f"\nwrote {folder / 'train.json'}, {folder / 'train.md'}")
    return 0
