"""Recipes and the whole demo on tiny drawn sets: the pipeline works end to end, and an interrupted demo goes on."""

from __future__ import annotations

import dataclasses
import html.parser
import json

import pytest
import torch
from safetensors.torch import save_file
from train_sets import tiny_emoji, tiny_stamps

from mmfast.data import InstallError
from mmfast.tasks import Classification
from mmfast.train import CheckpointError, TrainConfig, Trainer, checkpoint
from mmfast.train.demo import charts, features, fusion, pretrain
from mmfast.train.demo.run import run_demo
from mmfast.train.demo.stage import QUICK, Demo
from mmfast.train.demo.table import as_text, table
from mmfast.train.recipes.emoji import EmojiData, EmojiRecipe
from mmfast.train.recipes.inputs import cut_regions, square_images
from mmfast.train.recipes.stamps import StampsData, StampsRecipe
from mmfast.train.recipes.transfer import describe, encoders_of, read_recipe, start_from

SMALL = EmojiRecipe(dim=64, embed_dim=32, heads=2, image_depth=1, words=256, trigrams=256, batch_size=12)
TINY = dataclasses.replace(
    QUICK,
    pretrain_steps=2,
    pretrain_batch=8,
    stamps_steps=1,
    stamps_seeds=2,
    fusion_steps=1,
    multitask_steps=1,
    adversarial_steps=1,
    adversarial_attacks=1,
)


# Inputs


def test_regions_hold_the_picture_in_order():
    image = torch.arange(3 * 64 * 96).view(3, 64, 96).remainder(251).byte()
    regions, places = cut_regions(image, 32, 96)
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for region, (row, column) in zip(regions, places.tolist()):
        assert torch.equal(region, image[:, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32])


@pytest.mark.parametrize(("h", "w", "grid"), [(10, 300, (1, 3)), (300, 10, (3, 1)), (5, 5, (1, 1)), (100, 100, (3, 3))])
def test_pictures_of_any_size_become_whole_regions(h, w, grid):
    regions, places = cut_regions(torch.full((3, h, w), 7, dtype=torch.uint8), 32, 96)
    assert len(regions) == grid[0] * grid[1] and tuple((places.max(0).values + 1).tolist()) == grid
    assert regions.float().sub(7).abs().max() <= 1
    with pytest.raises(ValueError, match="longest is 40, expected a multiple of the region's side 32"):
        cut_regions(torch.zeros(3, 4, 4, dtype=torch.uint8), 32, 40)


def test_white_is_zero():
    assert square_images(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)).regions.abs().max() == 0


# Emoji


def test_the_held_out_artist_and_concepts_are_never_in_a_training_batch():
    emoji = tiny_emoji()
    data = EmojiData(emoji, SMALL)
    assert emoji.artists.index("noto") not in emoji.artist[data.train_rows].tolist()
    allowed = set(emoji.split["train"].tolist())
    batches = data.train_batches()
    for _ in range(6):
        assert set(next(batches).ids.tolist()) <= allowed
    with pytest.raises(ValueError, match="held_out is 'apple', expected one of noto"):
        EmojiData(emoji, dataclasses.replace(SMALL, held_out="apple"))


def test_batches_follow_from_seed_and_number():
    data = EmojiData(tiny_emoji(), SMALL)
    first, second = data.train_batches(3), data.train_batches(3)
    for _ in range(5):
        a = next(first)
    for _ in range(4):
        next(second)
    resumed = data.train_batches(3)
    resumed.load_state_dict(json.loads(json.dumps(second.state_dict())))
    b = next(resumed)
    assert torch.equal(a.inputs["image"].regions, b.inputs["image"].regions)
    assert torch.equal(a.inputs["text"].ids, b.inputs["text"].ids) and torch.equal(a.ids, b.ids)
    other = next(data.train_batches(4))
    assert not torch.equal(other.ids, a.ids)


def test_candidates_are_the_training_names_only():
    batch = next(EmojiData(tiny_emoji(), SMALL).train_batches())
    assert batch.candidate_ids.tolist() == list(range(16)) and batch.candidates.batch == 16


def test_emoji_model_learns_tiny_concepts_and_resumes(tmp_path):
    data = EmojiData(tiny_emoji(), SMALL)

    def trainer(out, steps=40):
        torch.manual_seed(0)
        config = TrainConfig(steps, lr=2e-3, log_every=4, warmup=4, checkpoint_every=8)
        return Trainer(
            SMALL.model(),
            SMALL.task(),
            data.train_batches(),
            config,
            out,
            recipe=describe(SMALL),
            evaluate=data.evaluate,
            show=False,
        )

    run = trainer(tmp_path)
    lines = run.fit()
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    scores = run.run_evaluation()
    assert scores["held-out artist/image->text candidates"] == 16
    assert scores["held-out artist/image->text R@5"] > 1.5 * 5 * scores["held-out artist/image->text chance R@1"]
    recipe, tensors, state = read_recipe(tmp_path)
    assert recipe == SMALL and state["step"] == 40
    again = recipe.model()
    checkpoint.load_weights(again, checkpoint.under("model", tensors), what="x")
    assert EmojiData(tiny_emoji(), recipe).evaluate(again.eval()).keys() == scores.keys()


