"""The trainer: exact resume, schedule, groups, averages, non-finite losses, interrupts, checkpoints on bad disks."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch import nn
from train_toys import ToyModel, toy_batches

from mmfast.tasks import Classification
from mmfast.train import CheckpointError, Interrupted, NonFiniteLoss, TrainConfig, Trainer, checkpoint, read_log
from mmfast.train.optim import WeightAverage, learning_rate, parameter_groups


def make(out, steps=6, *, seed=0, task=None, show=False, **settings):
    torch.manual_seed(3)
    model = ToyModel()
    task = task or Classification(4, 8)
    settings = {"lr": 1e-2, "warmup": 2, "log_every": 1, "ema": 0.9, "amp": "off", "seed": seed, **settings}
    return Trainer(model, task, toy_batches(seed), TrainConfig(steps, **settings), out, recipe={"toy": 1}, show=show)


def weights(trainer):
    return {f"{k}.{n}": v.clone() for k, m in trainer.modules.items() for n, v in m.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAfter:
    """Batches that interrupt the process while the given batch is made."""

    def __init__(self, batches, count, number=signal.SIGINT):
        self.batches, self.count, self.number = batches, count, number

    def __next__(self):
        batch = next(self.batches)
        if self.batches.count == self.count:
            os.kill(os.getpid(), self.number)
        return batch

    def state_dict(self):
        return self.batches.state_dict()

    def load_state_dict(self, state):
        self.batches.load_state_dict(state)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_three_steps_and_three_resumed_are_six_steps_bit_for_bit(tmp_path, amp, number):
    straight = make(tmp_path / "straight", amp=amp)
    straight.fit()

    first = make(tmp_path / "parts", amp=amp)
    first.batches = StopAfter(first.batches, 3, number)
    with pytest.raises(Interrupted, match=r"interrupted at step 3 of 6; saved in .*the same command continues"):
        first.fit()
    torch.manual_seed(99)
    torch.randn(5)  # a new process would have other random numbers
    second = make(tmp_path / "parts", amp=amp)
    second.fit()

    assert second.step == 6
    assert_same(weights(straight), weights(second))
    for name in straight.ema:
        assert_same(straight.ema[name].values, second.ema[name].values)
    a, b = (read_log(tmp_path / name) for name in ("straight", "parts"))
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    assert [line["step"] for line in b] == [1, 2, 3, 4, 5, 6]
    moments = [checkpoint.load_checkpoint(tmp_path / name)[1] for name in ("straight", "parts")]
    assert_same(*moments)


def test_the_resumed_run_would_differ_without_its_state(tmp_path):
    """The equality above can fail: dropping one part of the state changes the result."""
    straight = make(tmp_path / "straight")
    straight.fit()
    for part in ("optimizer/", "ema/", "random/torch", "batches"):
        out = tmp_path / part.replace("/", "-")
        first = make(out)
        first.batches = StopAfter(first.batches, 3)
        with pytest.raises(Interrupted):
            first.fit()
        second = make(out)
        load_optimizer, load_random = checkpoint.load_optimizer, checkpoint.load_random
        with pytest.MonkeyPatch.context() as patch:
            if part == "optimizer/":
                patch.setattr(checkpoint, "load_optimizer", lambda o, n, t, load=load_optimizer: load(o, n, {}))
            elif part == "random/torch":
                patch.setattr(checkpoint, "load_random", lambda t, load=load_random: load(t) or torch.manual_seed(5))
            elif part == "batches":
                patch.setattr(second.batches, "load_state_dict", lambda s: None)
            else:
                patch.setattr(WeightAverage, "update", lambda self, m: None)
            second.fit()
        same_weights = all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(second).values()))
        averages = [
            (straight.ema[k].values[n], second.ema[k].values[n]) for k in straight.ema for n in straight.ema[k].values
        ]
        assert not (same_weights and all(torch.equal(a, b) for a, b in averages)), part


def test_a_finished_run_is_not_trained_again_and_fresh_starts_anew(tmp_path):
    first = make(tmp_path)
    first.fit()
    again = make(tmp_path)
    again.fit()
    assert_same(weights(first), weights(again))
    assert len(read_log(tmp_path)) == 6
    make(tmp_path, seed=1).fit(resume=False)
    with pytest.raises(CheckpointError, match=r"other settings: seed was 1, is 0"):
        make(tmp_path).fit()


def test_resume_with_another_recipe_is_refused(tmp_path):
    make(tmp_path).fit()
    other = make(tmp_path)
    other.recipe = {"toy": 2}
    with pytest.raises(CheckpointError, match="recipe"):
        other.fit()


def test_training_learns(tmp_path):
    trainer = make(None, steps=150, ema=0.0, lr=5e-2)
    lines = trainer.fit()
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[0]["samples_per_s"] > 0 and lines[0]["tokens_per_s"] > lines[0]["samples_per_s"]


def test_log_and_evaluation(tmp_path):
    trainer = make(tmp_path, log_every=4, eval_every=3)
    seen = []
    trainer.evaluate = lambda model: seen.append(model.training) or {"score": 7.0}
    trainer.fit()
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 6, 6]
    assert lines[0] == {"step": 3, "eval/score": 7.0}
    assert seen == [False, False] and trainer.model.training
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "cross_entropy"} <= lines[1].keys()
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-00000006"]


def test_keeps_the_last_checkpoints(tmp_path):
    make(tmp_path, checkpoint_every=1, keep=2).fit()
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-00000005", "step-00000006"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert checkpoint.find_checkpoint(tmp_path).name == "step-00000006"
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pt", ".pkl", ".pth", ".bin")]


# Losses that are not numbers


class NanAt:
    def __init__(self, task, steps):
        self.task, self.steps, self.count = task, steps, 0

    def loss(self, model, batch):
        loss, figures = self.task.loss(model, batch)
        self.count += 1
        return (loss * math.nan if self.count in self.steps else loss), figures


def test_nan_stops_and_names_the_step(tmp_path):
    trainer = make(tmp_path, checkpoint_every=2, task=NanAt(Classification(4, 8), {4}))
    with pytest.raises(
        NonFiniteLoss, match=r"the loss is nan at step 4 .*last checkpoint is .*step-00000002; lower lr"
    ):
        trainer.fit()


def test_nan_can_be_skipped_and_is_counted(tmp_path):
    trainer = make(tmp_path, nonfinite="skip", task=NanAt(Classification(4, 8), {2, 4}))
    trainer.fit()
    lines = read_log(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert lines[1]["loss"] is None
    assert all(torch.isfinite(v).all() for v in weights(trainer).values())
    with pytest.raises(NonFiniteLoss, match="after 3 such steps in a row"):
        make(None, nonfinite="skip", max_skips=2, task=NanAt(Classification(4, 8), {2, 3, 4})).fit()


# Checkpoints


def test_a_full_disk_gives_one_clear_sentence_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = make(tmp_path, checkpoint_every=3)
    save_file = checkpoint.save_file

    def full(tensors, path):
        if "00000006" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"the disk of .* is full.*step-00000003; free some space"):
        trainer.fit()
    monkeypatch.undo()
    again = make(tmp_path, checkpoint_every=3)
    again.fit()
    straight = make(tmp_path / "straight")
    straight.fit()
    assert_same(weights(straight), weights(again))


def test_a_run_that_dies_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = make(tmp_path, checkpoint_every=2)
    replace = os.replace

    def die(source, target):
        if "00000004" in str(target):
            raise SystemExit  # nothing after this line runs, like a killed process
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(SystemExit):
        trainer.fit()
    monkeypatch.undo()
    assert checkpoint.find_checkpoint(tmp_path).name == "step-00000002"
    make(tmp_path, checkpoint_every=2).fit()
    assert checkpoint.find_checkpoint(tmp_path).name == "step-00000006"


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
def test_a_flipped_byte_is_found(tmp_path, name):
    make(tmp_path).fit()
    path = checkpoint.find_checkpoint(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed or cut short"):
        make(tmp_path).fit()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1, "step": 6}', '{"format": 1, "sha256": 3}']
)
def test_a_broken_state_is_refused_with_a_clear_error(tmp_path, text):
    make(tmp_path).fit()
    (checkpoint.find_checkpoint(tmp_path) / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state|format|cannot be read"):
        checkpoint.load_checkpoint(tmp_path)


def test_no_checkpoint_is_said_so(tmp_path):
    with pytest.raises(CheckpointError, match="holds none; expected a folder of a run"):
        checkpoint.load_checkpoint(tmp_path / "nothing")


def test_transfer_takes_what_fits():
    a, b = ToyModel(8), ToyModel(8)
    tensors = a.state_dict() | {"encoders.text.weight": torch.zeros(3, 3), "unknown": torch.zeros(1)}
    assert checkpoint.load_weights(b, tensors, what="x", strict=False) == ["encoders.text.weight"]
    assert torch.equal(a.encoders["image"].weight, b.encoders["image"].weight)
    with pytest.raises(CheckpointError, match="unknown is not of this model"):
        checkpoint.load_weights(b, tensors, what="x")
    with pytest.raises(CheckpointError, match="no weight that fits"):
        checkpoint.load_weights(b, {"unknown": torch.zeros(1)}, what="x", strict=False)


def test_random_states_round_trip():
    random.seed(4), np.random.seed(4), torch.manual_seed(4)  # noqa: NPY002
    random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
    state = {k: v.clone() for k, v in checkpoint.random_tensors().items()}
    draw = lambda: (random.gauss(0, 1), random.random(), np.random.standard_normal(), torch.randn(3).tolist())  # noqa: E731, NPY002
    first = draw()
    draw()
    checkpoint.load_random(state)
    assert draw() == first


def test_shared_tensors_are_saved(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    path = checkpoint.save_checkpoint(tmp_path, 1, checkpoint.module_tensors([("model", model)]), {}, {})
    assert checkpoint.load_checkpoint(path)[0].keys() == {f"model.{n}" for n in model.state_dict()}


# Optimiser


def test_norms_and_biases_have_no_weight_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1))
    model.scale = nn.Parameter(torch.tensor(1.0))
    decayed, plain = parameter_groups([model, model], 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(model[i].weight) for i in (0, 2, 4)}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_learning_rate():
    config = TrainConfig(10, lr=1.0, warmup=2, final_lr=0.1)
    rates = [learning_rate(config, s) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[2:])) and rates[-1] > 0.1
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(TrainConfig(10, lr=1.0, schedule="linear"), 5) == pytest.approx(0.5)
    assert learning_rate(TrainConfig(10, lr=1.0, schedule="constant"), 9) == 1.0


def test_averaged_weights_are_swapped_in_and_out():
    trainer = make(None, steps=5)
    trainer.fit()
    before = weights(trainer)
    with trainer.evaluating():
        assert not torch.equal(weights(trainer)["model.norm.weight"], before["model.norm.weight"])
        assert not trainer.model.training
    assert_same(before, weights(trainer))
    assert trainer.model.training


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": 1, "lr": -1.0}, r"lr is -1.0, expected a positive number"),
        ({"steps": 1, "betas": (0.9,)}, "betas"),
        ({"steps": 1, "warmup": 5}, "warmup is 5, expected 0 to steps = 1"),
        ({"steps": 1, "schedule": "step"}, "schedule is 'step', expected one of cosine"),
        ({"steps": 1, "amp": "fp16"}, "amp is 'fp16', expected one of"),
        ({"steps": 1, "nonfinite": "ignore"}, "nonfinite"),
        ({"steps": 1, "ema": 1.0}, "ema"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**settings)


def test_settings_go_through_json():
    config = TrainConfig(5, betas=(0.8, 0.9), ema=0.5)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="unknown settings learning_rate"):
        TrainConfig.from_json({"steps": 1, "learning_rate": 1})


def test_objects_that_are_no_task_or_have_nothing_to_train():
    with pytest.raises(TypeError, match=r"task is int, expected an object with loss"):
        Trainer(ToyModel(), 3, toy_batches(), TrainConfig(1))
    with pytest.raises(ValueError, match="no parameters"):
        Trainer(nn.Identity(), NanAt(None, set()), toy_batches(), TrainConfig(1))
