"""How long a case takes: by the clock of the host, or by events of a GPU that does not wait for the host."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from ..comm.group import TensorParallelGroup
from ..ops.linear import product

HELD_SIDE = 2048            # of the product that keeps a GPU busy
MOST_CALLS = 40             # that are given to a GPU while it is: its queue holds about a thousand kernels


class HostTimer:
    """Times cases on the CPU."""
    most_calls = 1 << 20

    def seconds(self, function: Callable[[], Any], repeats: int) -> float:
        """Return the seconds of one call, of so many in a row."""
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats

    walls = seconds


class DeviceTimer:
    """Times what a GPU does in a case, without what Python takes to start it. seconds() is collective.

    The GPU is kept busy with products until the host has given it all calls; events in front of them and behind them
    say how long it then worked. A case that waits for the GPU counts with its wait.

    Parameters
    ----------
    group : TensorParallelGroup
        On a GPU.
    side : int
        Of the products' matrices.
    """
    most_calls = MOST_CALLS

    def __init__(self, group: TensorParallelGroup, side: int = HELD_SIDE):
        self.comm, self.cuda = group.comm, group.xp.cuda
        self.a, self.b = (group.xp.ones((side, side), "float32") for _ in range(2))
        self.out = group.xp.empty_like(self.a)
        self.hold()
        self.held_seconds = max(self.walls(self.hold, 8), 1e-6)

    def hold(self) -> None:
        """Keep the GPU busy for a while."""
        product(self.a, self.b, self.out)

    def walls(self, function: Callable[[], Any], repeats: int) -> float:
        """Return the seconds of one call, of so many in a row, until the GPU has done them, by the host's clock."""
        stream = self.cuda.get_current_stream()
        stream.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        stream.synchronize()
        return (time.perf_counter() - start) / repeats

    def seconds(self, function: Callable[[], Any], repeats: int) -> float:
        """Return the seconds of one call on the GPU, of so many in a row. Collective."""
        stream = self.cuda.get_current_stream()
        given = max(self.comm.allgather(self.walls(function, 1))) * repeats     # all GPUs are busy as long
        for _ in range(math.ceil(given / self.held_seconds) + 1):
            self.hold()
        begin = stream.record()
        for _ in range(repeats):
            function()
        end = stream.record()
        end.synchronize()
        return max(1e-7, self.cuda.get_elapsed_time(begin, end) * 1e-3 / repeats)


def timer_of(group: TensorParallelGroup, side: int = HELD_SIDE) -> HostTimer | DeviceTimer:
    """Return what times cases of this group."""
    return HostTimer() if group.device == "cpu" else DeviceTimer(group, min(side, HELD_SIDE))
