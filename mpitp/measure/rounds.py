"""Times of things that all ranks do together, in interleaved rounds.

A machine that slows down slows every case of a round, so that ratios within a round still mean something.
"""
from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..comm.group import TensorParallelGroup

Case = Callable[[], Any]


@dataclass
class Timing:
    """Seconds of one call on the slowest rank.

    Parameters
    ----------
    median, least, most : float
        Over the rounds.
    rounds : int
    """
    median: float
    least: float
    most: float
    rounds: int


def interleave(group: TensorParallelGroup, cases: Mapping[str, Case], rounds: int,
               least_seconds: float = 0.0) -> dict[str, list[float]]:
    """Time each case once a round, A B C A B C ... Collective.

    Parameters
    ----------
    group : TensorParallelGroup
    cases : dict
    rounds : int
    least_seconds : float
        A case that is faster is called several times a round, and the mean counts.

    Returns
    -------
    dict
        {name: seconds of each round, the slowest rank's}, on every rank.
    """
    repeats = {}
    for name, function in cases.items():            # warm up, and find out how often to call
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, round(least_seconds / max(1e-9, time.perf_counter() - start)))
    repeats = group.comm.bcast(repeats)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    for _ in range(rounds):
        for name, function in cases.items():
            group.comm.Barrier()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    of_ranks = group.comm.allgather(seconds)
    return {name: [max(times) for times in zip(*(rank[name] for rank in of_ranks))] for name in cases}


def finished(group: TensorParallelGroup, function: Case) -> Case:
    """Return the case, and on a GPU the case with a wait until the GPU has done what it was told."""
    return function if group.device == "cpu" else Synchronised(group, function).run


class Synchronised:
    """A case on a GPU that ends when the GPU is through."""

    def __init__(self, group: TensorParallelGroup, function: Case) -> None:
        self.group, self.function = group, function

    def run(self) -> None:
        """Run the case, and wait for the GPU."""
        self.function()
        self.group.xp.cuda.get_current_stream().synchronize()


def timing(seconds: list[float]) -> Timing:
    """Return median, least and most of the times of all rounds."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def ratio(seconds: list[float], base: list[float]) -> float:
    """Return the median over the rounds of one case's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base))
