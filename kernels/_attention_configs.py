"""Tile sizes, warps and pipeline stages of the attention kernels, per architecture, dtype and head dimension."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmfast.kernels._attention_plan import Side
from mmfast.kernels._attention_tiles import Problem
from mmfast.kernels._common import INTERPRETED, Config, fastest, multiprocessors, size_class

# (BLOCK_M, BLOCK_N, warps, stages) by head dimension rounded up to 64, 128 or 256: of the forward pass, of dk and dv,
# of dq. "mixed": for masks whose rules differ between modalities, where given. Chosen so that nothing spills (see
# tests/aot_budget.txt); not yet timed on a GPU, which MMFAST_AUTOTUNE=1 does.
_HOPPER = {
    "forward": {64: (128, 128, 8, 3), 128: (128, 128, 8, 3), 256: (128, 32, 8, 3)},
    "forward mixed": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
    "dkdv": {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 2)},
    "dkdv mixed": {64: (32, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
}
_BLACKWELL = {
    **_HOPPER,
    "forward": {**_HOPPER["forward"], 128: (128, 64, 8, 3)},
    "dkdv mixed": {**_HOPPER["dkdv mixed"], 128: (32, 64, 8, 2)},
}
_AMPERE = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "forward mixed": {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2)},
    "dkdv": {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
}
_LITTLE_SHARED_MEMORY = {**_AMPERE, "dq": {**_AMPERE["dq"], 256: (32, 32, 8, 2)}}
_AMD = {
    "forward": {64: (128, 64, 4, 1), 128: (128, 64, 4, 1), 256: (64, 32, 4, 1)},
    "dkdv": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1)},
    "dq": {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
}
_FLOAT32 = {
    "forward": {64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)},
    "dkdv": {64: (32, 32, 8, 2), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    "dq": {64: (32, 32, 8, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
}
# Small tiles, so that short samples have several; tests change them.
INTERPRETED_TILES = {"forward": (16, 32, 4, 1), "dkdv": (16, 32, 4, 1), "dq": (32, 16, 4, 1)}
_SHORT = 32  # queries per sample, times the heads of a group, that still fit into one small tile
_MOST_PARTS = 16


def _table(problem: Problem) -> dict:
    if problem.dtype == torch.float32:
        return _FLOAT32
    if not problem.architecture.startswith("sm_"):
        return _AMD
    version = int(problem.architecture[3:])
    if version in (80, 87):
        return _AMPERE
    if version < 90 or version >= 120:
        return _LITTLE_SHARED_MEMORY
    return _HOPPER if version < 100 else _BLACKWELL


def _choose(kernel: str, problem: Problem) -> Config:
    if INTERPRETED:
        tiles = INTERPRETED_TILES[kernel]
    else:
        table = _table(problem)
        table = table.get(f"{kernel} mixed", table[kernel]) if problem.rule == 0 else table[kernel]
        tiles = table[min(size for size in table if size >= problem.dim)]
    block_m, block_n, warps, stages = tiles
    if problem.dropout_p > 0:  # drawn for 64 keys at once, by many threads
        block_n, warps, stages = 64, 8, 1 if kernel == "dkdv" else stages
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages)


def forward(problem: Problem, queries: Side) -> tuple[int, Config]:
    """How many heads share a tile of queries, and its configuration."""
    config = _choose("forward", problem)
    rows = -(-queries.rows // max(queries.batch, 1))
    pack = problem.group if problem.group in (2, 4, 8, 16) and rows * problem.group <= _SHORT else 1
    if rows * pack > _SHORT:
        return 1, config
    block_m = 16 if rows * pack <= 16 else 32
    return pack, config._replace(constants={**config.constants, "BLOCK_M": block_m}, num_warps=4)


def backward(kernel: str, problem: Problem) -> Config:
    return _choose(kernel, problem)


def parts(programs: int, tiles: int, device: torch.device) -> int:
    """Among how many programs one tile's work is divided: few enough that each has two tiles on average."""
    wanted = min(2 * multiprocessors(device) // max(programs, 1), tiles // 2, _MOST_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1


def sorted_first(programs: int, device: torch.device) -> bool:
    """Whether tiles with most work go first: it matters where programs do not all run at once."""
    return programs > 2 * multiprocessors(device)


def rows_per_program(block_d: int) -> int:
    """Of the kernels that read rows once."""
    return 2048 // block_d


def run(
    kernel: str, problem: Problem, config: Config, queries: Side, keys: Side, launch: Callable[[Config], None], pack=1
) -> None:
    """Launches with `config`, or with MMFAST_AUTOTUNE=1 with the fastest of several, found at the first call."""
    sizes = (side.rows for side in (queries, keys)), (side.rows // max(side.batch, 1) for side in (queries, keys))
    key = ("attention", kernel, *problem, pack, *(size_class(*of) for of in sizes))
    launch(fastest(key, config, lambda: candidates(problem, pack), launch))


def candidates(problem: Problem, pack: int) -> list[Config]:
    """Tiles that may fit: of at most 4096 scores where rows are long, and of whole groups of keys with dropout."""
    most = 64 * 64 if problem.dim > 128 or problem.dtype == torch.float32 else 128 * 128
    return [
        Config({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)
        for m in ((16, 32) if pack > 1 else (32, 64, 128))
        for n in ((64, 128) if problem.dropout_p > 0 else (32, 64, 128))
        for warps in (4, 8)
        for stages in (1, 2, 3)
        if m * n <= most
    ]
