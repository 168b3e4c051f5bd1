"""Stamps: clip-art of very different size and aspect, captions in many languages, captions spoken by volunteers.

From Debian's `tuxpaint-stamps-default` (see `catalog.STAMPS`). Alphabets are left out. Near-duplicates stay in one
split: stamps are grouped by lower-cased English caption and by perceptual hash. A file that cannot be read is left out
and named in `StampSet.skipped`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .audio import N_MELS, log_mel
from .install import cache_dir, extra, install
from .render import decode, fit, render_svg, to_tensor
from .splits import groups, split_by_group
from .store import bar, load, save

CLASSES = (
    "animals", "clothes", "food", "hobbies", "household", "medical", "military", "naturalforces",
    "people", "plants", "seasonal", "space", "sports", "symbols", "town", "vehicles",
)  # fmt: skip
SPEECH_LANGUAGES = ("fr", "ru", "ro", "bg", "ca", "es")
_SHARES = (("train", 0.70), ("val", 0.10), ("test", 0.20))
_FORMAT = "2"
_NEAR = 5  # bits of 128 by which the hashes of near-duplicates may differ
_MAX_SECONDS = 60


@dataclass(frozen=True, repr=False)
class StampSet:
    """Images, captions and, where asked for, spoken captions.

    Attributes:
        images: per stamp uint8 [3, h, w], RGB on white, native aspect, sides of at most `max_side`.
        caption: English caption of each stamp.
        captions: captions of each stamp by language code, without English, for example {"fr": "Un kangourou rouge."}.
        label: int64 [stamps], index into `classes`.
        classes: the 16 top-level folders.
        names: the stamp's path in the package, without suffix.
        group: int64 [stamps]; equal where stamps share a caption or look alike.
        split: int64 stamp indices of "train", "val" and "test"; no group is in two.
        clips: (stamp index, language) of each spoken caption; empty without speech.
        mel: float16 [frames of all clips, 80], log-mel as `audio.log_mel`.
        mel_offsets: int64 [clips + 1]; clip i owns the rows mel_offsets[i]:mel_offsets[i + 1].
        skipped: one line per file that could not be read, with the reason.
    """

    images: list[torch.Tensor]
    caption: list[str]
    captions: list[dict[str, str]]
    label: torch.Tensor
    classes: tuple[str, ...]
    names: list[str]
    group: torch.Tensor
    split: dict[str, torch.Tensor]
    clips: list[tuple[int, str]]
    mel: torch.Tensor
    mel_offsets: torch.Tensor
    skipped: list[str]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in self.split.items())
        return f"StampSet({len(self.images)} images, {len(self.classes)} classes, {len(self.clips)} clips; {sizes})"

    def clip(self, index: int) -> torch.Tensor:
        """The log-mel frames of a clip, float16 [frames, 80], a view."""
        return self.mel[self.mel_offsets[index] : self.mel_offsets[index + 1]]

    def clip_rows(self, language: str | None = None, split: str | None = None) -> torch.Tensor:
        """Indices of the clips of one language (all by default) and one split of stamps (all by default), int64."""
        inside = None if split is None else set(self.split[split].tolist())
        rows = [
            i
            for i, (stamp, code) in enumerate(self.clips)
            if (language is None or code == language) and (inside is None or stamp in inside)
        ]
        return torch.tensor(rows, dtype=torch.int64)


def read_captions(text: str) -> tuple[str, dict[str, str]]:
    """A stamp's text file: the first line in English, the others `language.utf8=caption`."""
    english, _, rest = text.lstrip("\ufeff").partition("\n")
    found = re.findall(r"^([\w@]+)\.utf8=[ \t]*(.*?)[ \t\r]*$", rest, re.MULTILINE)
    return english.strip(), {language: caption for language, caption in found if caption}


def perceptual_hash(image) -> np.ndarray:
    """Difference hash of a Pillow RGB image: the signs of the steps of 9x9 grey levels, across and down; bool [128].

    Source: N. Krawetz, "Kind of like that" (dHash), with both directions.
    """
    grey = np.asarray(image.convert("L").resize((9, 9), extra("PIL.Image").Resampling.BOX), dtype=np.int16)
    across, down = np.diff(grey, axis=1)[:8], np.diff(grey, axis=0)[:, :8]
    # Flat parts must not flip a bit by one grey level of noise.
    return np.concatenate([(across > 2).ravel(), (down > 2).ravel()])


