"""The run's log: JSON lines, and TensorBoard events where asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path


class RunLog:
    """Appends one JSON object per line to `log.jsonl`; a resumed run first drops the lines after its checkpoint.

    Args:
        folder: of the run.
        step: steps done when the run (re)starts; lines of later steps are dropped.
        tensorboard: also write TensorBoard events to `folder / "tensorboard"`.
    """

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool = False):
        self.path = Path(folder) / "log.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(self.path) if line["step"] <= step] if step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = _events(Path(folder) / "tensorboard", step) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """One line; NaN and infinity, which JSON lacks, become null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _events(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "TrainConfig: tensorboard=True needs the package tensorboard: pip install 'mmfast[train]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step or None)


def read_log(path: Path) -> list[dict]:
    """The lines of a log; a last line that was cut short is left out."""
    path = Path(path)
    path = path / "log.jsonl" if path.is_dir() else path
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines
