"""The training loop, to be read from top to bottom: `Trainer.fit`."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mmfast.train import checkpoint as ckpt
from mmfast.train.config import TrainConfig
from mmfast.train.logs import RunLog, read_log
from mmfast.train.optim import WeightAverage, autocast, learning_rate, parameter_groups
from mmfast.train.progress import Progress


class Batches(Protocol):
    """An endless source of batches whose position can be saved. A batch has `size` (samples), `tokens` and `to()`."""

    def __next__(self) -> Any: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class NonFiniteLoss(RuntimeError):
    """A loss or gradient was NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; its state is saved, and the message says how to go on."""


class Trainer:
    """Trains a model on a task.

    Args:
        model: any module that the task understands.
        task: has `loss(model, batch) -> (loss, dict of figures)`; where it is a module (a classification head, learned
            task weights), its parameters are trained and saved too.
        batches: see `Batches`.
        config: the numbers.
        out: folder of the run: `log.jsonl` and `checkpoints/`; None keeps nothing.
        recipe: JSON values that say how to build model, task and data again; kept in every checkpoint.
        evaluate: `evaluate(model) -> dict of figures`, called every `config.eval_every` steps, on averaged weights
            where there are any.
        device: where to train; default the model's own.
        text: name in the progress bar.
        show: print progress.

    `step`, `skipped` and `seconds` (of training alone, over all parts of an interrupted run) say where it stands.

    Two runs with equal arguments, and a run interrupted and resumed any number of times, give the same bits on the
    same machine and thread count.
    """

    def __init__(
        self,
        model: nn.Module,
        task,
        batches: Batches,
        config: TrainConfig,
        out: str | os.PathLike | None = None,
        *,
        recipe: dict | None = None,
        evaluate: Callable[[nn.Module], dict] | None = None,
        device: torch.device | str | None = None,
        text: str = "train",
        show: bool = True,
    ):
        if not hasattr(task, "loss"):
            raise TypeError(f"Trainer: task is {type(task).__name__}, expected an object with loss(model, batch)")
        self.model, self.task, self.batches, self.config = model, task, batches, config
        self.out = None if out is None else Path(out)
        self.recipe, self.evaluate, self.text, self.show = recipe or {}, evaluate, text, show
        self.device = torch.device(device) if device is not None else _device_of(model)
        self.modules = {"model": model} | ({"task": task} if isinstance(task, nn.Module) else {})
        for module in self.modules.values():
            module.to(self.device)
        self.names = {p: f"{prefix}.{n}" for prefix, m in self.modules.items() for n, p in m.named_parameters()}
        if not self.names:
            raise ValueError("Trainer: the model has no parameters, expected at least one")
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.modules.values(), config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.ema = {name: WeightAverage(m, config.ema) for name, m in self.modules.items()} if config.ema else {}
        self.step = 0
        self.skipped = 0
        self.seconds = 0.0

    def fit(self, *, resume: bool = True) -> list[dict]:
        """Train to `config.steps` and return the log's lines.

        Args:
            resume: continue from the last checkpoint in `out`, if there is one; False starts anew.

        Raises:
            NonFiniteLoss: see `TrainConfig.nonfinite`.
            Interrupted: after Ctrl-C or SIGTERM; a checkpoint of the step is written first.
            CheckpointError: a checkpoint cannot be read or written (a full disk, for one).
        """
        config, model, parameters = self.config, self.model, list(self.names)
        torch.manual_seed(config.seed)
        if resume:
            self.resume()
        log = RunLog(self.out, self.step, tensorboard=config.tensorboard) if self.out else None
        if config.compile:
            model.compile()
        for module in self.modules.values():
            module.train()

        lines: list[dict] = []
        skips_in_row = 0
        samples = tokens = 0
        busy = 0.0
        with (
            _stop_signals() as stop,
            Progress(config.steps, self.text, start=self.step, show=self.show) as progress,
            contextlib.closing(log) if log else contextlib.nullcontext(),
        ):
            while self.step < config.steps:
                begin = time.perf_counter()
                lr = learning_rate(config, self.step)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr

                batch = next(self.batches).to(self.device)
                with autocast(config.amp, self.device):
                    loss, figures = self.task.loss(model, batch)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)

                if math.isfinite(loss.item()) and math.isfinite(norm.item()):
                    self.optimizer.step()
                    for name, average in self.ema.items():
                        average.update(self.modules[name])
                    skips_in_row = 0
                else:
                    self.skipped += 1
                    skips_in_row += 1
                    if config.nonfinite == "stop" or skips_in_row > config.max_skips:
                        raise NonFiniteLoss(self._nonfinite(loss.item(), norm.item(), lr, skips_in_row))
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1

                samples += batch.size
                tokens += batch.tokens
                busy += time.perf_counter() - begin
                self.seconds += time.perf_counter() - begin
                last = self.step == config.steps
                progress.update(loss=loss.item(), **{"samples/s": samples / busy})
                if self.step % config.log_every == 0 or last:
                    line = {"loss": loss.item(), **_numbers(figures), "lr": lr, "grad_norm": norm.item()}
                    line |= {"samples_per_s": samples / busy, "tokens_per_s": tokens / busy, "skipped": self.skipped}
                    if log:
                        log.write(self.step, **line)
                    lines.append({"step": self.step, **line})
                    samples = tokens = 0
                    busy = 0.0
                if self.evaluate and config.eval_every and (self.step % config.eval_every == 0 or last):
                    scores = {f"eval/{k}": v for k, v in self.run_evaluation().items()}
                    if log:
                        log.write(self.step, **scores)
                    lines.append({"step": self.step, **scores})
                due = config.checkpoint_every and self.step % config.checkpoint_every == 0
                if self.out and (due or last or stop):
                    self.save()
                if stop and not last:
                    raise Interrupted(self._how_to_go_on())
        return read_log(self.out) if self.out else lines

    def run_evaluation(self) -> dict:
        """The figures of `evaluate`, under `evaluating`."""
        with self.evaluating():
            return self.evaluate(self.model)

    @contextlib.contextmanager
    def evaluating(self):
        """Within the context model and task are in eval mode, have the averaged weights, where there are any, and
        compute in the training's precision without gradients.
        """
        training = {name: module.training for name, module in self.modules.items()}
        with contextlib.ExitStack() as stack:
            for name, average in self.ema.items():
                stack.enter_context(average.swapped_in(self.modules[name]))
            for module in self.modules.values():
                module.eval()
            stack.enter_context(torch.no_grad())
            stack.enter_context(autocast(self.config.amp, self.device))
            try:
                yield
            finally:
                for name, module in self.modules.items():
                    module.train(training[name])

    # Checkpoints

    def save(self) -> Path:
        """Write a checkpoint of this step.

        Its model tensors are the ones to use: the averaged ones, where there are any; then those in training stand
        beside, as "raw/...".
        """
        training = ckpt.optimizer_tensors(self.optimizer, self.names) | ckpt.random_tensors()
        model = ckpt.module_tensors(self.modules.items())
        for name, average in self.ema.items():
            for k, value in average.values.items():
                training[f"raw/{name}.{k}"] = model[f"{name}.{k}"]
                model[f"{name}.{k}"] = value
        state = {
            "config": self.config.to_json(),
            "recipe": self.recipe,
            "batches": self.batches.state_dict(),
            "skipped": self.skipped,
            "seconds": self.seconds,
            "ema_updates": next((a.updates for a in self.ema.values()), 0),
        }
        return ckpt.save_checkpoint(self.out / "checkpoints", self.step, model, training, state, keep=self.config.keep)

    def resume(self) -> bool:
        """Take up weights, optimiser, averages, random numbers and position of the last checkpoint in `out`, if any."""
        if self.out is None or not ckpt.checkpoints(self.out / "checkpoints"):
            return False
        model, training, state = ckpt.load_checkpoint(self.out)
        self._check_same_run(state)
        for name, module in self.modules.items():
            for k, value in self.ema[name].values.items() if self.ema else ():
                value.copy_(model[f"{name}.{k}"])
                model[f"{name}.{k}"] = training[f"raw/{name}.{k}"]
            ckpt.load_weights(module, ckpt.under(name, model), what=f"{self.out}'s {name}")
        ckpt.load_optimizer(self.optimizer, self.names, training)
        for average in self.ema.values():
            average.updates = state["ema_updates"]
        self.batches.load_state_dict(state["batches"])
        self.step, self.skipped, self.seconds = state["step"], state["skipped"], state["seconds"]
        ckpt.load_random(training)
        return True

    def _check_same_run(self, state: dict) -> None:
        """A resumed run must be the same run: only what does not change its numbers may differ."""
        free = {
            "checkpoint_every",
            "keep",
            "log_every",
            "eval_every",
            "tensorboard",
            "compile",
            "nonfinite",
            "max_skips",
        }
        now, then = self.config.to_json(), state["config"]
        differ = [f"{k} was {then.get(k)!r}, is {now[k]!r}" for k in now if k not in free and then.get(k) != now[k]]
        if state["recipe"] != self.recipe:
            differ.append("the recipe (model, data or task) differs")
        if differ:
            raise ckpt.CheckpointError(
                f"Trainer: {self.out} holds a run with other settings: {'; '.join(differ)}; give another out folder, "
                "the same settings, or resume=False (--fresh) to start anew"
            )

    # Messages

    def _nonfinite(self, loss: float, norm: float, lr: float, in_row: int) -> str:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm} (loss {loss:.4g})"
        text = f"train: {what} at step {self.step + 1} (learning rate {lr:.3g})"
        if self.config.nonfinite == "skip":
            return text + f", after {in_row} such steps in a row; lower lr or raise warmup"
        kept = ckpt.checkpoints(self.out / "checkpoints") if self.out else []
        text += f"; the last checkpoint is {kept[-1]}" if kept else "; no checkpoint was written yet"
        return text + '; lower lr, raise warmup, try amp="off", or leave such steps out with nonfinite="skip"'

    def _how_to_go_on(self) -> str:
        if self.out is None:
            return (
                f"train: interrupted at step {self.step} of {self.config.steps}; nothing is kept, because out is None"
            )
        return (
            f"train: interrupted at step {self.step} of {self.config.steps}; saved in {self.out}: "
            "the same command continues from there"
        )


@contextlib.contextmanager
def _stop_signals():
    """A list that becomes true at the first Ctrl-C or SIGTERM; a second Ctrl-C ends at once."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number, frame):
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _numbers(figures: dict) -> dict[str, float]:
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in figures.items() if k != "loss"}