def _picture(stem: Path, max_side: int):
    """A stamp as a Pillow image. Where a stamp has both kinds, the PNG is what its artist exported."""
    png, svg = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    if png.is_file():
        return fit(decode(png.read_bytes(), name=png.name), max_side)
    if svg.is_file():
        return render_svg(svg.read_text(encoding="utf-8", errors="replace"), max_side=max_side, name=svg.name)
    raise ValueError(f"{stem.name} has no picture")


def _build_images(root: Path, max_side: int, progress: bool) -> tuple[dict[str, torch.Tensor], dict]:
    stamps = root / "files" / "stamps"
    flat, shapes, keys, skipped, entries = [], [], [], [], []
    hashes: list[np.ndarray] = []
    for path in bar(sorted(stamps.rglob("*.txt")), f"reading stamps at {max_side} px", progress):
        name = path.relative_to(stamps).with_suffix("").as_posix()
        if name.startswith("symbols/alphabets/") or name.partition("/")[0] not in CLASSES:
            continue
        try:
            english, captions = read_captions(path.read_text(encoding="utf-8"))
            if not english:
                raise ValueError("it has no English caption")
            image = _picture(path.with_suffix(""), max_side)
            if np.asarray(image).min() == 255:
                raise ValueError("the picture is white on white")
        except (ValueError, OSError) as error:
            skipped.append(f"{name}: {error}")
            continue
        tensor = to_tensor(image)
        flat.append(tensor.flatten())
        shapes.append(tensor.shape[1:])
        hashes.append(perceptual_hash(image))
        keys.append({english.lower()})
        entries.append((name, english, captions))
    if not entries:
        raise ValueError(f"load_stamps: no stamp under {stamps} could be read: {skipped[:3]}; install it again")

    bits = np.stack(hashes).astype(np.int16)
    distance = bits @ (1 - bits).T + (1 - bits) @ bits.T
    for i, j in zip(*np.nonzero(np.triu(distance <= _NEAR, k=1)), strict=True):
        # Near hashes only mean the same picture where the shapes agree too.
        (h, w), (y, x) = shapes[i], shapes[j]
        if abs(np.log(w * y / (h * x))) < 0.1:
            keys[i].add((int(i), int(j)))
            keys[j].add((int(i), int(j)))
    group = groups(keys)
    split = split_by_group(group, [name for name, _, _ in entries], shares=_SHARES)
    tensors = {
        "pixels": torch.cat(flat),
        "shapes": torch.tensor(shapes, dtype=torch.int32),
        "label": torch.tensor([CLASSES.index(name.partition("/")[0]) for name, _, _ in entries], dtype=torch.int32),
        "group": torch.tensor(group, dtype=torch.int32),
        **{f"split.{name}": ids.to(torch.int32) for name, ids in split.items()},
    }
    texts = {
        "format": _FORMAT,
        "names": [name for name, _, _ in entries],
        "caption": [english for _, english, _ in entries],
        "captions": [captions for _, _, captions in entries],
        "skipped": skipped,
    }
    return tensors, texts


def _build_speech(root: Path, names: Sequence[str], language: str, progress: bool):
    """Log-mel of all clips of one language; stamps are named, so that the file serves any order of them."""
    soundfile = extra("soundfile")
    stamps = root / "files" / "stamps"
    suffix = "_desc" if language == "en" else f"_desc_{language}"
    mels, spoken, skipped = [torch.empty(0, N_MELS, dtype=torch.float16)], [], []
    for name in bar(names, f"decoding speech ({language})", progress):
        path = next((p for kind in (".ogg", ".wav") if (p := stamps / f"{name}{suffix}{kind}").is_file()), None)
        if path is None:
            continue
        try:
            with soundfile.SoundFile(path) as f:
                if not 0 < f.frames <= _MAX_SECONDS * f.samplerate:
                    raise ValueError(f"it has {f.frames} samples, expected 1 to {_MAX_SECONDS} s")
                samples = f.read(dtype="float32")
                mels.append(log_mel(torch.from_numpy(samples), f.samplerate).half())
        except (ValueError, OSError, soundfile.SoundFileError) as error:
            skipped.append(f"{path.relative_to(stamps).as_posix()}: {error}")
            continue
        spoken.append(name)
    lengths = torch.tensor([len(m) for m in mels[1:]], dtype=torch.int64)
    texts = {"format": _speech_format(names), "names": spoken, "skipped": skipped}
    return {"mel": torch.cat(mels), "lengths": lengths}, texts