# Stamps


def small_stamps(**options):
    return StampsRecipe(encoders=SMALL, longest=64, batch_size=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"modalities": ("image",)},
        {"modalities": ("text", "audio"), "fusion": "concat"},
        {"modalities": ("image", "text", "audio"), "fusion": "attention", "multitask": "uncertainty"},
        {"modalities": ("image", "text"), "fusion": "weighted", "multitask": "equal"},
    ],
)
def test_stamps_train_and_evaluate(options):
    recipe = small_stamps(**options)
    assert StampsRecipe(**json.loads(json.dumps(recipe.to_json()))) == recipe
    stamps = tiny_stamps()
    data = StampsData(stamps, recipe)
    model, task = recipe.model(), recipe.task(16)
    trainer = Trainer(model, task, data.train_batches(), TrainConfig(2, log_every=1), None, show=False)
    trainer.fit()
    with trainer.evaluating():
        scores = data.evaluate(model, task)
    assert scores["accuracy" if isinstance(task, Classification) else "classes/accuracy"] >= 0
    if recipe.multitask != "none" and "audio" in recipe.modalities:
        having = sum(i % 5 != 0 for i in stamps.split["test"].tolist())
        assert scores["text-audio/audio->text candidates"] == having


def test_mirrored_pictures_keep_their_places():
    data = StampsData(tiny_stamps(), small_stamps())
    data.recipe = dataclasses.replace(data.recipe, colour=0.0)
    rows = torch.arange(12)
    plain = data.batch(rows).inputs["image"]
    mirrored = data.batch(rows, torch.Generator().manual_seed(0)).inputs["image"]

    def whole(x, i):
        begin = int(x.lengths[:i].sum())
        part = slice(begin, begin + int(x.lengths[i]))
        rows, columns = (x.positions[part].max(0).values + 1).tolist()
        out = torch.zeros(3, rows * 32, columns * 32)
        for region, (r, c) in zip(x.regions[part], x.positions[part].tolist()):
            out[:, r * 32 : r * 32 + 32, c * 32 : c * 32 + 32] = region
        return out

    kinds = set()
    for i in range(12):
        a, b = whole(plain, i), whole(mirrored, i)
        same, flipped = torch.allclose(a, b, atol=1e-5), torch.allclose(a.flip(-1), b, atol=1e-5)
        assert same or flipped
        kinds.add(flipped)
    assert kinds == {True, False}


def test_stamps_check_their_arguments():
    for options, message in (
        ({"modalities": ("smell",)}, "modalities is"),
        ({"modalities": ("image", "text")}, "2 modalities need a fusion"),
        ({"fusion": "mean"}, "fusion is 'mean', expected one of concat"),
        ({"multitask": "equal"}, "at least two modalities"),
        ({"multitask": "often"}, "multitask is 'often'"),
    ):
        with pytest.raises(ValueError, match=message):
            StampsRecipe(**options)
    silent = dataclasses.replace(tiny_stamps(), clips=[])
    with pytest.raises(ValueError, match=r"no clips; use load_stamps\(speech=True\)"):
        StampsData(silent, small_stamps(modalities=("image", "audio"), fusion="concat"))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint.save_checkpoint(tmp_path, 1, {"model.x": torch.zeros(1)}, {}, {"recipe": {"name": "chess"}})
    with pytest.raises(CheckpointError, match="says no recipe known here"):
        read_recipe(tmp_path)


# The demo


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_demo_runs_end_to_end_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    emoji, stamps = tiny_emoji(), tiny_stamps()
    monkeypatch.setattr(pretrain, "recipe", lambda batch: dataclasses.replace(SMALL, batch_size=batch))
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path, TINY, emoji=emoji, stamps=stamps, show=False, speed=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert {"pretrain.json", "stamps.json"} <= {p.name for p in before} and not (tmp_path / "fusion.json").exists()

    results = run_demo(tmp_path, TINY, emoji=emoji, stamps=stamps, speed=False)
    assert set(results) == {"data", "pretrain", "stamps", "fusion", "multitask", "adversarial"}
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()), "a finished stage was run again"
    text = capsys.readouterr().out
    assert "emoji, held-out artist, 16 candidates: R@1" in text and "Report:" in text

    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") >= 8 and page.tags.count("img") >= 30 and "script" not in page.tags
    assert all(link.startswith("data:") for link in page.links), "the report must load nothing"

    start = encoders_of(tmp_path / "emoji")
    model = StampsRecipe(modalities=("image", "audio"), fusion="concat", encoders=start).model()
    fresh = start_from(model, tmp_path / "emoji")
    assert fresh and all("audio" in name for name in fresh)


