"""Progress: a tqdm bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts up to `total` with a description and the latest figures.

    Args:
        total: number of units.
        text: what is being done.
        start: units done before (a resumed run).
        every: seconds between plain lines.
        show: False prints nothing.
    """

    def __init__(self, total: int, text: str, *, start: int = 0, every: float = 10.0, show: bool = True):
        self.total, self.text, self.count, self.every, self.show = total, text, start, every, show
        self._figures = ""
        self._begin = self._last = time.monotonic()
        self._start = start
        self._bar = self._make_bar() if show and sys.stderr.isatty() else None

    def _make_bar(self):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=self.total, desc=self.text, initial=self._start, mininterval=0.5, dynamic_ncols=True)

    def update(self, n: int = 1, **figures: float | str) -> None:
        """`n` more units are done; `figures` are shown beside."""
        self.count += n
        if figures:
            self._figures = " ".join(f"{k} {v if isinstance(v, str) else format(v, '.4g')}" for k, v in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(n)
        elif self.show and time.monotonic() - self._last >= self.every:
            self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        passed = self._last - self._begin
        done = max(1, self.count - self._start)
        left = passed / done * (self.total - self.count)
        print(
            f"{self.text}: {self.count}/{self.total} {self._figures} ({passed:.0f} s, about {left:.0f} s left)".replace(
                "  ", " "
            ),
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.show and self.count > self._start:
            self._line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()
