"""Safe unpacking of Debian packages (.deb), npm tarballs (.tgz) and Python wheels (.whl).

An archive is read as one stream. A member with an absolute path, a `..`, or a link that leads outside refuses the
whole archive; so does an archive that holds more bytes or files than its recipe allows. Only members that the recipe
asks for are written, always as plain files: links and devices never are.
"""

from __future__ import annotations

import io
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

AR_MAGIC = b"!<arch>\n"


# What reading a damaged or cut archive can raise.
BROKEN = (EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error, zipfile.BadZipFile)


class UnsafeArchive(ValueError):
    """An archive that would write outside its folder, or more than its recipe allows."""


def _inside(name: str, base: PurePosixPath | None = None) -> PurePosixPath:
    """Normalise a member's path; raise UnsafeArchive where it is absolute or climbs above the archive's root."""
    if "\x00" in name or "\\" in name or name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        raise UnsafeArchive(f"unpack: the archive holds the path {name!r}, expected a relative path; nothing kept")
    parts: list[str] = list(base.parts) if base is not None else []
    for part in PurePosixPath(name).parts:
        if part == "..":
            # A link may point upwards inside the archive; a member's own path may not.
            if base is None or not parts:
                raise UnsafeArchive(f"unpack: the archive holds the path {name!r}, which leads outside; nothing kept")
            parts.pop()
        elif part != ".":
            parts.append(part)
    return PurePosixPath(*parts)


def extract_tar(
    stream: IO[bytes],
    target: Path,
    *,
    keep: Callable[[str], str | None] = lambda name: name,
    max_bytes: int = 1 << 30,
    max_files: int = 100_000,
    max_file_bytes: int = 1 << 28,
) -> int:
    """Write the wanted files of an uncompressed tar stream under `target`.

    Args:
        stream: the tar, read forwards only.
        target: folder to write to; made if missing.
        keep: maps a member's path inside the archive to its path under `target`, or to None to leave it out.
        max_bytes: the most bytes all members may hold together, wanted or not.
        max_files: the most members.
        max_file_bytes: the most bytes of one member.

    Returns:
        The number of files written.

    Raises:
        UnsafeArchive: where the archive leads outside or is larger than allowed.
        tarfile.TarError, EOFError: where it is broken or cut short.
    """
    total = written = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for count, member in enumerate(tar, start=1):
            path = _inside(member.name)
            if member.issym():
                _inside(member.linkname, path.parent)
            elif member.islnk():
                _inside(member.linkname)
            total += member.size
            if count > max_files or total > max_bytes or member.size > max_file_bytes:
                raise UnsafeArchive(
                    f"unpack: the archive is larger than allowed at member {member.name!r}: {count} members of at most "
                    f"{max_files}, {total} bytes of at most {max_bytes}, this one {member.size} of {max_file_bytes}"
                )
            wanted = keep(str(path)) if member.isreg() else None
            if wanted is None:
                continue
            out = target / _inside(wanted)
            out.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            with open(out, "wb") as f:
                shutil.copyfileobj(source, f, 1 << 20)
            if out.stat().st_size != member.size:
                raise EOFError(f"unpack: {member.name!r} is cut short")
            written += 1
    # What follows the tar's end carries the compressor's checksum: read it, so that a cut archive is noticed.
    while chunk := stream.read(1 << 16):
        total += len(chunk)
        if total > 2 * max_bytes:
            raise UnsafeArchive(f"unpack: more than {max_bytes} bytes follow the end of the archive")
    return written


def extract_zip(
    path: Path,
    target: Path,
    *,
    keep: Callable[[str], str | None] = lambda name: name,
    max_bytes: int = 1 << 30,
    max_files: int = 100_000,
    max_file_bytes: int = 1 << 28,
) -> int:
    """Write the wanted files of a zip (a Python wheel) under `target`; arguments, returns and errors as `extract_tar`.

    Raises:
        zipfile.BadZipFile: where it is broken or cut short.
    """
    written = 0
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total, largest = sum(m.file_size for m in members), max((m.file_size for m in members), default=0)
        if len(members) > max_files or total > max_bytes or largest > max_file_bytes:
            raise UnsafeArchive(
                f"unpack: {path.name} is larger than allowed: {len(members)} members of at most {max_files}, {total} "
                f"bytes of at most {max_bytes}, one with {largest} of at most {max_file_bytes}"
            )
        for member in members:
            name = _inside(member.filename)
            wanted = None if member.is_dir() else keep(str(name))
            if wanted is None:
                continue
            out = target / _inside(wanted)
            out.parent.mkdir(parents=True, exist_ok=True)
            # zipfile stops at the declared size and checks the CRC, so a member cannot grow beyond the sums above.
            with archive.open(member) as source, open(out, "wb") as f:
                shutil.copyfileobj(source, f, 1 << 20)
            written += 1
    return written


