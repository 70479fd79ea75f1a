"""An all-reduce that was begun and is waited for later."""
from collections.abc import Callable
from typing import Any

from ..arrays import Array


class PendingReduction:
    """An all-reduce under way, which `group.begin_all_reduce` returns."""

    def __init__(self, group: Any, finish: Callable[[], None], x: Array, wire: Array, out: Array):
        self.group, self.x, self.wire, self.out = group, x, wire, out
        self.finish: Callable[[], None] | None = finish
        group.pending.append(self)      # also where the caller drops it: MPI writes into `wire` until it is waited for

    def wait(self) -> Array:
        """Finish the sum, once, and return it."""
        if self.finish is not None:
            with self.group._record("all_reduce", self.x):
                self.finish()
            self.finish = None
            self.group.pending.remove(self)
            self.group._deliver(self.wire, self.out)
        return self.out
