"""A whole train step on ragged batches: mmfast beside the same model in padded PyTorch.

    python benchmarks/bench_train_step.py [--quick] [--json FILE] [--bf16] [--stamps | --equal] [--threads N]

The step is forward (image, byte text and speech encoders), contrastive and classification loss, backward, AdamW. Peers
share the initial parameters and see the same samples: padded to the longest sample of the batch with SDPA, the same
with attention written out, padded in length buckets, and a loop over the samples. Before anything is timed, the losses
of all must agree over several steps in float32. Batch norm uses fixed statistics in all of them: padded regions or
single samples would otherwise change what the model computes.

Batches are synthetic, with lengths as the stamps have them (`mmfast data install stamps`): images of up to 160 x 160
pixels and any aspect, captions of 4 to 180 bytes with a median of 14, clips of 0.3 to 12 s with a median of 1.1 s.
`--stamps` takes the stamps themselves; `--equal` equal lengths, where packing has nothing to save.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent))

from padded import PaddedModel, pad_input

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
            self.model(inputs)
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
            target = torch.arange(rows.shape[0])
            total = total + (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        return total


class Contender:
    """One way to run the step: `step(i)` trains on batch i and returns the loss."""

    def __init__(self, learner: Learner, batches: list, parts: int | None = 0, attention: str = "", bf16: bool = False):
        self.learner, self.bf16 = copy.deepcopy(learner), bf16
        self.optimizer = torch.optim.AdamW(self.learner.parameters(), lr=3e-4, weight_decay=0.05, fused=True)
        # With a short warm-up rounding alone drives even the padded peers apart: 1e-4 after 20 steps, SDPA against bmm.
        self.warmup = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: min(1, (i + 1) / 1000))
        self.packed = parts == 0
        self.peer = None if self.packed else PaddedModel(self.learner.model, attention)
        self.batches = []
        for inputs, labels in batches:
            here = {name: x.lengths > 0 for name, x in inputs.items()}
            ours = inputs if self.packed else {name: pad_input(x, parts) for name, x in inputs.items()}
            self.batches.append((ours, here, labels))

    def step(self, i: int) -> float:
        inputs, here, labels = self.batches[i % len(self.batches)]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
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


def check_agreement(runs: dict, steps: int, tolerance: float = 1e-5) -> float:
    """Trains all on the same batches; raises where a loss differs by more than `tolerance`, relative."""
    worst = 0.0
    for i in range(steps):
        losses = {name: run.step(i) for name, run in runs.items()}
        expected = losses["padded, SDPA"] if "padded, SDPA" in losses else losses["mmfast"]
        for name, loss in losses.items():
            error = abs(loss - expected) / abs(expected)
            worst = max(worst, error)
            if not error <= tolerance:
                raise AssertionError(f"step {i}: loss of {name} is {loss:.8f}, expected {expected:.8f} ({error:.1e})")
    return worst


def measure(runs: dict, rounds: int) -> dict[str, dict]:
    """Interleaved medians of the step: wall time and CPU time of the process, in ms."""
    times = {name: ([], []) for name in runs}
    for run in runs.values():
        run.step(0)
    for i in range(rounds):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run.step(i)
            times[name][0].append(1e3 * (time.perf_counter() - wall))
            times[name][1].append(1e3 * (time.process_time() - cpu))
    return {
        name: {"wall_ms": statistics.median(wall), "cpu_ms": statistics.median(cpu), "best_wall_ms": min(wall)}
        for name, (wall, cpu) in times.items()
    }


def padding_share(batches: list) -> dict[str, float]:
    """Share of padded tokens in a padded batch, by modality."""
    share = {}
    for name in batches[0][0]:
        masks = [pad_input(inputs[name])[0].mask for inputs, _ in batches]
        share[name] = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    return share


def run(
    samples: int = 32,
    rounds: int = 9,
    steps: int = 8,
    bf16: bool = False,
    quick: bool = False,
    equal: bool = False,
    stamps: bool = False,
) -> dict:
    """The whole comparison; returns what is printed."""
    torch.manual_seed(0)
    if quick:
        samples, rounds, steps = min(samples, 8), 3, 3
    count = 2 if quick else 4
    if stamps:
        batches = stamp_batches(samples, count)
    else:
        batches = [(equal_batch if equal else ragged_batch)(samples, seed) for seed in range(count)]
    learner = Learner()
    learner.fix_statistics(batches[0][0])
    agreement = check_agreement(contenders(batches, learner), steps)
    runs = contenders(batches, learner, bf16=bf16)
    return {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "batches": "stamps" if stamps else "equal lengths" if equal else "ragged lengths",
        "samples": samples,
        "rounds": rounds,
        "padding": padding_share(batches),
        "losses_agree": {"steps": steps, "worst_relative_difference": agreement},
        "step": measure(runs, rounds),
    }


@pytest.mark.parametrize("name", ["mmfast", *PEERS])
@pytest.mark.parametrize("lengths", ["ragged", "equal"])
def test_train_step(benchmark, name, lengths):
    """One train step of 16 samples; the losses of this way and the padded one agree first."""
    benchmark.group = f"train step, {lengths} lengths"
    torch.manual_seed(0)
    batches = [(equal_batch if lengths == "equal" else ragged_batch)(16, seed) for seed in range(2)]
    learner = Learner()
    learner.fix_statistics(batches[0][0])
    check_agreement(contenders(batches, learner, ["padded, SDPA", name]), 2)
    runs = contenders(batches, learner, [name])
    benchmark.extra_info["padding"] = padding_share(batches)
    benchmark.pedantic(lambda: runs[name].step(0), rounds=7, warmup_rounds=2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="samples of a batch")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each")
    parser.add_argument("--steps", type=int, default=8, help="steps over which the losses must agree")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--bf16", action="store_true", help="time under bfloat16 autocast")
    parser.add_argument("--equal", action="store_true", help="equal lengths: nothing to save")
    parser.add_argument("--stamps", action="store_true", help="real stamps instead of synthetic batches")
    parser.add_argument("--quick", action="store_true", help="few small steps: does it run?")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    options = vars(parser.parse_args(argv))
    threads, file = options.pop("threads"), options.pop("json")
    if threads:
        torch.set_num_threads(threads)
    result = run(**options)
    padding = ", ".join(f"{name} {share:.0%}" for name, share in result["padding"].items())
    print(f"{result['samples']} samples, {result['batches']}, {result['dtype']}, {result['threads']} threads")
    print(f"padding: {padding}")
    agree = result["losses_agree"]
    print(f"losses agree over {agree['steps']} steps within {agree['worst_relative_difference']:.1e}")
    ours = result["step"]["mmfast"]
    for name, t in result["step"].items():
        ratio, cpu = t["wall_ms"] / ours["wall_ms"], t["cpu_ms"] / ours["cpu_ms"]
        print(f"{name:20} {t['wall_ms']:8.1f} ms wall ({ratio:4.2f}x)  {t['cpu_ms']:8.1f} ms CPU ({cpu:4.2f}x)")
    if file:
        Path(file).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
