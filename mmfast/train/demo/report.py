"""The demo's report: one HTML file with curves, retrieved pictures and attention maps; it loads nothing."""

from __future__ import annotations

import html
import os
import platform
from pathlib import Path

import torch

import mmfast
from mmfast.models import MultimodalModel
from mmfast.nn import attention_map
from mmfast.tasks import embed
from mmfast.train.checkpoint import load_weights, under
from mmfast.train.demo import charts
from mmfast.train.demo.stage import Demo, Sizes
from mmfast.train.demo.table import COLUMNS, Row, cells
from mmfast.train.recipes.emoji import EmojiData
from mmfast.train.recipes.inputs import square_images
from mmfast.train.recipes.transfer import read_recipe

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667080; --line: #dfe3e8; --page: #fff; --card: #f7f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3af; --line: #343a43; --page: #14171c; --card: #1d2128; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1080px; margin: 0 auto; padding: 32px 20px 80px; }
h1 { font-size: 30px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 44px 0 8px; }
p { max-width: 76ch; margin: 8px 0; } .soft { color: var(--soft); font-size: 14px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; width: 100%; margin: 12px 0; }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.reached { color: #2a9d6f; font-weight: 600; } .missed { color: #c83e4d; font-weight: 600; }
.cards { display: flex; flex-wrap: wrap; gap: 16px; margin: 12px 0; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; }
.card + .card { margin-top: 12px; } .cards .card, .two .card { margin: 0; }
.card h3 { margin: 0 0 8px; font-size: 15px; } svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } .grid { stroke: var(--line); }
.error { stroke: var(--ink); stroke-width: 2; } .mark { stroke: var(--soft); stroke-dasharray: 4 3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
img { border-radius: 8px; background: #fff; display: block; border: 2px solid transparent; max-width: 100%; }
img.right { border-color: #2a9d6f; } img.wrong { border-color: #c83e4d; opacity: .8; }
.rows { display: grid; grid-template-columns: 92px 1fr; gap: 8px 14px; align-items: center; font-size: 13px; }
.strip { display: flex; flex-wrap: wrap; gap: 6px; align-items: flex-start; }
figure { margin: 0; width: 62px; }
figcaption { font-size: 10px; line-height: 1.2; color: var(--soft); margin-top: 3px; overflow-wrap: anywhere; }
"""


def write(demo: Demo, rows: list[Row]) -> Path:
    """Write `report.html` into the demo's folder and return its path."""
    results = demo.results
    parts = [_head(demo, rows), _table(rows)]
    if "pretrain" in results:
        model, data = _trained(demo)
        parts += [_emoji(results["pretrain"], model, data), _attention(model, data)]
    for name, section in (
        ("stamps", _stamps),
        ("fusion", _fusion),
        ("multitask", _multitask),
        ("adversarial", _adversarial),
        ("features", _features),
        ("speed", _speed),
    ):
        if name in results:
            parts.append(section(results[name]))
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>mmfast demo</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = demo.out / "report.html"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
    return path


def _trained(demo: Demo) -> tuple[MultimodalModel, EmojiData]:
    recipe, tensors, _ = read_recipe(demo.out / "emoji")
    model = recipe.model()
    load_weights(model, under("model", tensors), what="the demo's emoji model")
    return model.eval(), EmojiData(demo.emoji, recipe)


def _head(demo: Demo, rows: list[Row]) -> str:
    stages = [f"{name} {result['seconds']:.0f} s" for name, result in demo.results.items() if name != "data"]
    total = sum(result["seconds"] for name, result in demo.results.items() if name != "data")
    missed = [row for row in rows if row.met is False]
    verdict = ""
    if demo.sizes.pretrain_steps < Sizes.pretrain_steps:
        verdict = "<p><b>Quick run:</b> everything in small. The targets below are those of the full demo.</p>"
    elif missed:
        names = "; ".join(html.escape(f"{row.what}: {row.figure()}, target {row.target}") for row in missed)
        verdict = f'<p class="missed">Missed: {names}.</p>'
    return (
        "<h1>mmfast demo</h1>"
        "<p>An image-text model from scratch on the emoji of three artists, tested on the fourth artist and on "
        "concepts it never saw; then moved to stamps with captions and spoken descriptions: 16 classes, three "
        "fusions, several tasks on one backbone, and training against attacks.</p>"
        f"{verdict}<p class='soft'>{total:.0f} s in all ({', '.join(stages)}), set-up and downloads apart "
        f"({demo.results.get('data', {}).get('seconds', 0):.0f} s). mmfast {mmfast.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads.</p>"
    )


def _table(rows: list[Row]) -> str:
    numbers = {1, 2, 3}
    head = "".join(f'<th class="{"n" if i in numbers else ""}">{name}</th>' for i, name in enumerate(COLUMNS))
    body = []
    for row in rows:
        line = []
        for i, text in enumerate(cells(row)):
            kind = "n" if i in numbers else ""
            if i == 5 and row.met is not None:
                kind = "reached" if row.met else "missed"
            line.append(f'<td class="{kind}">{html.escape(text)}</td>')
        body.append(f"<tr>{''.join(line)}</tr>")
    return (
        f'<h2>Figures</h2><div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'
        '<p class="soft">Percent, ± one standard error over seeds. "Plain PyTorch" are runs without mmfast on two '
        "cores (about 6 minutes for the emoji), on the same pictures with slightly different splits; they are "
        "baselines to compare with, each named for what it was.</p>"
    )


@torch.no_grad()
def _emoji(result: dict, model: MultimodalModel, data: EmojiData, shown: int = 8) -> str:
    emoji, held_out = data.emoji, data.recipe.held_out
    rows = emoji.rows(held_out, "train")
    concepts = emoji.split["train"]
    x, x_ids = embed(model, data.image_batches(rows), "image")
    y, y_ids = embed(model, data.name_batches(concepts), "text")
    # Evenly spread, the same in every run: no picking of nice ones.
    chosen = torch.linspace(0, len(rows) - 1, min(shown, len(rows))).long()
    familiar = data.seen_artists[0]
    of_concept = {int(data.ids[emoji.concept[r]]): int(r) for r in emoji.rows(familiar).tolist()[::-1]}
    own = {int(data.ids[emoji.concept[r]]): int(r) for r in rows.tolist()[::-1]}

    def card(row: int | None, concept: int, right: bool) -> str:
        name = emoji.names[concept]
        image = (
            charts.picture(emoji.images[row], title=name, kind="right" if right else "wrong") if row is not None else ""
        )
        return f"<figure>{image}<figcaption>{html.escape(name)}</figcaption></figure>"

    to_text, to_image = [], []
    for i in chosen.tolist():
        best = (x[i] @ y.T).topk(min(5, len(y))).indices
        found = "".join(card(of_concept.get(int(c)), int(c), int(c) == int(x_ids[i])) for c in y_ids[best])
        query = charts.picture(emoji.images[rows[i]], title=emoji.names[int(emoji.concept[rows[i]])])
        to_text.append(f'{query}<div class="strip">{found}</div>')
    for i in chosen.tolist():
        j = int((y_ids == x_ids[i]).nonzero()[0])
        best = (y[j] @ x.T).topk(min(5, len(x))).indices
        found = "".join(card(own.get(int(c)), int(c), int(c) == int(y_ids[j])) for c in x_ids[best])
        to_image.append(f'<b>{html.escape(emoji.names[int(y_ids[j])])}</b><div class="strip">{found}</div>')
    scores = result["scores"]
    at = "held-out artist/image->text"
    who, known = html.escape(held_out), html.escape(familiar)
    accuracy = charts.lines({"%": result["accuracy_curve"]}, x="step", y="%", zero=True)
    return (
        "<h2>Emoji: learned from three artists</h2>"
        f"<p>{result['steps']} steps, {result['parameters'] / 1e6:.1f} M parameters, "
        f"{result['samples_per_s']:.0f} pictures a second. The fourth artist, {who}, was never trained on: "
        f"R@1 {scores[f'{at} R@1']:.1f}, R@5 {scores[f'{at} R@5']:.1f}, median rank "
        f"{scores[f'{at} median rank']:.0f} of {int(scores[f'{at} candidates']):,} names.</p>"
        '<div class="cards">'
        f'<div class="card"><h3>Loss</h3>{charts.lines({"loss": result["curve"]}, x="step", y="loss")}</div>'
        f'<div class="card"><h3>Right name within the batch</h3>{accuracy}</div></div>'
        '<div class="two">'
        f'<div class="card"><h3>From a picture by {who} to names</h3>'
        f'<div class="rows">{"".join(to_text)}</div></div>'
        f'<div class="card"><h3>From a name to pictures by {who}</h3>'
        f'<div class="rows">{"".join(to_image)}</div></div></div>'
        f"<p class='soft'>Names are shown with {known}'s picture of the concept. Green is right. Queries are evenly "
        "spread over the set, not picked.</p>"
    )


@torch.no_grad()
def _attention(model: MultimodalModel, data: EmojiData, shown: int = 8) -> str:
    emoji = data.emoji
    rows = emoji.rows(data.recipe.held_out, "train")
    rows = rows[torch.linspace(0, len(rows) - 1, min(shown, len(rows))).long()]
    encoder = model.encoders["image"]
    seen = {}
    # The transformer's input, as the encoder makes it.
    hook = encoder.transformer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], layout=args[1]))
    encoder(square_images(emoji.images[rows]))
    hook.remove()
    cards = []
    for layer in range(len(encoder.transformer.blocks)):
        both = encoder.transformer.queries_and_keys(seen["x"], seen["layout"], layer=layer)
        maps = attention_map(both, seen["layout"])
        strip = []
        for row, one in zip(rows.tolist(), maps):
            side = int(one.weights.shape[-1] ** 0.5)
            received = one.weights.mean((0, 1)).view(side, side)
            name = emoji.names[int(emoji.concept[row])]
            strip.append(charts.picture(charts.heat(emoji.images[row], received), size=88, title=name))
        cards.append(f'<div class="card"><h3>Layer {layer + 1}</h3><div class="strip">{"".join(strip)}</div></div>')
    plain = "".join(charts.picture(emoji.images[row], size=88) for row in rows.tolist())
    return (
        "<h2>Where the image encoder looks</h2><p>Attention that each place of a picture receives, over all heads "
        "and queries, after the convolutions (red is more).</p>"
        f'<div class="card"><h3>Pictures</h3><div class="strip">{plain}</div></div>{"".join(cards)}'
    )


