"""Installs data sets into the user's cache with the machine's own package clients.

Nothing is bundled and nothing is downloaded behind the user's back: each set is a recipe of a few packages of ordinary
registries (see `catalog.py`), fetched, unpacked safely, checked, and put in place with one rename.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .archives import BROKEN, UnsafeArchive, unpack
from .catalog import SETS, DataSet, Package
from .clients import CLIENTS

MARKER = "installed.json"


class InstallError(RuntimeError):
    """A set could not be installed; the message says why and what to do. Nothing half-made is left."""


def cache_dir(cache: str | os.PathLike | None = None) -> Path:
    """The folder of all sets: `cache`, else $MMFAST_DATA, $XDG_CACHE_HOME/mmfast, ~/.cache/mmfast."""
    if cache is not None:
        return Path(cache).expanduser()
    if path := os.environ.get("MMFAST_DATA"):
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mmfast"


def find_set(name: str) -> DataSet:
    """The recipe of a set.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SETS:
        raise ValueError(f"install: unknown set {name!r}, expected one of {', '.join(sorted(SETS))}")
    return SETS[name]


def installed(name: str, *, cache: str | os.PathLike | None = None) -> dict | None:
    """What `install` recorded about a set (versions, counts, hashes), or None where it is not installed whole."""
    recipe, root = find_set(name), cache_dir(cache) / name
    record = {}
    for package in recipe.packages:
        try:
            record[package.folder] = json.loads((root / package.folder / MARKER).read_text())
        except (OSError, ValueError):
            return None
    return record


def content_hash(folder: Path) -> str:
    """SHA-256 over the sorted paths and contents of a folder's files, the marker left out."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One installer at a time per set; a second one waits. Where there is no fcntl, the last rename wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _need_space(root: Path, need: int, name: str) -> None:
    free = shutil.disk_usage(root).free
    if free < need:
        raise InstallError(
            f"install: {name} needs {need / 1e6:.0f} MB in {root}, which has {free / 1e6:.0f} MB free; free some space "
            f"or set MMFAST_DATA to a folder on another disk"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _download_bar(package: Package, progress: bool) -> Iterator[Callable[[int], None] | None]:
    """A tqdm bar over bytes on a terminal, one plain line elsewhere."""
    text = f"{package.folder}: {package.name}"
    tqdm = None
    if progress and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            tqdm = None
    if tqdm is None:
        if progress:
            _say(f"fetching {text} ({package.megabytes:g} MB)")
        yield None
        return
    with tqdm(total=int(package.megabytes * 1e6), unit="B", unit_scale=True, desc=text, leave=True) as bar:

        def report(size: int) -> None:
            bar.update(min(size, bar.total) - bar.n)  # npm keeps a second copy in the folder

        yield report
        report(bar.total)


def _archive_of(package: Package, root: Path, progress: bool) -> tuple[Path, bool]:
    """The package's archive: one that the user put into `downloads`, else fetched. True where it is ours to delete."""
    downloads = root / "downloads"
    pattern = package.archive_pattern
    if given := sorted(downloads.glob(pattern)):
        _say(f"using {given[-1]}")
        return given[-1], False
    folder = downloads / f"{package.folder}.part"
    folder.mkdir(parents=True, exist_ok=True)
    with _download_bar(package, progress) as report:
        return CLIENTS[package.client](package.name, folder, root, report), True


def _check(package: Package, folder: Path, archive: Path) -> dict:
    """Count what was unpacked, and hash it where the version is pinned; what the marker will say."""
    count = sum(p.suffix == package.counted for p in folder.rglob("*"))
    low, high = package.bounds
    if not low <= count <= high:
        raise InstallError(
            f"install: {archive.name} holds {count} {package.counted} files, expected {low} to {high}; this release's "
            f"package differs from the known ones, or the archive is broken: try again with force=True (--force)"
        )
    if count != package.known_count:
        _say(
            f"note: {archive.name} holds {count} {package.counted} files, the version known here held "
            f"{package.known_count}; splits and figures can differ a little"
        )
    digest = content_hash(folder)
    if package.sha256 is not None and digest != package.sha256:
        raise InstallError(
            f"install: the content of {package.name} has SHA-256 {digest}, expected {package.sha256}; the registry or "
            f"the file in 'downloads' gave something else: delete it and try again"
        )
    return {"package": package.name, "archive": archive.name, "files": count, "sha256": digest}


def _install_package(recipe: DataSet, package: Package, root: Path, force: bool, progress: bool) -> None:
    target = root / recipe.name / package.folder
    if (target / MARKER).is_file() and not force:
        return
    archive, ours = _archive_of(package, root, progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{package.folder}-", dir=target.parent))
    try:
        limits = {"keep": package.keep, "max_bytes": package.max_bytes, "max_files": package.max_files}
        try:
            unpack(archive, fresh, **limits)
            record = _check(package, fresh, archive)
        except Exception as error:
            if ours:
                archive.unlink(missing_ok=True)  # a broken download must not be taken up again
            if isinstance(error, BROKEN) and not isinstance(error, UnsafeArchive):
                raise InstallError(f"install: {archive.name} is broken ({error}); delete it and try again") from error
            raise
        (fresh / MARKER).write_text(json.dumps(record, indent=1) + "\n")
        fresh.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    if ours:
        shutil.rmtree(archive.parent, ignore_errors=True)


def install(name: str, *, cache: str | os.PathLike | None = None, force: bool = False, progress: bool = True) -> Path:
    """Install a data set and return its folder; immediate where it is installed already.

    Packages are fetched with `apt-get download` and `npm pack`, neither of which needs root. What is already there is
    not fetched again, so an interrupted installation continues where it stopped.

    Args:
        name: a set of `catalog.SETS`, for example "emoji" or "stamps".
        cache: folder to install into; see `cache_dir`.
        force: fetch everything again.
        progress: show what is being fetched, on stderr.

    Returns:
        The set's folder, one sub-folder per package.

    Raises:
        ValueError: unknown name.
        InstallError, FetchError, UnsafeArchive: the set cannot be had; the message says why and what to do.
    """
    recipe, root = find_set(name), cache_dir(cache)
    if installed(name, cache=root) is not None and not force:
        return root / name
    try:
        (root / name).mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            missing = [p for p in recipe.packages if force or not (root / name / p.folder / MARKER).is_file()]
            _need_space(root, sum(p.need_bytes for p in missing), name)
            for package in missing:
                _install_package(recipe, package, root, force, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InstallError(
                f"install: the disk of {root} is full; free some space or set MMFAST_DATA to a folder on another disk"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS):
            raise InstallError(
                f"install: cannot write to {root} ({error.strerror}); set MMFAST_DATA to a folder of yours"
            ) from None
        raise
    if progress:
        for line in recipe.licence:
            _say(f"licence: {line}")
    return root / name


def extra(module: str):
    """Import a module of the `data` extra.

    Raises:
        ImportError: with the one command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"mmfast.data needs {module.partition('.')[0]} here: pip install 'mmfast[data]'") from error
