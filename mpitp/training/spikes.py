"""Losses and gradient norms that leap: a sign of damaged weights or data, which no checkpoint should hold."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

STEPS, FEWEST = 32, 8       # the median is that of so many steps, at most and at least


class Spikes:
    """The figures of the last steps, and whether those of the next one leap.

    Parameters
    ----------
    limit : float
        How many times the median of the last steps a figure may be; 0: any.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=STEPS) for name in ("loss", "gradient_norm")}

    def find(self, figures: dict[str, float]) -> str:
        """Return which figure is beyond the limit, in words, "" where none is; then none of them is kept."""
        if not self.limit:
            return ""
        for name, recent in self.recent.items():
            if len(recent) >= FEWEST and figures[name] > self.limit * median(recent):
                return f"found {name} {figures[name]:.6g}, expected at most {self.limit:g} times the " \
                       f"{median(recent):.6g} of the last {len(recent)} steps"
        self.keep(figures)
        return ""

    def keep(self, figures: dict[str, float]) -> None:
        """Add a step's figures."""
        for name, recent in self.recent.items():
            recent.append(figures[name])

    def replay(self, log: Iterable[dict]) -> None:
        """Add the figures of the steps before a resumed run."""
        for line in list(log)[-STEPS:]:
            if all(isinstance(line.get(name), float) for name in self.recent):
                self.keep(line)