def _stamps(result: dict) -> str:
    gain, error = result["gain"]
    accuracy = result["accuracy"]
    return (
        "<h2>Stamps: does the emoji model help?</h2>"
        f"<p>16 classes from the picture alone, {result['steps']} steps, {len(result['accuracy']['scratch'])} seeds, "
        f"each once from scratch and once from the emoji weights, {result['samples']} test pictures: "
        f"{gain:+.1f} points{f' ± {error:.1f}' if error == error else ''}.</p>"
        '<div class="cards"><div class="card"><h3>Accuracy by seed, %</h3>'
        f"{charts.pairs(accuracy['scratch'], accuracy['pretrained'], ('from scratch', 'from emoji'))}</div>"
        f'<div class="card"><h3>Loss, seed 0</h3>{charts.lines(result["curves"], x="step", y="loss")}</div></div>'
    )


def _fusion(result: dict) -> str:
    values = {name: (mean, error) for name, (mean, error) in result["summary"].items()}
    weights = ", ".join(f"{name} {w:.2f}" for name, w in result["weights"].items())
    return (
        "<h2>Stamps: three fusions side by side</h2>"
        f"<p>Picture, English caption and spoken description, all trained together, {result['steps']} steps. The "
        f"weighted fusion ends with the weights {weights}.</p>"
        f'<div class="cards"><div class="card"><h3>16 classes, accuracy</h3>{charts.bars(values)}</div>'
        f'<div class="card"><h3>Loss, seed 0</h3>{charts.lines(result["curves"], x="step", y="loss")}</div></div>'
    )


