"""Built sets on disk: one safetensors file of tensors and one JSON of names, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch


def _file_mode() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


def save(stem: Path, tensors: dict[str, torch.Tensor], texts: dict) -> None:
    """Write `stem`.safetensors and `stem`.json; the JSON goes last, so its presence means that both are whole."""
    from safetensors.torch import save_file

    def place(suffix: str, write) -> None:
        scratch = stem.with_name(f".{stem.name}{suffix}.{os.getpid()}")
        try:
            write(scratch)
            scratch.chmod(_file_mode())  # safetensors writes files that only their owner can read
            os.replace(scratch, stem.with_name(stem.name + suffix))
        finally:
            scratch.unlink(missing_ok=True)

    stem.with_name(stem.name + ".json").unlink(missing_ok=True)
    place(".safetensors", lambda path: save_file(tensors, path))
    place(".json", lambda path: path.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8"))


def load(stem: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """What `save` wrote, or None where it is missing or broken, so that it is built again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        texts = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
        return load_file(stem.with_name(stem.name + ".safetensors")), texts
    except (OSError, ValueError, SafetensorError):
        return None


def bar(items, text: str, progress: bool, total: int | None = None):
    """Iterate with a tqdm bar where tqdm is there and `progress` is set."""
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            return items
        return tqdm(items, desc=text, total=total, mininterval=0.5)
    return items
