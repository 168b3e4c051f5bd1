"""The README's examples run as printed, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def tiny_emoji(**_):
    from mmfast.data import EmojiSet

    generator = torch.Generator().manual_seed(0)
    concepts, artists = 24, ("noto", "twemoji", "fluent", "openmoji")
    count = concepts * len(artists)
    return EmojiSet(
        images=torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator),
        artist=torch.arange(len(artists)).repeat_interleave(concepts),
        concept=torch.arange(concepts).repeat(len(artists)),
        artists=artists,
        names=[f"thing number {i}" for i in range(concepts)],
        keywords=[["thing", str(i)] for i in range(concepts)],
        group=["objects"] * concepts,
        subgroup=["thing"] * concepts,
        codepoints=[f"{i:x}" for i in range(concepts)],
        family=torch.arange(concepts),
        split={"train": torch.arange(16), "val": torch.arange(16, 18), "test": torch.arange(18, 24)},
    )


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, tmp_path, monkeypatch, capsys):
    """As printed, but for the training: a tiny set of made pictures, and 2 steps instead of 800."""
    import mmfast.data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmfast.data, "load_emoji", tiny_emoji)
    code = EXAMPLES[number].replace("steps=800", "steps=2").replace("warmup=60", "warmup=1")
    space: dict = {}
    exec(compile(code, f"README example {number}", "exec"), space)
    if "forward_packed" in code:
        assert space["out"].shape == (47, 256)
        assert space["out"].isfinite().all()
    if "Trainer" in code:
        assert space["trainer"].step == 2
        assert list((tmp_path / "runs/emoji/checkpoints").iterdir())
        assert "R@1" in capsys.readouterr().out


def test_there_is_an_example_for_each_kind_of_user():
    assert len(EXAMPLES) >= 2
    assert re.search(r"```sh\n.*make bench", README)


def test_files_that_the_readme_names_exist():
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:mmfast|benchmarks|docs|tests|csrc)/[\w/.]+)`", README
    )
    named += [*re.findall(r"python (benchmarks/\S+\.py)", README), "CONTRIBUTING.md"]
    assert named
    for name in named:
        assert (ROOT / name).exists(), f"README names {name}, which does not exist"


def test_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert named <= targets, named - targets


def test_environment_variables_that_the_readme_names_are_read_somewhere():
    sources = [
        p.read_text(encoding="utf-8")
        for p in [ROOT / "setup.py", *(ROOT / "mmfast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    ]
    sources += [p.read_text(encoding="utf-8") for p in (ROOT / "csrc").rglob("*.cpp")]
    for name in set(re.findall(r"MMFAST_[A-Z_]+", README)):
        assert any(name in source for source in sources), f"nothing reads {name}"
