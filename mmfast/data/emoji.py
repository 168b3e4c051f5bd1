"""Emoji: one concept drawn by four artists, with its English name and keywords.

The pictures and names come from five packages (see `catalog.EMOJI`). Concepts are the emoji that all four artists drew,
without skin tones. Splits are over concepts: variants of one first code point (a man, a woman, a family) stay together,
and so do concepts that any artist drew with exactly the same pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .install import cache_dir, extra, install
from .render import decode, render_svg, square, to_tensor
from .splits import groups, split_by_group
from .store import bar, load, save

ARTISTS = ("noto", "twemoji", "fluent", "openmoji")
_FORMAT = 1
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_VARIATION = 0xFE0F  # "draw as a picture": artists disagree on where to write it, so sequences are compared without
_LARGEST_GROUP = 20

Sequence_ = tuple[int, ...]


@dataclass(frozen=True, repr=False)
class EmojiSet:
    """Pictures and words of all concepts.

    Attributes:
        images: uint8 [N, 3, size, size], RGB on white.
        artist: int64 [N], index into `artists`.
        concept: int64 [N], index into `names` and the lists below.
        artists: names of the artists.
        names: English short name of each concept, for example "grinning face".
        keywords: English keywords of each concept.
        group, subgroup: its place in Unicode's order, for example "animals-nature" and "animal-bird".
        codepoints: its code points in hexadecimal, for example "1f600".
        family: int64 [concepts]; equal where concepts must not be parted by a split.
        split: int64 concept indices of "train", "val" and "test".
    """

    images: torch.Tensor
    artist: torch.Tensor
    concept: torch.Tensor
    artists: tuple[str, ...]
    names: list[str]
    keywords: list[list[str]]
    group: list[str]
    subgroup: list[str]
    codepoints: list[str]
    family: torch.Tensor
    split: dict[str, torch.Tensor]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in self.split.items())
        return f"EmojiSet({len(self.images)} images by {', '.join(self.artists)}; concepts: {sizes})"

    def rows(self, artists: str | Sequence[str] | None = None, split: str | None = None) -> torch.Tensor:
        """The rows of `images` by some artists (all by default) of the concepts of one split (all by default).

        Returns:
            int64 row indices, sorted.

        Raises:
            ValueError: unknown artist or split.
        """
        names = self.artists if artists is None else (artists,) if isinstance(artists, str) else tuple(artists)
        for name in names:
            if name not in self.artists:
                raise ValueError(f"EmojiSet.rows: unknown artist {name!r}, expected one of {', '.join(self.artists)}")
        wanted = torch.zeros(len(self.artists), dtype=torch.bool)
        wanted[[self.artists.index(name) for name in names]] = True
        keep = wanted[self.artist]
        if split is not None:
            if split not in self.split:
                raise ValueError(f"EmojiSet.rows: unknown split {split!r}, expected one of {', '.join(self.split)}")
            inside = torch.zeros(len(self.names), dtype=torch.bool)
            inside[self.split[split]] = True
            keep &= inside[self.concept]
        return keep.nonzero().flatten()


def _sequence(text: str) -> Sequence_:
    """'1F468-200D-2695-FE0F' to code points, the variation selector left out."""
    return tuple(c for c in (int(part, 16) for part in text.split("-")) if c != _VARIATION)


def noto_glyphs(font) -> dict[Sequence_, bytes]:
    """The PNG of each code point sequence of a CBDT font.

    Single code points come from `cmap`, sequences by inverting the ligatures of GSUB (OpenType, LookupType 4).

    Args:
        font: a fontTools TTFont.

    Raises:
        ValueError: the font holds no bitmaps.
    """
    if "CBDT" not in font:
        raise ValueError("noto_glyphs: the font holds no CBDT bitmaps; this release's Noto Color Emoji cannot be read")
    strike = max(font["CBDT"].strikeData, key=len)
    code = {}
    found: dict[Sequence_, str] = {}
    for point, glyph in sorted(font.getBestCmap().items()):
        code.setdefault(glyph, point)
        found[(point,)] = glyph
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for lookup in lookups:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    parts = [code.get(glyph) for glyph in (first, *ligature.Component)]
                    if None not in parts:
                        found.setdefault(tuple(p for p in parts if p != _VARIATION), ligature.LigGlyph)
    return {seq: bytes(strike[glyph].imageData) for seq, glyph in found.items() if glyph in strike}


def _pictures(root: Path, size: int) -> dict[str, dict[Sequence_, Callable[[], object]]]:
    """For each artist and sequence, a function that draws the picture as a Pillow image of `size` x `size`."""
    font_module = extra("fontTools.ttLib")
    noto = noto_glyphs(font_module.TTFont(root / "noto" / "NotoColorEmoji.ttf", lazy=True))

    def svg(path: Path):
        return lambda: square(render_svg(path.read_text(encoding="utf-8"), max_side=size, name=path.name), size)

    def bitmap(read: Callable[[], bytes], name: str):
        return lambda: square(decode(read(), name=name), size)

    def files(folder: str, suffix: str) -> Iterator[tuple[Sequence_, Path]]:
        for path in sorted((root / folder).glob(f"*{suffix}")):
            try:
                yield _sequence(path.stem), path
            except ValueError:
                continue  # artists ship a few pictures that are not Unicode's

    return {
        "noto": {seq: bitmap(lambda png=png: png, "noto") for seq, png in noto.items()},
        "twemoji": {seq: svg(path) for seq, path in files("twemoji", ".svg")},
        "fluent": {seq: bitmap(path.read_bytes, path.name) for seq, path in files("fluent/assets", ".webp")},
        "openmoji": {seq: svg(path) for seq, path in files("openmoji/color/svg", ".svg")},
    }


def _annotations(root: Path, language: str) -> dict[Sequence_, tuple[str, list[str]]]:
    """CLDR's short name and keywords of each sequence in one language."""
    path = root / "names" / "annotations" / language / "annotations.json"
    table = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    return {
        tuple(ord(c) for c in text if ord(c) != _VARIATION): (entry["tts"][0], entry.get("default", []))
        for text, entry in table.items()
        if entry.get("tts")
    }


