"""Checkpoints: one folder per step, written whole or not at all, never pickled.

    step-00000300/model.safetensors      weights of the model and of the task's own modules, ready for use
    step-00000300/training.safetensors   optimiser moments, weights before averaging, random number generators
    step-00000300/state.json             step, settings, recipe, state of the batches, SHA-256 of the two files

The folder is written under another name and put in place with one rename, so a run that dies while writing leaves the
checkpoint before it as the last one. Hashes are checked on loading: safetensors itself accepts a flipped byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = 1
FILES = ("model.safetensors", "training.safetensors")
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why and what to do."""


# Finding


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    found = [p for p in Path(folder).glob("step-*") if _NAME.fullmatch(p.name) and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint that `path` names: a checkpoint's own folder, a run's folder, or its `checkpoints`; the last one.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if found := checkpoints(folder):
            return found[-1]
    raise CheckpointError(
        f"checkpoint: {path} holds none; expected a folder of a run (as given to --out), or one named step-NNNNNNNN "
        "with a state.json"
    )


# Writing


def save_checkpoint(folder: Path, step: int, model: dict, training: dict, state: dict, *, keep: int = 2) -> Path:
    """Write the checkpoint of a step and delete all but the last `keep`.

    Args:
        folder: of all checkpoints of the run; made if missing.
        step: optimiser steps done.
        model, training: tensors by name.
        state: what goes into state.json beside step, format and hashes.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    scratch = folder / f".step-{step:08d}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".step-*"):  # left by a run that died while writing
            shutil.rmtree(old, ignore_errors=True)
        scratch.mkdir()
        hashes = {}
        for name, tensors in zip(FILES, (model, training)):
            save_file({k: _plain(v) for k, v in tensors.items()}, scratch / name)
            hashes[name] = _sha256(scratch / name)
        text = json.dumps({"format": FORMAT, "step": step, "sha256": hashes, **state}, indent=1)
        (scratch / "state.json").write_text(text + "\n", encoding="utf-8")
        for path in scratch.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_why(error, target, checkpoints(folder))) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=False).contiguous()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        total = hashlib.sha256()
        while block := f.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _why(error: Exception, target: Path, kept: list[Path]) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "StorageFull" in str(error) or "No space" in str(error)
    last = f"the last whole checkpoint is {kept[-1]}" if kept else "no checkpoint of this run is there yet"
    if full:
        return (
            f"checkpoint: the disk of {target.parent} is full, so {target.name} is not written; {last}; "
            "free some space and start again to continue from it"
        )
    return f"checkpoint: cannot write {target}: {error}; {last}"


# Reading


def load_checkpoint(path: str | os.PathLike, *, training: bool = True) -> tuple[dict, dict, dict]:
    """Read a checkpoint: model tensors, training tensors (empty without `training`), state.

    Raises:
        CheckpointError: missing, broken, or written by a newer mmfast.
    """
    path = find_checkpoint(path)
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("format"), int):
            raise CheckpointError(f"checkpoint: {path / 'state.json'} is no state of mmfast.train")
        if state["format"] > FORMAT:
            raise CheckpointError(
                f"checkpoint: {path} has format {state['format']}, this mmfast reads up to {FORMAT}; update mmfast"
            )
        tensors = []
        for name in FILES[: 2 if training else 1]:
            if _sha256(path / name) != state["sha256"][name]:
                raise CheckpointError(
                    f"checkpoint: {path / name} was changed or cut short after it was written; delete {path} to "
                    "continue from the checkpoint before it"
                )
            tensors.append(load_file(path / name))
        return (*tensors, *([] if training else [{}]), state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error}; delete it to use the one before") from error


def load_weights(module: nn.Module, tensors: dict[str, Tensor], *, what: str, strict: bool = True) -> list[str]:
    """Copy tensors into a module and return the names of the module's tensors that were not among them.

    Args:
        module: gets the weights.
        tensors: by the names of its `state_dict`.
        what: for messages: what the weights come from.
        strict: names must agree; else those that both have, with equal shapes, are taken (transfer to a new task).

    Raises:
        CheckpointError: a name or shape differs (with `strict`), or nothing fits.
    """
    own = module.state_dict()
    missing = [n for n in own if n not in tensors]
    unknown = [n for n in tensors if n not in own]
    other = [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if strict and (missing or unknown or other):
        wrong = [f"{n} is missing" for n in missing] + [f"{n} is not of this model" for n in unknown]
        wrong += [f"{n} has shape {list(tensors[n].shape)}, expected {list(own[n].shape)}" for n in other]
        raise CheckpointError(f"checkpoint: {what} does not fit the model: {'; '.join(wrong[:4])}")
    fits = {n: t for n, t in tensors.items() if n in own and n not in other}
    if not fits and own:
        raise CheckpointError(f"checkpoint: {what} has no weight that fits the model")
    module.load_state_dict(fits, strict=False)
    return sorted(set(own) - set(fits))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one module of `module_tensors`, by the module's own names."""
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}.")}


# The optimiser and the random numbers, as tensors


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's state as `optimizer/<parameter>/<field>`; numbers become tensors of one float64."""
    return {
        f"optimizer/{names[parameter]}/{field}": value
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64)
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    by_name = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, name, field = key.split("/")
            parameter = by_name[name]
            # AdamW keeps its step count on the CPU; moments lie where the parameter lies.
            place = parameter.device if value.dim() else value.device
            optimizer.state[parameter][field] = value.to(place).clone()


def random_tensors() -> dict[str, Tensor]:
    """States of the random number generators of torch, NumPy and Python."""
    _, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, python_gauss = random.getstate()
    states = {
        "random/torch": torch.get_rng_state(),
        "random/numpy": torch.from_numpy(np.array([*keys, position, has_gauss], dtype=np.int64)),
        "random/numpy_gauss": torch.tensor(gauss, dtype=torch.float64),
        "random/python": torch.tensor([version, *words, python_gauss is not None], dtype=torch.int64),
        "random/python_gauss": torch.tensor(python_gauss or 0.0, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states |= {f"random/cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def load_random(tensors: dict[str, Tensor]) -> None:
    """The inverse of `random_tensors`."""
    torch.set_rng_state(tensors["random/torch"])
    *keys, position, has_gauss = tensors["random/numpy"].tolist()
    gauss = tensors["random/numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, *words, has_python = tensors["random/python"].tolist()
    random.setstate((version, tuple(words), tensors["random/python_gauss"].item() if has_python else None))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"random/cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random/cuda{i}"], i)


def module_tensors(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """`state_dict`s of several modules in one dictionary, each name after its module's prefix.

    Tensors that share memory are written once each: a safetensors file holds no aliases.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in modules:
        for name, value in module.state_dict().items():
            out[f"{prefix}.{name}"] = value.clone() if value.numel() and value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    return out
