"""Reads of weights and sums over ranks, as a Calibration times them: the way a layer meets them.

A token reads one weight after the other, arrays of their own that no cache has kept, and after every second product the
ranks add up. A sum then waits for the rank that reads slowest, and finds neither its code nor its buffers in the cache.
Linux gives NumPy pages of 2 MiB inside of arrays from 4 MiB on, pages of 4 KiB elsewhere. Measured on an AMD EPYC out
of 200 MiB of weights: 1.2 times the time for arrays of 4 MiB as for those of 64 MiB.
"""
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.ledger import wire_bytes
from ..comm.rows import Rows
from ..ops.linear import linear_forward
from ..plan.machine import LARGE_ARRAY, SMALL_ARRAY, Grid
from .timed_cases import Case, TimedCases


SUM_EVERY = 2                   # products
FEATURES = 1024                 # of what is added up after them
IN_USE = 1 << 18                # bytes that a rank sends, up to which a sum is timed behind a product
BASE = (FEATURES // 4, FEATURES)            # of that product's weight
OF_MEMORY = 8                   # share of the free memory that weights may take: one of so many parts


def reads(of: TimedCases) -> Iterator[Case]:
    """Yield reading so many bytes of weights, by products with one row, in use: of small arrays, and of large ones."""
    most = max(most_bytes(of.group), of.sizes.reads[0])
    sizes = sorted(size for size in of.sizes.reads if size <= most)
    yield from reads_of(of, sizes, SMALL_ARRAY, "")
    yield from reads_of(of, [size for size in sizes if size >= LARGE_ARRAY], LARGE_ARRAY, "large")


def reads_of(of: TimedCases, sizes: list[int], piece: int, what: str) -> Iterator[Case]:
    """Yield reading so many bytes of weights of `piece` bytes each; sums(size, piece) sums are between them."""
    xp, row_bytes = of.xp, FEATURES * of.dtype.itemsize
    x, summed = of.view(0, 1, FEATURES), xp.zeros((1, FEATURES), of.sums)
    weights: list[Array] = []
    for size in sizes:
        while len(weights) * piece < size:
            weights.append(xp.zeros((piece // row_bytes, FEATURES), of.dtype))
            if of.group.device == "cpu":
                weights[-1][...] = 0.01                     # zeros may all be one page of memory
        parts = weights[:size // piece] or [weights[0][:max(1, size // row_bytes)]]
        yield ("reads", what, (size,)), partial(read, of.group, x, parts, summed)


def read(group: TensorParallelGroup, x: Array, weights: list[Array], summed: Array) -> None:
    """Multiply a row by each of the weights; several ranks add up a row after every second one."""
    for number, w in enumerate(weights, 1):
        linear_forward(x, w)
        if group.size > 1 and number % SUM_EVERY == 0:
            group.all_reduce(summed, out=summed)


def sums(size: int, piece: int) -> int:
    """Return how many sums are in a read of so many bytes on several ranks."""
    return size // piece // SUM_EVERY


def most_bytes(group: TensorParallelGroup) -> int:
    """Return the bytes of weights that a rank may make. Collective."""
    if group.device == "gpu":
        return 1 << 34
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min(group.comm.allgather(free // (OF_MEMORY * group.size)))


def messages(of: TimedCases) -> Iterator[Case]:
    """Yield all-reduces by the bytes that a rank sends: inside a host and, with several hosts, over all of them."""
    yield from all_reduces(of, of.hosts.inside, "")
    if of.hosts.count > 1:
        yield from all_reduces(of, of.group, "outside")
    elif of.group.size > 1:
        yield from messages_of_rows(of)


def all_reduces(of: TimedCases, group: TensorParallelGroup, where: str) -> Iterator[Case]:
    """Yield all-reduces of a group, small ones a second time behind a product, and that product alone."""
    sent: set[int] = set()
    row, w = of.view(0, 1, BASE[1]), of.view(1, *BASE)
    if group.size > 1:
        yield ("in use", f"{where} product", (0,)), partial(linear_forward, row, w)
    for size in of.sizes.messages:
        x = of.xp.zeros(max(1, size // of.sums.itemsize), of.sums)
        bytes_sent = wire_bytes("all_reduce", x.size, of.sums.itemsize, group.size)
        if bytes_sent in sent:                              # on one rank nothing is sent
            continue
        sent.add(bytes_sent)
        yield ("messages", where, (bytes_sent,)), partial(group.all_reduce, x, out=x)
        if 0 < bytes_sent <= IN_USE:
            yield ("in use", where, (bytes_sent,)), partial(sum_behind_product, group, x, row, w)


def sum_behind_product(group: TensorParallelGroup, x: Array, row: Array, w: Array) -> None:
    """Multiply, then add up."""
    linear_forward(row, w)
    group.all_reduce(x, out=x)


def messages_of_rows(of: TimedCases) -> Iterator[Case]:
    """Yield the all-gathers and reduce-scatters of sequence parallelism, as many rows on each of several ranks."""
    ranks, most = of.group.size, of.sizes.most()
    for elements in sorted({min(size // of.dtype.itemsize, most) for size in of.sizes.messages}):
        D = max(1, min(1024, elements // ranks))
        rows = Rows(of.group, (ranks, max(1, elements // (ranks * D))))
        x = of.view(0, rows.partition.size, D)
        sent = (x.size - x.size // ranks) * of.dtype.itemsize
        yield ("messages", "all_gather", (sent,)), partial(rows.all_gather, x[rows.own])
        yield ("messages", "reduce_scatter", (sent,)), partial(rows.scatter_array, x, of.dtype)


# --- what was measured --------------------------------------------------------------------------------------------

Points = dict[tuple[int, ...], float]


def in_use(medians: Mapping[Any, float], where: str) -> Points:
    """Return {bytes: seconds} of the all-reduces: small ones as they take behind a product, where that is more."""
    found: Points = {size: seconds for (table, what, size), seconds in medians.items()
                     if (table, what) == ("messages", where)}
    for (table, what, size), seconds in medians.items():
        if (table, what) == ("in use", where):
            found[size] = max(found[size], seconds - medians["in use", f"{where} product", (0,)])
    return found


def without_sums(of_reads: Points, piece: int, of_sum: float) -> Points:
    """Return {bytes: seconds} of reads without the sums between them, each of which takes so long."""
    return {size: max(seconds - sums(size[0], piece) * of_sum, seconds / 2) for size, seconds in of_reads.items()}


def of_one_sum(points: Points, ranks: int, itemsize: int) -> float:
    """Return the seconds of a sum between two reads."""
    return 0.0 if ranks == 1 else Grid(points).one(wire_bytes("all_reduce", FEATURES, itemsize, ranks))


def hops(ranks: int) -> int:
    """Return the steps in which so many ranks can reach each other."""
    return max(1, math.ceil(math.log2(ranks)))