def _build(root: Path, size: int, progress: bool) -> tuple[dict[str, torch.Tensor], dict]:
    pictures = _pictures(root, size)
    table = json.loads((root / "openmoji" / "data" / "openmoji.json").read_text(encoding="utf-8"))
    english = _annotations(root, "en")
    entries = []
    for entry in table:
        seq = _sequence(entry["hexcode"])
        if all(seq in pictures[a] for a in ARTISTS) and not any(c in _SKIN_TONES for c in seq):
            entries.append((seq, entry))

    images, artist, concept = [], [], []
    keys: list[set] = [{seq if e["group"] == "flags" else seq[0]} for seq, e in entries]
    dropped = 0
    jobs = [(a, i) for a in range(len(ARTISTS)) for i in range(len(entries))]
    seen: set[tuple[int, bytes]] = set()
    for a, i in bar(jobs, f"drawing emoji at {size} px", progress):
        image = to_tensor(pictures[ARTISTS[a]][entries[i][0]]())
        digest = (a, hashlib.sha256(image.numpy().tobytes()).digest())
        keys[i].add(digest)
        if digest in seen:
            dropped += 1
            continue
        seen.add(digest)
        images.append(image)
        artist.append(a)
        concept.append(i)

    codepoints = ["-".join(f"{c:x}" for c in seq) for seq, _ in entries]
    family = groups(keys)
    split = split_by_group(family, codepoints, largest=_LARGEST_GROUP)
    tensors = {
        "images": torch.stack(images),
        "artist": torch.tensor(artist, dtype=torch.int32),
        "concept": torch.tensor(concept, dtype=torch.int32),
        "family": torch.tensor(family, dtype=torch.int32),
        **{f"split.{name}": ids.to(torch.int32) for name, ids in split.items()},
    }
    texts = {
        "format": _FORMAT,
        "artists": list(ARTISTS),
        "duplicates": dropped,
        "codepoints": codepoints,
        "names": [english[s][0] if s in english else e["annotation"] for s, e in entries],
        "keywords": [
            english[s][1] if s in english else [t.strip() for t in e["tags"].split(",") if t.strip()]
            for s, e in entries
        ],
        "group": [e["group"] for _, e in entries],
        "subgroup": [e["subgroups"] for _, e in entries],
    }
    return tensors, texts


def load_emoji(size: int = 64, *, cache: str | os.PathLike | None = None, progress: bool = True) -> EmojiSet:
    """Load the emoji set; the first call installs its packages and draws the pictures (about 10 s), later ones read.

    Args:
        size: side of the pictures in pixels, 8 to 256.
        cache: see `install.cache_dir`.
        progress: show bars.

    Raises:
        ValueError: `size` outside its range.
        InstallError, FetchError: a package cannot be had.
        ImportError: the `data` extra is missing.
    """
    if not 8 <= size <= 256:
        raise ValueError(f"load_emoji: size is {size}, expected 8 to 256 pixels")
    stem = cache_dir(cache) / "built" / f"emoji-{size}"
    built = load(stem)
    if built is None or built[1].get("format") != _FORMAT:
        root = install("emoji", cache=cache, progress=progress)
        built = _build(root, size, progress)
        stem.parent.mkdir(parents=True, exist_ok=True)
        save(stem, *built)
    tensors, texts = built
    return EmojiSet(
        images=tensors["images"],
        artist=tensors["artist"].long(),
        concept=tensors["concept"].long(),
        artists=tuple(texts["artists"]),
        names=texts["names"],
        keywords=texts["keywords"],
        group=texts["group"],
        subgroup=texts["subgroup"],
        codepoints=texts["codepoints"],
        family=tensors["family"].long(),
        split={name: tensors[f"split.{name}"].long() for name in ("train", "val", "test")},
    )


def emoji_names(emoji: EmojiSet, language: str, *, cache: str | os.PathLike | None = None) -> list[str | None]:
    """The concepts' names in another language of CLDR, for example "fr"; None where CLDR's table has none.

    Raises:
        ValueError: CLDR has no such language; the message lists those it has.
    """
    root = install("emoji", cache=cache, progress=False)
    known = sorted(path.name for path in (root / "names" / "annotations").iterdir())
    if language not in known:
        raise ValueError(f"emoji_names: unknown language {language!r}, expected one of {', '.join(known)}")
    table = _annotations(root, language)
    return [table[s][0] if (s := _sequence(c)) in table else None for c in emoji.codepoints]
