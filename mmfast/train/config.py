"""What a training run is made of: the numbers, in one place, readable and writable as JSON."""

from __future__ import annotations

import dataclasses

SCHEDULES = ("cosine", "linear", "constant")
AMP = ("auto", "bf16", "off")
NONFINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of `mmfast.train.Trainer`.

    Args:
        steps: optimiser steps of the whole run. A run is measured in steps, never in seconds, so that its result does
            not depend on how busy the machine is.
        lr: peak learning rate of AdamW.
        weight_decay: on matrices and tables; norms, biases and single numbers have none.
        betas, eps: of AdamW.
        warmup: steps of linear warm-up from 0 to `lr`.
        schedule: "cosine" or "linear" from `lr` down to `lr * final_lr`, or "constant".
        final_lr: share of `lr` at the last step.
        clip: largest global gradient norm; 0 does not clip.
        amp: "bf16" computes under autocast, "off" in float32, "auto" takes bf16 where the machine has it in hardware.
        seed: of batches, augmentation and dropout.
        ema: decay of an exponential moving average of the weights, used by `evaluate`; 0 keeps none.
        compile: run the model through torch.compile.
        nonfinite: what a loss or gradient of NaN or infinity does: "stop" ends the run with an error that names the
            step and leaves the last checkpoint; "skip" leaves that step's update out and counts it.
        max_skips: with "skip", the most steps left out in a row before the run stops all the same.
        checkpoint_every: steps between checkpoints; 0 writes one at the end only.
        keep: how many of the last checkpoints stay.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations; 0 evaluates not at all during training.
        tensorboard: also write TensorBoard events.
    """

    steps: int
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: int = 0
    schedule: str = "cosine"
    final_lr: float = 0.0
    clip: float = 1.0
    amp: str = "auto"
    seed: int = 0
    ema: float = 0.0
    compile: bool = False
    nonfinite: str = "stop"
    max_skips: int = 10
    checkpoint_every: int = 0
    keep: int = 2
    log_every: int = 10
    eval_every: int = 0
    tensorboard: bool = False

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        self._expect("steps", self.steps >= 1, "at least 1")
        self._expect("lr", self.lr > 0, "a positive number")
        self._expect("weight_decay", self.weight_decay >= 0, "0 or more")
        self._expect("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._expect("warmup", 0 <= self.warmup <= self.steps, f"0 to steps = {self.steps}")
        self._expect("schedule", self.schedule in SCHEDULES, "one of " + ", ".join(SCHEDULES))
        self._expect("final_lr", 0 <= self.final_lr <= 1, "a share between 0 and 1")
        self._expect("clip", self.clip >= 0, "0 (off) or more")
        self._expect("amp", self.amp in AMP, "one of " + ", ".join(AMP))
        self._expect("ema", 0 <= self.ema < 1, "a decay in [0, 1)")
        self._expect("nonfinite", self.nonfinite in NONFINITE, "one of " + ", ".join(NONFINITE))
        self._expect("keep", self.keep >= 1, "at least 1")
        self._expect("log_every", self.log_every >= 1, "at least 1")
        for name in ("max_skips", "checkpoint_every", "eval_every"):
            self._expect(name, getattr(self, name) >= 0, "0 or more")

    def _expect(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"TrainConfig: {name} is {getattr(self, name)!r}, expected {expected}")

    def to_json(self) -> dict:
        """The settings as plain JSON values."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_json(cls, values: dict) -> TrainConfig:
        """The settings from `to_json`'s values.

        Raises:
            ValueError: an unknown setting.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"TrainConfig: unknown settings {', '.join(unknown)}; expected some of {sorted(known)}")
        return cls(**values)
