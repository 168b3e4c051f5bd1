"""`mmfast data list | install NAME | info NAME`."""

from __future__ import annotations

import argparse
import sys

from .archives import UnsafeArchive
from .catalog import SETS, DataSet
from .clients import FetchError
from .install import InstallError, cache_dir, find_set, install, installed


def _list(args: argparse.Namespace) -> int:
    for recipe in SETS.values():
        state = "installed" if installed(recipe.name, cache=args.cache) else "not installed"
        print(f"{recipe.name}  ({recipe.megabytes:.0f} MB to download, {state})")
        print(f"  {recipe.summary}")
        for line in recipe.licence:
            print(f"  licence: {line}")
    print(f"cache: {cache_dir(args.cache)}")
    return 0


def _size(recipe: DataSet, args: argparse.Namespace) -> float:
    root = cache_dir(args.cache)
    files = [*(root / recipe.name).rglob("*"), *(root / "built").glob(f"{recipe.name}-*")]
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e6


def _info(args: argparse.Namespace) -> int:
    recipe = find_set(args.name)
    record = installed(recipe.name, cache=args.cache)
    print(f"{recipe.name}: {recipe.summary}")
    for package in recipe.packages:
        have = (record or {}).get(package.folder)
        state = (
            f"{have['archive']}, {have['files']} {package.counted} files, SHA-256 {have['sha256'][:16]}" if have else ""
        )
        print(f"  {package.folder}: {package.client} {package.name}, {package.megabytes:g} MB  {state}".rstrip())
    for line in recipe.licence:
        print(f"  licence: {line}")
    if record:
        print(f"  in {cache_dir(args.cache) / recipe.name}, {_size(recipe, args):.0f} MB with what was built from it")
    else:
        print(f"  not installed: mmfast data install {recipe.name}")
    return 0


def _install(args: argparse.Namespace) -> int:
    print(install(args.name, cache=args.cache, force=args.force, progress=not args.quiet))
    return 0


def _guarded(command):
    """Say what is wrong in one sentence, without a traceback."""

    def run(args: argparse.Namespace) -> int:
        try:
            return command(args)
        except (ValueError, FetchError, InstallError, UnsafeArchive, OSError) as error:
            print(error, file=sys.stderr)
            return 1

    return run


def add_commands(subparsers) -> None:
    """Add `data` to the main command's sub-parsers; each command sets `run`, a function of the parsed arguments.

    Args:
        subparsers: what `ArgumentParser.add_subparsers()` returned.
    """
    data = subparsers.add_parser("data", help="list, install and describe data sets")
    data.add_argument("--cache", help="folder of the data sets (default: $MMFAST_DATA or the user's cache)")
    commands = data.add_subparsers(dest="data_command", required=True)

    commands.add_parser("list", help="all sets: what they hold, size, licence").set_defaults(run=_guarded(_list))

    command = commands.add_parser("install", help="fetch a set with apt-get and npm into the cache")
    command.add_argument("name", choices=sorted(SETS))
    command.add_argument("--force", action="store_true", help="fetch again what is installed")
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(run=_guarded(_install))

    command = commands.add_parser("info", help="packages, versions and licence of a set")
    command.add_argument("name", choices=sorted(SETS))
    command.set_defaults(run=_guarded(_info))