def _multitask(result: dict) -> str:
    directions = {
        "image-text": ("image->text", "text->image"),
        "image-audio": ("audio->image", "image->audio"),
        "text-audio": ("audio->text", "text->audio"),
    }
    lines = []
    for task, both in directions.items():
        for direction in both:
            line = [f"<td>{direction.replace('->', ' → ')}</td>"]
            for weighting in ("equal", "uncertainty"):
                scores = result[weighting]["scores"]
                line += [f'<td class="n">{scores[f"{task}/{direction} {k}"]:.1f}</td>' for k in ("R@1", "R@5")]
            scores = result["equal"]["scores"]
            line.append(f'<td class="n">{scores[f"{task}/{direction} chance R@1"]:.2f}</td>')
            line.append(f'<td class="n">{int(scores[f"{task}/{direction} candidates"])}</td>')
            lines.append(f"<tr>{''.join(line)}</tr>")
    accuracy = " and ".join(
        f"{result[w]['scores']['classes/accuracy']:.1f}% with {w} weights" for w in ("equal", "uncertainty")
    )
    learned = ", ".join(f"{name} {value:.2f}" for name, value in result["uncertainty"]["weights"].items())
    length = result.get("length_only")
    note = (
        f"<p class='soft'>The length of a clip alone, against the length of its caption, finds R@1 {length['R@1']:.1f} "
        f"of {length['candidates']} captions ({html.escape(result['language'])}): speech figures mean something above "
        "that.</p>"
        if length
        else ""
    )
    head = "<th>retrieval</th>" + "".join(
        f'<th class="n">{name}</th>'
        for name in ("R@1, equal", "R@5", "R@1, uncertainty", "R@5", "chance R@1", "candidates")
    )
    curves = {w: result[w]["class_curve"] for w in ("equal", "uncertainty")}
    return (
        "<h2>Stamps: several tasks on one backbone</h2>"
        f"<p>16 classes and retrieval between picture, caption and speech, {result['steps']} steps, "
        f"{result['equal']['parameters'] / 1e6:.1f} M shared parameters: {accuracy}. "
        f"Learned weights at the end: {learned}.</p>"
        f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>{note}'
        f'<div class="card"><h3>Loss of the 16 classes</h3>{charts.lines(curves, x="step", y="cross-entropy")}</div>'
    )


