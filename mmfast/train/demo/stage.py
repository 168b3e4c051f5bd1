"""What the demo's stages share: how much they do, data, results, and what an earlier run left."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mmfast.data import EmojiSet, StampSet, load_emoji, load_stamps

LANGUAGES = ("fr",)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything the demo does; counted in steps and seeds, never in seconds.

    Args:
        pretrain_steps, pretrain_batch: of the emoji stage.
        stamps_steps, stamps_seeds: of each run of the stamps stage.
        fusion_steps, fusion_seeds: of each fusion.
        multitask_steps: of each weighting.
        adversarial_steps, adversarial_attacks: steps of the fine-tuning, and of PGD in the test.
        longest: longer side of a stamp in pixels.
        features: also frozen pretrained features, where their packages can be had.
        features_seeds, features_steps: of each head on them.
    """

    pretrain_steps: int = 800
    pretrain_batch: int = 256
    stamps_steps: int = 60
    stamps_seeds: int = 5
    fusion_steps: int = 50
    fusion_seeds: int = 3
    multitask_steps: int = 90
    adversarial_steps: int = 60
    adversarial_attacks: int = 10
    longest: int = 64
    features: bool = True
    features_seeds: int = 5
    features_steps: int = 200


QUICK = Sizes(
    pretrain_steps=60,
    stamps_steps=12,
    stamps_seeds=2,
    fusion_steps=8,
    fusion_seeds=1,
    multitask_steps=8,
    adversarial_steps=8,
    adversarial_attacks=4,
    features=False,
)


class Demo:
    """What the stages share: folder, sizes, data, and the results so far.

    Args:
        out: folder of the demo.
        sizes: how much of everything.
        emoji, stamps: the sets; default those that `mmfast.data` installs.
        show: print progress.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        sizes: Sizes,
        *,
        emoji: EmojiSet | None = None,
        stamps: StampSet | None = None,
        show: bool = True,
    ):
        self.out, self.sizes, self.show = Path(out), sizes, show
        self.out.mkdir(parents=True, exist_ok=True)
        self._emoji, self._stamps = emoji, stamps
        self.results: dict[str, dict] = {}

    @property
    def emoji(self) -> EmojiSet:
        if self._emoji is None:
            self._emoji = load_emoji(progress=self.show)
        return self._emoji

    @property
    def stamps(self) -> StampSet:
        if self._stamps is None:
            self._stamps = load_stamps(speech=True, languages=LANGUAGES, progress=self.show)
        return self._stamps

    def say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    def once(self, name: str, make: Callable[[], dict]) -> dict:
        """The result of `make()`, from `out/name.json` where an earlier call with the same sizes left it.

        "seconds" in the result is the time of `make()`, or of the training of an interrupted stage where that is more.
        """
        path = self.out / f"{name}.json"
        # A stage depends on the sizes named after it, on what the pictures are, and on where the weights come from.
        mine = (name.partition("/")[0], "pretrain", "longest")
        sizes = {k: v for k, v in dataclasses.asdict(self.sizes).items() if k.startswith(mine)}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["sizes"] == sizes:
                return kept["result"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        begin = time.monotonic()
        result = make()
        result["seconds"] = round(max(time.monotonic() - begin, result.get("seconds", 0)), 1)
        if "missing" in result:  # what could not run may run next time
            return result
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        scratch.write_text(json.dumps({"sizes": sizes, "result": result}, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
        return result

    def stage(self, name: str, text: str, make: Callable[[Demo], dict]) -> dict:
        """One stage: see `once`."""
        self.say(f"\n== {text}")
        begin = time.monotonic()
        result = self.results[name] = self.once(name, lambda: make(self))
        took = time.monotonic() - begin
        self.say(
            f"   {took:.0f} s" if took > 1 or result["seconds"] < 2 else f"   done before ({result['seconds']:.0f} s)"
        )
        return result


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one value is NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error
