"""What `bench --calibrate` measures: the times of a machine's products, passes, messages, and of Python, by size.

Every rank works at the same time, so that each has its share of the memory's bandwidth. A time is the slowest rank's.
"""
from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.launch import machine as machine_here
from ..ops.attention import attention_backward, attention_forward
from ..ops.keys_values import last_query_forward
from ..ops.linear import linear_forward, product
from ..plan.machine import LARGE_ARRAY, SMALL_ARRAY, Link, Machine, Tables
from .calibrate_in_use import Points, hops, in_use, messages, of_one_sum, reads, without_sums
from .calibrate_passes import passes
from .timed_cases import READ_HEADS, SCORED_HEADS, Case, TimedCases


class Calibration(TimedCases):
    """A Calibration times every case once a pass; the machine has the medians of all passes.

    Parameters
    ----------
    group, dtype, sizes
        TimedCases'.
    """

    def cases(self) -> Iterator[Case]:
        """Yield every case; one may be timed until the next one is asked for."""
        for cases in (self.products(), passes(self), self.scores(), reads(self), messages(self)):
            yield from cases

    def run_pass(self) -> None:
        """Time every case. Collective."""
        for point, function in self.cases():
            self.time(point, function)

    # --- the cases ---------------------------------------------------------------------------------------------

    def products(self) -> Iterator[Case]:
        """Yield products of every size: y = x W^T, dx = dy W and dW = dy^T x."""
        for rows in self.sizes.rows:
            for outs in self.sizes.sides:
                for ins in self.sizes.sides:
                    size = rows, outs, ins
                    x, w = self.view(0, rows, ins), self.view(1, outs, ins)
                    # Not x's buffer: NumPy multiplies an array by its own transpose with another kernel of BLAS.
                    dy, dw = self.view(3, rows, outs), self.sum_view(outs, ins)
                    yield ("products", "forward", size), partial(linear_forward, x, w)
                    yield ("products", "dx", size), partial(product, dy, w)
                    yield ("products", "dw", size), partial(product, dy.T, x, dw)

    def scores(self) -> Iterator[Case]:
        """Yield attention by tokens and features of a head, and a token's by the numbers that it reads."""
        for tokens in self.sizes.tokens:
            for features in self.sizes.features:
                q, k, v = (as_heads(self.view(number, tokens, SCORED_HEADS, features)) for number in (0, 1, 0))
                out, dq = (as_heads(self.ones(tokens, SCORED_HEADS, features)) for _ in range(2))
                dk, dv = (as_heads(self.xp.ones((tokens, SCORED_HEADS, features), self.sums))[:, 0] for _ in range(2))
                scale = features ** -0.5
                lse = attention_forward(q, k[:, 0], v[:, 0], scale, out=out)
                yield ("scores", "forward", (tokens, features)), \
                    partial(attention_forward, q, k[:, 0], v[:, 0], scale, out=out)
                yield ("scores", "backward", (tokens, features)), \
                    partial(attention_backward, q, lse, q, k[:, 0], v[:, 0], out, scale, dq=dq, dk=dk, dv=dv)
        for keys in self.sizes.keys:
            q, out = self.view(0, 1, READ_HEADS, 64), self.view(2, 1, READ_HEADS, 64)
            k, v = (self.view(number, 1, keys, READ_HEADS, 64) for number in (0, 1))
            last = self.xp.asarray(np.array([keys - 1]))
            yield ("scores", "token", (2 * READ_HEADS * keys * 64,)), \
                partial(last_query_forward, q, k, v, last, 0.1, out=out)

    # --- the machine ---------------------------------------------------------------------------------------------

    def machine(self, python: dict[str, float] | None = None) -> Machine:
        """Return the machine with the medians of all passes, and Python's seconds; the same on every rank."""
        medians = {point: statistics.median(times) for point, times in self.seconds.items()}
        tables: dict[str, Any] = {table: defaultdict(dict) for table in ("products", "scores", "passes", "reads",
                                                                         "messages")}
        for (table, what, size), seconds in medians.items():
            if table in ("python", "in use"):
                continue
            if what.endswith(("gated", "gated kept", "gated backward")):
                seconds = max(seconds - medians["passes", "copy", size], 1e-7)
            if table == "scores" and what != "token":
                seconds /= SCORED_HEADS
            tables[table][what][size] = seconds
        inside, outside = in_use(medians, ""), in_use(medians, "outside")
        of_rows = {what: points for what, points in tables["messages"].items() if what not in ("", "outside")}
        of_sum = of_one_sum(outside or inside, self.group.size, self.sums.itemsize)
        of_reads, of_large = (without_sums(tables["reads"][what], piece, of_sum)
                              for what, piece in (("", SMALL_ARRAY), ("large", LARGE_ARRAY)))
        (most,), sizes, ranks = max(of_reads), self.sizes, self.group.size
        rows, outs, ins = large_product = sizes.rows[-1], sizes.sides[-1], sizes.sides[-1]
        return Machine(
            name=f"{ranks} ranks calibrated", source=self.source(), device=self.group.device,
            ranks_per_host=self.hosts.ranks, memory_bytes=memory_of_host(self.group, self.hosts.ranks),
            flops_per_second={self.dtype.name: 2 * rows * outs * ins / tables["products"]["forward"][large_product]},
            read_bytes_per_second=most / of_reads[most,],
            pass_bytes_per_second=3 * sizes.elements[-1] * self.dtype.itemsize /
            tables["passes"]["add"][sizes.elements[-1:]],
            python_seconds=tables["passes"]["add"][sizes.elements[:1]], inside=link_of(inside, self.hosts.ranks),
            outside=link_of(outside, ranks) if outside else None,
            tables=Tables(dict(tables["products"]), dict(tables["scores"]), dict(tables["passes"]), of_reads, inside,
                          python or {}, of_rows, outside, ranks if outside else 0, of_large))

    def source(self) -> str:
        """Return what was measured: the processor, and the GPU where it computes."""
        if self.group.device == "cpu":
            return machine_here()
        runtime = self.xp.cuda.runtime
        gpu = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        return f"{machine_here()}; {gpu}, {self.group.transport.name}"


def as_heads(x: Array) -> Array:
    """Return a projection (tokens, heads, features) as heads (heads, 1, tokens, features)."""
    return x.transpose(1, 0, 2)[:, None]


def link_of(points: Points, ranks: int) -> Link:
    """Return the Link of all-reduces that were measured on so many ranks."""
    (small,), (large,) = min(points), max(points)
    rate = (large - small) / max(points[large,] - points[small,], 1e-9) if large else 1e12
    return Link(points[small,] / hops(ranks), rate)


def memory_of_host(group: TensorParallelGroup, ranks: int) -> int:
    """Return the bytes of memory of a host, or of its ranks' GPUs."""
    if group.device == "gpu":
        return ranks * group.xp.cuda.runtime.memGetInfo()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