def _speech_format(names: Sequence[str]) -> str:
    """Changes with the stamps that have a picture, so that speech never names one that is not there."""
    return f"{_FORMAT}-{zlib.crc32(chr(10).join(names).encode()):08x}"


def _cached(stem: Path, form: str, build) -> tuple[dict[str, torch.Tensor], dict]:
    built = load(stem)
    if built is None or built[1].get("format") != form:
        built = build()
        stem.parent.mkdir(parents=True, exist_ok=True)
        save(stem, *built)
    return built


def load_stamps(
    speech: bool = False,
    *,
    languages: Sequence[str] = SPEECH_LANGUAGES,
    max_side: int = 160,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> StampSet:
    """Load the stamps; the first call installs the package and reads the pictures (about 10 s), later ones are quick.

    Args:
        speech: also give the spoken captions; each language is decoded once (about 5 s each).
        languages: language codes of the speech: fr, ru, ro, bg, ca, es have about 750 clips each, be 691, el 512,
            da 320, nl 67, en 65, pt_BR 15, ml 6; mostly one speaker each.
        max_side: the longer side of larger pictures is reduced to this, in pixels, 16 to 1024; pictures are never
            enlarged, except SVGs, which are drawn at this size.
        cache: see `install.cache_dir`.
        progress: show bars.

    Raises:
        ValueError: `max_side` outside its range, or a language without any clip.
        InstallError, FetchError: the package cannot be had.
        ImportError: the `data` extra is missing.
    """
    if not 16 <= max_side <= 1024:
        raise ValueError(f"load_stamps: max_side is {max_side}, expected 16 to 1024 pixels")
    folder = cache_dir(cache) / "built"

    def root() -> Path:
        return install("stamps", cache=cache, progress=progress)

    tensors, texts = _cached(folder / f"stamps-{max_side}", _FORMAT, lambda: _build_images(root(), max_side, progress))
    shapes = tensors["shapes"].tolist()
    images = [
        flat.view(3, h, w)
        for flat, (h, w) in zip(tensors["pixels"].split([3 * h * w for h, w in shapes]), shapes, strict=True)
    ]
    out = StampSet(
        images=images,
        caption=texts["caption"],
        captions=texts["captions"],
        label=tensors["label"].long(),
        classes=CLASSES,
        names=texts["names"],
        group=tensors["group"].long(),
        split={name: tensors[f"split.{name}"].long() for name, _ in _SHARES},
        clips=[],
        mel=torch.empty(0, N_MELS, dtype=torch.float16),
        mel_offsets=torch.zeros(1, dtype=torch.int64),
        skipped=texts["skipped"],
    )
    if not speech:
        return out

    index = {name: i for i, name in enumerate(out.names)}
    clips, mels, lengths, skipped = [], [], [], list(out.skipped)
    for language in languages:
        if not re.fullmatch(r"[A-Za-z_@]{2,20}", language):
            raise ValueError(f"load_stamps: {language!r} is no language code; expected for example 'fr' or 'pt_BR'")
        tensors, texts = _cached(
            folder / f"stamps-speech-{language}",
            _speech_format(out.names),
            lambda language=language: _build_speech(root(), out.names, language, progress),
        )
        if not texts["names"]:
            raise ValueError(
                f"load_stamps: no stamp is spoken in {language!r}; well covered are {', '.join(SPEECH_LANGUAGES)}"
            )
        clips += [(index[name], language) for name in texts["names"]]
        mels.append(tensors["mel"])
        lengths.append(tensors["lengths"])
        skipped += texts["skipped"]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
    return replace(out, clips=clips, mel=torch.cat(mels), mel_offsets=offsets, skipped=skipped)
