"""Ranks for the plain programs of the zoo: of MPI, or simulated by threads of one process.

A program is a function of `comm`, which has rank, size, all_gather, all_reduce and reduce_scatter. On simulated ranks
the sum is taken in the order of the ranks; MPI may take another order, which changes the last bits and no verdict.
"""
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class MPIRanks:
    """The ranks of MPI_COMM_WORLD."""

    def __init__(self) -> None:
        from mpi4py import MPI
        self.comm = MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size

    def all_gather(self, x: Any) -> list:
        """Return every rank's x, in order."""
        return self.comm.allgather(x)

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks."""
        total = np.empty_like(x, order="C")
        self.comm.Allreduce(np.ascontiguousarray(x), total)
        return total

    def all_reduce_max(self, x: np.ndarray) -> np.ndarray:
        """Return the maximum over the ranks."""
        return np.max(self.all_gather(x), axis=0)

    def reduce_scatter(self, x: np.ndarray, axis: int, bounds: list[int]) -> np.ndarray:
        """Return this rank's part of the sum over the ranks."""
        return part_of(self.all_reduce(x), axis, bounds, self.rank)


class SimulatedRanks(MPIRanks):
    """One of several threads that take the parts of ranks."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list):
        self.rank, self.size, self.barrier, self.board = rank, size, barrier, board

    def all_gather(self, x: Any) -> list:
        self.board[self.rank] = x.copy() if isinstance(x, np.ndarray) else x
        self.barrier.wait()
        found = list(self.board)
        self.barrier.wait()
        return found

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        summands = self.all_gather(x)
        total = summands[0].copy()
        for summand in summands[1:]:
            total += summand
        return total


def part_of(x: np.ndarray, axis: int, bounds: list[int], rank: int) -> np.ndarray:
    """Return the part bounds[rank] up to bounds[rank + 1] along the axis."""
    return np.take(x, np.arange(bounds[rank], bounds[rank + 1]), axis=axis)


def simulate(count: int, program: Callable[[Any], None]) -> None:
    """Run program(comm) on `count` simulated ranks. Raises what the first rank that failed raised."""
    barrier, board, failures = threading.Barrier(count), [None] * count, []
    threads = [threading.Thread(target=run_one, args=(program, SimulatedRanks(rank, count, barrier, board), failures))
               for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run_one(program: Callable[[Any], None], comm: SimulatedRanks, failures: list) -> None:
    """Run the program on one rank; a failure ends the waiting of the others."""
    try:
        program(comm)
    except threading.BrokenBarrierError:
        pass
    except Exception as error:
        failures.append(error)
        comm.barrier.abort()