def _adversarial(result: dict) -> str:
    cards = []
    for kind in ("clean", "adversarial"):
        one = result[kind]
        values = {k: (v, float("nan")) for k, v in one["accuracy"].items()}
        pictures = "".join(
            charts.picture(
                torch.tensor(p["pixels"], dtype=torch.uint8), size=52, kind="right" if p["right"] else "wrong"
            )
            for p in one["pictures"]
        )
        flags = "; ".join(one["flags"]) or "none (which proves nothing)"
        cards.append(
            f'<div class="card"><h3>{kind.capitalize()} fine-tuning</h3>{charts.bars(values, highest=80)}'
            f'<p class="soft">Pictures under {html.escape(one["attack"])}, green where the class is still right:</p>'
            f'<div class="strip">{pictures}</div>'
            f'<p class="soft">Signs of hidden gradients: {html.escape(flags)}.</p></div>'
        )
    return (
        "<h2>Stamps: training against attacks</h2>"
        f"<p>Fine-tuned twice for {result['steps']} steps, once on pictures as they are and once on FGSM pictures, "
        f"both tested on 16 classes of {result['samples']} pictures, changed by at most {result['eps']} of 255 grey "
        "levels. Attacks give an upper bound of robustness, not a proof.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _features(result: dict) -> str:
    if "missing" in result:
        return f"<h2>Frozen pretrained features</h2><p>Not run: {html.escape(result['missing'])}.</p>"
    values = {name: (mean, error) for name, (mean, error) in result["summary"].items()}
    return (
        "<h2>Frozen pretrained features</h2>"
        "<p>EfficientNet-lite0 and MiniLM, frozen, with a fusion on top; 16 classes.</p>"
        f'<div class="card">{charts.bars(values)}</div>'
    )


def _speed(result: dict) -> str:
    if "missing" in result:
        return f"<h2>Speed</h2><p>Not run: {html.escape(result['missing'])}.</p>"
    figures = result["figures"]
    ours = figures["step"]["mmfast"]["wall_ms"]
    lines = ["<tr><th>step</th><th class='n'>median, ms</th><th class='n'>times ours</th></tr>"]
    for name, t in figures["step"].items():
        numbers = "".join(f'<td class="n">{x}</td>' for x in (f"{t['wall_ms']:.0f}", f"{t['wall_ms'] / ours:.2f}"))
        lines.append(f"<tr><td>{html.escape(name)}</td>{numbers}</tr>")
    padding = ", ".join(f"{name} {100 * share:.0f} %" for name, share in figures["padding"].items())
    text = (
        f"Forward, losses, backward and AdamW of one model on the same {figures['samples']} samples, "
        f"{figures['batches']}, {figures['dtype']}, {figures['threads']} threads; padding would be {padding} of the "
        f"tokens. All losses agreed first: to {figures['losses_agree']['worst_relative_difference']:.1e} over "
        f"{figures['losses_agree']['steps']} steps."
    )
    table = f'<div class="wide"><table>{"".join(lines)}</table></div>'
    return f"<h2>Speed of a train step</h2><p>{html.escape(text)}</p>{table}"
