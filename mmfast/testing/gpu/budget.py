"""Device time is scarce: a part of the suite stops in time, and says what it left out."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Asked before each piece of work whether there is time for one more, as long as the longest so far."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock, self.begin = seconds, clock, clock()
        self.longest, self.asked = 0.0, None
        self.left_out: list[str] = []

    def left(self) -> float:
        """Seconds."""
        return self.begin + self.seconds - self.clock()

    def fits(self, name: str) -> bool:
        """Whether to begin with `name`; if not, it is noted in `left_out`."""
        now = self.clock()
        if self.asked is not None:
            self.longest = max(self.longest, now - self.asked)
        fits = self.left() > self.longest
        self.asked = now if fits else None
        if not fits:
            self.left_out.append(name)
        return fits
