"""The demo's table: our figures, what chance and majority give, the target, and a plain baseline beside."""

from __future__ import annotations

import dataclasses
import math

# Plain PyTorch on two cores, measured once on the same pictures with nearly the same splits (1,565 training concepts).
PLAIN = {
    "emoji": "58.3 small CNN; 43.8 this recipe",
    "concepts": "14.1 small CNN; 9.1 this recipe",
    "scratch": "44.5 small CNN",
    "pretrained": "49.8 small CNN",
    "fusion": "82.9 frozen EfficientNet + MiniLM",
    "retrieval": "22.2 frozen EfficientNet + MiniLM",
    "fgsm clean": "19.9 small CNN",
    "fgsm trained": "36.0 small CNN",
}
TARGET_ARTIST = 45.0
TARGET_PADDED = 1.5
TARGET_FUSION = 82.9


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; numbers in percent, None where a column says nothing.

    Args:
        what: the figure. ours, error: its value and standard error.
        chance, majority: what guessing, and naming the largest class, give.
        plain: plain PyTorch's figure, with the name of what it was.
        target: what was aimed at, in words. met: whether it is reached; None: no target.
    """

    what: str
    ours: float
    error: float | None = None
    chance: float | None = None
    majority: float | None = None
    plain: str = ""
    target: str = ""
    met: bool | None = None
    unit: str = "%"

    def figure(self) -> str:
        error = f" ± {self.error:.1f}" if self.error is not None and math.isfinite(self.error) else ""
        return f"{self.ours:.1f}{error}{self.unit if self.unit != '%' else ''}"


def table(results: dict[str, dict], *, verdicts: bool = True) -> list[Row]:
    """The rows of the stages that ran; without `verdicts` (a quick run) targets are named, but not judged."""
    rows = []
    if "pretrain" in results:
        rows += _emoji(results["pretrain"]["scores"])
    if "stamps" in results:
        rows += _stamps(results["stamps"])
    if "fusion" in results:
        majority = results.get("stamps", {}).get("majority")
        for name, (mean, error) in results["fusion"]["summary"].items():
            rows.append(Row(f"stamps, 16 classes: {name}", mean, error, 100 / 16, majority))
    if "features" in results and "missing" not in results["features"]:
        rows += _features(results["features"])
    if "multitask" in results:
        rows += _multitask(results["multitask"])
    if "adversarial" in results:
        rows += _adversarial(results["adversarial"])
    if "speed" in results and "missing" not in results["speed"]:
        rows += _speed(results["speed"]["figures"]["step"])
    return rows if verdicts else [dataclasses.replace(row, met=None) for row in rows]


def _emoji(scores: dict) -> list[Row]:
    def row(test: str, k: str, **more) -> Row:
        at = f"{test}/image->text"
        candidates = int(scores[f"{at} candidates"])
        chance = scores[f"{at} chance R@1"] * int(k.removeprefix("R@"))
        return Row(f"emoji, {test}, {candidates:,} candidates: {k}", scores[f"{at} {k}"], chance=chance, **more)

    best = scores["held-out artist/image->text R@1"]
    return [
        row("held-out artist", "R@1", plain=PLAIN["emoji"], target=f">= {TARGET_ARTIST:g}", met=best >= TARGET_ARTIST),
        row("held-out artist", "R@5"),
        row("held-out concepts", "R@1", plain=PLAIN["concepts"]),
        row("held-out concepts", "R@5"),
    ]


def _stamps(result: dict) -> list[Row]:
    gain, error = result["gain"]
    known = {"chance": result["chance"], "majority": result["majority"]}
    met = bool(gain > 2 * error) if math.isfinite(error) else None
    return [
        Row("stamps, 16 classes, image: from scratch", *result["summary"]["scratch"], **known, plain=PLAIN["scratch"]),
        Row(
            "stamps, 16 classes, image: from emoji",
            *result["summary"]["pretrained"],
            **known,
            plain=PLAIN["pretrained"],
        ),
        Row("... gain of the same seeds", gain, error, target="> 2 standard errors", met=met, unit=" points"),
    ]


def _features(result: dict) -> list[Row]:
    rows = []
    known = {"chance": result["chance"], "majority": result["majority"]}
    singles = {"image": "73.0 linear head", "caption": "79.7 linear head"}
    for name, (mean, error) in result["summary"].items():
        goal = {"target": f">= {TARGET_FUSION:g}", "met": mean >= TARGET_FUSION} if name == result["chosen"] else {}
        plain = singles.get(name, PLAIN["fusion"])
        rows.append(Row(f"stamps, frozen features: {name}", mean, error, **known, plain=plain, **goal))
    return rows


def _multitask(result: dict) -> list[Row]:
    rows = []
    for weighting in ("equal", "uncertainty"):
        scores = result[weighting]["scores"]
        rows.append(
            Row(
                f"multi-task ({weighting} weights): 16 classes",
                scores["classes/accuracy"],
                chance=scores["classes/chance"],
                majority=scores["classes/majority"],
            )
        )
        for task, direction, plain in (
            ("image-text", "image->text", PLAIN["retrieval"]),
            ("text-audio", "audio->text", ""),
        ):
            at = f"{task}/{direction}"
            chance = scores[f"{at} chance R@1"]
            if task == "text-audio" and result.get("length_only"):
                plain = f"{result['length_only']['R@1']:.1f} clip length alone"
            rows.append(
                Row(f"multi-task ({weighting}): {direction} R@1", scores[f"{at} R@1"], chance=chance, plain=plain)
            )
    return rows


def _adversarial(result: dict) -> list[Row]:
    rows = []
    for kind in ("clean", "adversarial"):
        for name, value in result[kind]["accuracy"].items():
            under = "unattacked" if name == "clean" else f"under {name}, {result['eps']}/255"
            plain = PLAIN["fgsm clean" if kind == "clean" else "fgsm trained"] if name == "FGSM" else ""
            rows.append(Row(f"stamps, {kind} fine-tuning: {under}", value, plain=plain))
    return rows


def _speed(step: dict[str, dict]) -> list[Row]:
    """Time of the quickest peer of each kind over ours."""
    rows = []
    for what, name, target in (
        ("padded", "padded", TARGET_PADDED),
        ("padded in length buckets", "buckets", 1.0),
        ("loop over samples", "loop", None),
    ):
        slower = min(t["wall_ms"] for peer, t in step.items() if name in peer) / step["mmfast"]["wall_ms"]
        goal = {} if target is None else {"target": f">= {target:g}x", "met": slower >= target}
        rows.append(Row(f"train step: plain PyTorch, {what}, takes", slower, unit=" times ours", **goal))
    return rows


COLUMNS = ("figure", "ours", "chance", "majority", "plain PyTorch", "target")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of `COLUMNS`."""
    number = lambda v: "" if v is None else f"{v:.2g}" if v < 1 else f"{v:.1f}"  # noqa: E731
    verdict = {True: ", reached", False: ", MISSED", None: ""}[row.met]
    return (row.what, row.figure(), number(row.chance), number(row.majority), row.plain, row.target + verdict)


def as_text(rows: list[Row]) -> str:
    """The table for a terminal."""
    body = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in body) for i in range(len(COLUMNS))]

    def text(line):
        return "  ".join(v.ljust(w) if i in (0, 4, 5) else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths)))

    return "\n".join(
        ["", text(COLUMNS).rstrip(), "-" * (sum(widths) + 10), *(text(line).rstrip() for line in body[1:])]
    )
