"""The command line: help, errors in one sentence, train, eval and info on tiny sets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from train_sets import tiny_emoji, tiny_stamps

import mmfast.data
from mmfast import cli, info


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(mmfast.data, "load_emoji", lambda *a, **k: tiny_emoji())
    monkeypatch.setattr(mmfast.data, "load_stamps", lambda *a, **k: tiny_stamps())
    from mmfast.train.recipes import transfer

    monkeypatch.setattr(transfer, "load_emoji", lambda *a, **k: tiny_emoji())
    monkeypatch.setattr(transfer, "load_stamps", lambda *a, **k: tiny_stamps())


def run(*argv):
    return cli.main([str(a) for a in argv])


def test_no_command_prints_help(capsys):
    assert run() == 2
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "eval", "demo", "bench", "data", "info"))


@pytest.mark.parametrize(
    "argv",
    [("train", "emoji", "--help"), ("demo", "--help"), ("bench", "--help"), ("data", "--help"), ("eval", "--help")],
)
def test_every_command_has_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 0 and "usage: mmfast" in capsys.readouterr().out


def test_train_eval_and_transfer(tiny, tmp_path, capsys):
    emoji = ("train", "emoji", "--out", tmp_path / "e", "--batch-size", 6, "--log-every", 1)
    assert run(*emoji, "--steps", 2) == 0
    out = capsys.readouterr().out
    assert "held-out artist/image->text R@1" in out
    assert run("eval", tmp_path / "e", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["held-out artist/image->text candidates"] == 16
    for name in (n for n in scores if n.endswith("R@5")):
        shown = next(line.split()[-1] for line in out.splitlines() if line.startswith(name))
        assert float(shown) == pytest.approx(scores[name], abs=7)  # evaluated in bfloat16 there, in float32 here

    stamps = ("train", "stamps", "--out", tmp_path / "s", "--steps", 1, "--batch-size", 4)
    assert run(*stamps, "--init", tmp_path / "e", "--modalities", "image,text,audio", "--fusion", "attention") == 0
    out = capsys.readouterr().out
    assert "new: audio" in out and "accuracy" in out
    assert run("eval", tmp_path / "s", "--split", "val") == 0
    assert "samples   4" in capsys.readouterr().out

    assert run(*emoji, "--steps", 3) == 1
    assert "other settings: steps was 2, is 3" in capsys.readouterr().err
    assert run(*emoji, "--steps", 3, "--fresh") == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("eval", "nowhere"), "checkpoint: nowhere holds none"),
        (("train", "emoji", "--out", "x", "--held-out", "apple"), "held_out is 'apple'"),
        (("train", "emoji", "--out", "x", "--lr", "-1"), "lr is -1.0, expected a positive number"),
        (("train", "stamps", "--out", "x", "--modalities", "smell"), "modalities is ('smell',)"),
        (("train", "stamps", "--out", "x", "--init", "nowhere"), "nowhere holds none"),
    ],
)
def test_errors_are_one_sentence(tiny, argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [("train",), ("train", "emoji"), ("train", "emoji", "--out", "x", "--steps", "0"), ("fly",)]
)
def test_wrong_arguments_end_with_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_info_says_what_runs_and_why_not_the_rest(capsys, monkeypatch):
    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"].startswith("runs")
    assert found["backends"]["cpu"].startswith(("runs", "refused"))
    assert found["backends"]["cuda"].startswith(("refused: ", "built")) and "triton" in found["backends"]
    assert {"emoji", "stamps", "folder"} <= found["data sets"].keys()
    monkeypatch.setattr(info._native, "cpu_refusal", "no compiler was there")
    assert run("info") == 0
    assert "refused: no compiler was there" in capsys.readouterr().out


def test_an_interrupt_in_another_process_saves_and_says_how_to_go_on(tmp_path):
    code = (
        "import os, signal, sys, torch; sys.path.insert(0, sys.argv[2]); from train_toys import ToyModel, toy_batches\n"
        "from mmfast.tasks import Classification; from mmfast.train import TrainConfig, Trainer\n"
        "from mmfast import cli\n"
        "class B:\n"
        "    def __init__(s): s.b = toy_batches()\n"
        "    def __next__(s):\n"
        "        if s.b.count == 4: os.kill(os.getpid(), signal.SIGINT)\n"
        "        return next(s.b)\n"
        "    def state_dict(s): return s.b.state_dict()\n"
        "def go(args): Trainer(ToyModel(), Classification(4, 8), B(), TrainConfig(50), sys.argv[1], show=False).fit()\n"
        "cli._info = go\n"
        "sys.exit(cli.main(['info']))\n"
    )
    from pathlib import Path

    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "interrupted at step 5 of 50; saved in" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "checkpoints" / "step-00000005" / "state.json").is_file()