class _Decompress(io.RawIOBase):
    """A readable stream over a decompressor object, so that a large tar never lies in memory whole."""

    def __init__(self, source: IO[bytes], decompressor) -> None:
        self._source, self._decompressor, self._ready = source, decompressor, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            if self._decompressor.eof:
                return 0
            chunk = self._source.read(1 << 16)
            if not chunk:
                raise EOFError("unpack: the archive is cut short")
            self._ready = self._decompressor.decompress(chunk)
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


class _Limited(io.RawIOBase):
    """The next `size` bytes of a file, as a stream: one member of an ar archive."""

    def __init__(self, source: IO[bytes], size: int) -> None:
        self._source, self._left = source, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        chunk = self._source.read(min(len(buffer), self._left))
        if not chunk and self._left:
            raise EOFError("unpack: the .deb is cut short")
        buffer[: len(chunk)] = chunk
        self._left -= len(chunk)
        return len(chunk)


def _decompressor(name: str):
    suffix = name.rpartition(".")[2]
    if suffix == "tar":
        return None
    if suffix in ("xz", "lzma"):
        return lzma.LZMADecompressor()
    if suffix == "gz":
        return zlib.decompressobj(wbits=31)
    if suffix == "zst":
        try:
            from compression.zstd import ZstdDecompressor  # Python 3.14 and later
        except ImportError:
            try:
                from zstandard import ZstdDecompressor as Zstandard
            except ImportError:
                raise RuntimeError(
                    f"unpack: {name} is compressed with zstd and this machine has no dpkg-deb; pip install zstandard"
                ) from None
            return Zstandard().decompressobj()
        return ZstdDecompressor()
    raise ValueError(f"unpack: {name} is compressed in a way not known here; expected .xz, .gz or .zst")


@contextmanager
def _deb_tar_python(path: Path) -> Iterator[IO[bytes]]:
    """The uncompressed data tar of a .deb, read without dpkg-deb. Format: deb(5), ar with 60-byte headers."""
    with open(path, "rb") as f:
        if f.read(8) != AR_MAGIC:
            raise ValueError(f"unpack: {path.name} is no .deb: it does not start with {AR_MAGIC!r}")
        while header := f.read(60):
            if len(header) < 60 or header[58:] != b"`\n":
                raise EOFError(f"unpack: {path.name} is broken or cut short")
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            size = int(header[48:58])
            if name.startswith("data.tar"):
                member = io.BufferedReader(_Limited(f, size))
                decompressor = _decompressor(name)
                yield io.BufferedReader(_Decompress(member, decompressor)) if decompressor else member
                return
            f.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"unpack: {path.name} holds no data.tar")


@contextmanager
def _deb_tar_dpkg(path: Path) -> Iterator[IO[bytes]]:
    """The same through `dpkg-deb --fsys-tarfile`, which knows every compression Debian uses."""
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process.stdout
            error = process.stderr.read().decode("utf-8", "replace").strip()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise EOFError(f"unpack: dpkg-deb refuses {path.name}: {error}")


def unpack(path: Path, target: Path, **limits) -> int:
    """Unpack a .deb, a .tgz or a .whl under `target`; arguments, returns and errors as `extract_tar`.

    Raises:
        ValueError: also where the file is none of the three.
    """
    with open(path, "rb") as f:
        magic = f.read(8)
    if magic == AR_MAGIC:
        reader = _deb_tar_dpkg if shutil.which("dpkg-deb") else _deb_tar_python
        with reader(path) as stream:
            return extract_tar(stream, target, **limits)
    if magic[:2] == b"\x1f\x8b":
        with open(path, "rb") as f:
            return extract_tar(io.BufferedReader(_Decompress(f, _decompressor("tar.gz"))), target, **limits)
    if magic[:4] == b"PK\x03\x04":
        return extract_zip(path, target, **limits)
    raise ValueError(f"unpack: {path.name} is no .deb, .tgz or .whl (it starts with {magic!r})")
