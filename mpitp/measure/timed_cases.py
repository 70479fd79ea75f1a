"""Cases of a calibration: what is timed, on which arrays, how often, and what came out."""
from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array, compute_dtype, sum_dtype
from ..comm.grid_nodes import nodes_of
from ..comm.group import TensorParallelGroup
from ..errors import require
from .timers import timer_of

Point = tuple[str, str, tuple[int, ...]]            # table, operation, size
Case = tuple[Point, Callable[[], Any]]

SCORED_HEADS, READ_HEADS = 4, 8
LEAST_SECONDS = 2e-3                                # that a case is repeated for


@dataclass(frozen=True)
class Sizes:
    """The sizes that are timed; between them times are interpolated.

    Attributes
    ----------
    rows, sides : tuple of int
        Of products: rows of x (up to 64 they are computed the other way round), in and out features.
    tokens, features : tuple of int
        Of attention.
    keys : tuple of int
        That a token attends to.
    elements : tuple of int
        Of operations on arrays.
    reads, messages : tuple of int
        Bytes. Reads that would take too much of the memory are left out.
    """
    rows: tuple[int, ...] = (1, 2, 8, 16, 64, 96, 256, 1024)
    sides: tuple[int, ...] = (64, 256, 1024, 4096)
    tokens: tuple[int, ...] = (16, 64, 256, 1024)
    features: tuple[int, ...] = (16, 64, 512)
    keys: tuple[int, ...] = (4, 64, 1024, 4096)
    elements: tuple[int, ...] = (64, 1 << 12, 1 << 16, 1 << 19, 1 << 22)
    reads: tuple[int, ...] = tuple(1 << exponent for exponent in (16, 18, 20, 22, 24, 26, 28, 29))
    messages: tuple[int, ...] = tuple(8 ** exponent for exponent in range(1, 9))

    def most(self) -> int:
        """Return the numbers of the largest array."""
        return max(self.rows[-1] * self.sides[-1], self.sides[-1] ** 2, self.elements[-1], 1 << 18,
                   self.tokens[-1] * self.features[-1] * SCORED_HEADS, self.keys[-1] * READ_HEADS * 64)


class Hosts:
    """The hosts of a group: how many, how many ranks each has, and the ranks of this one as a group.

    Parameters
    ----------
    group : TensorParallelGroup
        As many ranks on each host. Collective.

    Raises
    ------
    InputError
        For hosts with different numbers of ranks, which would not have the same cases.
    """

    def __init__(self, group: TensorParallelGroup):
        nodes = nodes_of(group.comm)
        self.count = len(set(nodes))
        self.ranks = max(map(nodes.count, nodes))
        require(self.ranks * self.count == len(nodes), f"{len(nodes)} ranks on {self.count} hosts, up to {self.ranks} "
                                                       f"on one", "as many on each, to calibrate them")
        inside = group if self.count == 1 else group.subgroup(nodes[group.rank])
        assert inside is not None, "every rank has a node"
        self.inside = inside


class TimedCases:
    """TimedCases are the arrays of a calibration, its cases, and the times of each.

    On a GPU a time is what the GPU takes, without what Python takes to start it.

    Parameters
    ----------
    group : TensorParallelGroup
        Of one host, or of several. Collective.
    dtype : str
        Of the products.
    sizes : Sizes or None
        What is timed; None: all of Sizes().
    """

    def __init__(self, group: TensorParallelGroup, dtype: str = "float32", sizes: Sizes | None = None):
        self.group, self.dtype, self.sizes = group, compute_dtype(dtype, group.device), sizes or Sizes()
        self.xp, self.sums, self.hosts = group.xp, sum_dtype(self.dtype), Hosts(group)
        most, generator = self.sizes.most(), np.random.default_rng(5)
        self.buffers = [self.xp.asarray(generator.standard_normal(most).astype(self.dtype)) for _ in range(2)]
        self.buffers += [self.ones(most) for _ in range(2)]
        self.timer = timer_of(group, int(most ** 0.5))
        self.seconds: defaultdict[Point, list[float]] = defaultdict(list)
        self.repeats: dict[Point, int] = {}

    def time(self, point: Point, function: Callable[[], Any], walls: bool = False) -> None:
        """Time one case, repeated until it takes long enough. Collective.

        walls : whether the host's clock counts on a GPU, too
        """
        comm, measured = self.group.comm, self.timer.walls if walls else self.timer.seconds
        if point not in self.repeats:
            function()                                          # warm
            once = comm.bcast(self.timer.walls(function, 1))
            self.repeats[point] = min(self.timer.most_calls, max(1, int(LEAST_SECONDS / max(once, 1e-7))))
        repeats = self.repeats[point]
        if repeats > 1:
            function()                                          # warm again, where that costs little
        comm.Barrier()
        self.seconds[point].append(max(comm.allgather(measured(function, repeats))))

    def ones(self, *shape: int) -> Array:
        """Return an array of ones, made on the host, where every dtype can be."""
        return self.xp.asarray(np.ones(shape, self.dtype))

    def view(self, number: int, *shape: int) -> Array:
        """Return an array of this shape at the beginning of one of the buffers."""
        count = int(np.prod(shape))
        return self.buffers[number][:count].reshape(shape)

    def sum_view(self, *shape: int) -> Array:
        """Return an array of this shape whose dtype is that of sums and gradients."""
        return self.view(2, *shape) if self.sums == self.dtype else self.xp.empty(shape, self.sums)

    def median(self, table: str, what: str, size: tuple[int, ...]) -> float:
        """Return the median over the passes of one case."""
        return statistics.median(self.seconds[table, what, size])