# Tables and charts


def test_frozen_features_train_heads_and_are_kept(tmp_path, monkeypatch):
    stamps = tiny_stamps()
    demo = Demo(tmp_path, dataclasses.replace(TINY, features_seeds=2, features_steps=120), stamps=stamps, show=False)
    monkeypatch.setattr(features, "install", lambda *a, **k: pytest.fail("nothing is to be fetched"))
    prototypes = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    told = {"image": prototypes[stamps.label], "text": prototypes[stamps.label % 4, :64].contiguous()}
    save_file(told, tmp_path / "features.safetensors")
    result = features.run(demo)
    assert result["summary"]["image"][0] == 100 and result["summary"]["caption"][0] < 80
    assert result["chosen"] in ("concatenation", "weighted", "attention")
    rows = {row.what: row for row in table({"features": result})}
    judged = [row for row in rows.values() if row.target]
    assert [row.what for row in judged] == [f"stamps, frozen features: {result['chosen']}"]


def test_features_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise InstallError("pip cannot fetch it")

    monkeypatch.setattr(features, "install", refuse)
    demo = Demo(tmp_path, TINY, stamps=tiny_stamps(), show=False)
    assert features.run(demo) == {"missing": "pip cannot fetch it"}
    assert "missing" in demo.stage("features", "frozen features", features.run)
    assert not (tmp_path / "features.json").exists(), "the next run must try again"
    assert table({"features": {"missing": "pip cannot fetch it"}}) == []


def test_white_squares_keep_the_aspect():
    square = features.white_square(torch.zeros(3, 50, 100, dtype=torch.uint8), 40)
    assert square.shape == (3, 40, 40)
    assert square[:, 10:30].max() == 0 and square[:, :10].min() == 255 and square[:, 30:].min() == 255


def test_a_missed_target_is_said_and_a_quick_run_is_not_judged():
    scores = {f"{t}/image->text {k}": 30.0 for t in ("held-out artist", "held-out concepts") for k in ("R@1", "R@5")}
    scores |= {f"{t}/image->text candidates": 9 for t in ("held-out artist", "held-out concepts")}
    scores |= {f"{t}/image->text chance R@1": 11.1 for t in ("held-out artist", "held-out concepts")}
    assert "MISSED" in as_text(table({"pretrain": {"scores": scores}}))
    scores["held-out artist/image->text R@1"] = 45.0
    assert "reached" in as_text(table({"pretrain": {"scores": scores}}))
    quick = as_text(table({"pretrain": {"scores": scores}}, verdicts=False))
    assert "reached" not in quick and "MISSED" not in quick and ">= 45" in quick


def test_the_table_compares_with_the_quickest_peer():
    step = {
        "mmfast": 100.0,
        "padded, SDPA": 170.0,
        "padded, bmm": 140.0,
        "4 buckets, SDPA": 110.0,
        "loop over samples": 90,
    }
    figures = {"step": {name: {"wall_ms": ms} for name, ms in step.items()}}
    text = as_text(table({"speed": {"figures": figures}}))
    padded, buckets, loop = (line for line in text.splitlines() if "train step" in line)
    assert "1.4 times ours" in padded and ">= 1.5x, MISSED" in padded
    assert "1.1 times ours" in buckets and "reached" in buckets
    assert "0.9 times ours" in loop
    assert not table({"speed": {"missing": "no benchmark"}})


@pytest.mark.parametrize("low,high", [(0, 1), (-3, 7.3), (0.001, 0.0013), (5, 5), (0, 12345)])
def test_ticks_are_round_and_inside(low, high):
    ticks = charts._ticks(low, high)
    assert 1 <= len(ticks) <= 7 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)


def test_charts_take_what_runs_give():
    assert charts.lines({"a": [[1, None], [2, float("nan")]]}, x="x", y="y") == "<p>No points.</p>"
    assert "nan" not in charts.lines({"a": [[1, 2.0], [2, float("nan")], [3, 1.0]]}, x="x", y="y")
    text = charts.bars({"<b>": (12.3, float("nan")), "c": (50.0, 2.0)}, mark=("majority", 19.2))
    assert "&lt;b&gt;" in text and "nan" not in text and "± 2.0" in text
    red = charts.heat(torch.full((3, 32, 32), 200, dtype=torch.uint8), torch.eye(4))
    assert red.shape == (3, 32, 32) and red[0, 2, 2] > red[2, 2, 2]
