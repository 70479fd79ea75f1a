"""What `bench --calibrate` measures: the times of a machine's products, passes, messages, and of Python, by size.

Every rank works at the same time, so that each has its share of the memory's bandwidth. A time is the slowest rank's.
"""
from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..arrays import Array, compute_dtype
from ..comm.group import TensorParallelGroup
from ..comm.launch import machine as machine_here
from ..comm.ledger import wire_bytes
from ..comm.rows import Rows
from ..ops.activation import ACTIVATIONS, activation_backward, activation_forward, add_to, gated_backward, gated_forward
from ..ops.adamw import adamw_step
from ..ops.attention import attention_backward, attention_forward
from ..ops.cross_entropy import row_gradient, row_maximum, row_sums
from ..ops.embedding import embedding_backward, embedding_forward
from ..ops.greatest import greatest_of_rank
from ..ops.keys_values import append
from ..ops.linear import add_bias, bias_backward, linear_forward, product
from ..ops.norm import norm_backward, norm_forward
from ..ops.rotary import rotary_forward
from ..plan.machine import Link, Machine, Tables

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
        Bytes.
    """
    rows: tuple[int, ...] = (1, 2, 8, 16, 64, 96, 256, 1024)
    sides: tuple[int, ...] = (64, 256, 1024, 4096)
    tokens: tuple[int, ...] = (16, 64, 256, 1024)
    features: tuple[int, ...] = (16, 64, 512)
    keys: tuple[int, ...] = (4, 64, 1024, 4096)
    elements: tuple[int, ...] = (64, 1 << 12, 1 << 16, 1 << 19, 1 << 22)
    reads: tuple[int, ...] = tuple(1 << exponent for exponent in range(16, 29, 2))
    messages: tuple[int, ...] = tuple(8 ** exponent for exponent in range(1, 9))

    def most(self) -> int:
        """Return the numbers of the largest array."""
        return max(self.rows[-1] * self.sides[-1], self.sides[-1] ** 2, self.elements[-1], 1 << 16,
                   self.tokens[-1] * self.features[-1] * SCORED_HEADS, self.keys[-1] * READ_HEADS * 64)


class Calibration:
    """A Calibration times every case once a pass; the machine has the medians of all passes.

    Parameters
    ----------
    group : TensorParallelGroup
        On the CPU.
    dtype : str
        Of the products.
    sizes : Sizes or None
        What is timed; None: all of Sizes().
    """

    def __init__(self, group: TensorParallelGroup, dtype: str = "float32", sizes: Sizes | None = None):
        self.group, self.dtype, self.sizes = group, compute_dtype(dtype, group.device), sizes or Sizes()
        generator = np.random.default_rng(5)
        self.buffers = [generator.standard_normal(self.sizes.most()).astype(self.dtype) for _ in range(2)]
        self.buffers += [np.ones(self.sizes.most(), self.dtype) for _ in range(2)]
        self.seconds: defaultdict[Point, list[float]] = defaultdict(list)
        self.repeats: dict[Point, int] = {}

    def run_pass(self) -> None:
        """Time every case. Collective."""
        for cases in (self.products(), self.passes(), self.scores(), self.reads(), self.messages()):
            for point, function in cases:
                self.time(point, function)

    def time(self, point: Point, function: Callable[[], Any]) -> None:
        """Time one case, repeated until it takes long enough. Collective."""
        comm = self.group.comm
        if point not in self.repeats:
            function()                                          # warm
            start = time.perf_counter()
            function()
            once = comm.bcast(time.perf_counter() - start)
            self.repeats[point] = max(1, int(LEAST_SECONDS / max(once, 1e-7)))
        repeats = self.repeats[point]
        if repeats > 1:
            function()                                          # warm again, where that costs little
        comm.Barrier()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        self.seconds[point].append(max(comm.allgather((time.perf_counter() - start) / repeats)))

    def view(self, number: int, *shape: int) -> Array:
        """Return an array of this shape at the beginning of one of the buffers."""
        count = int(np.prod(shape))
        return self.buffers[number][:count].reshape(shape)

    def median(self, table: str, what: str, size: tuple[int, ...]) -> float:
        """Return the median over the passes of one case."""
        return statistics.median(self.seconds[table, what, size])

    # --- the cases ---------------------------------------------------------------------------------------------

    def products(self) -> Iterator[Case]:
        """Yield products of every size: y = x W^T, dx = dy W and dW = dy^T x."""
        for rows in self.sizes.rows:
            for outs in self.sizes.sides:
                for ins in self.sizes.sides:
                    size = rows, outs, ins
                    x, w = self.view(0, rows, ins), self.view(1, outs, ins)
                    # Not x's buffer: NumPy multiplies an array by its own transpose with another kernel of BLAS.
                    dy, dw = self.view(3, rows, outs), self.view(2, outs, ins)
                    yield ("products", "forward", size), partial(linear_forward, x, w)
                    yield ("products", "dx", size), partial(product, dy, w)
                    yield ("products", "dw", size), partial(product, dy.T, x, dw)

    def scores(self) -> Iterator[Case]:
        """Yield attention by tokens and features of a head, and a token's by the numbers that it reads."""
        for tokens in self.sizes.tokens:
            for features in self.sizes.features:
                q, k, v = (self.heads(number, tokens, features) for number in (0, 1, 0))
                out, dq, dk, dv = (np.ones(SCORED_HEADS * tokens * features, self.dtype).reshape(
                    tokens, SCORED_HEADS, features).transpose(1, 0, 2)[:, None] for _ in range(4))
                scale = features ** -0.5
                lse = attention_forward(q, k[:, 0], v[:, 0], scale, out=out)
                yield ("scores", "forward", (tokens, features)), \
                    partial(attention_forward, q, k[:, 0], v[:, 0], scale, out=out)
                yield ("scores", "backward", (tokens, features)), \
                    partial(attention_backward, q, lse, q, k[:, 0], v[:, 0], out, scale, dq=dq, dk=dk[:, 0],
                            dv=dv[:, 0])
        for keys in self.sizes.keys:
            q, out = self.view(0, READ_HEADS, 1, 1, 64), self.view(2, READ_HEADS, 1, 1, 64)
            k, v = (self.view(number, keys, READ_HEADS, 64).swapaxes(0, 1) for number in (0, 1))
            yield ("scores", "token", (2 * READ_HEADS * keys * 64,)), partial(attention_forward, q, k, v, 0.1, out=out)

    def heads(self, number: int, tokens: int, features: int) -> Array:
        """Return heads (heads, 1, tokens, features) as they lie in a projection."""
        return self.view(number, tokens, SCORED_HEADS, features).transpose(1, 0, 2)[:, None]

    def passes(self) -> Iterator[Case]:
        """Yield the operations that pass over arrays, by elements."""
        for elements in self.sizes.elements:
            D = min(elements, 1024)
            x, y, z, w = (self.view(number, elements // D, D) for number in range(4))
            b, db = np.ones(D, self.dtype), np.zeros(D, self.dtype)
            moved, mean, square = (np.ones(elements, self.dtype) for _ in range(3))
            ids, rows = np.arange(len(x)) % 64, self.view(1, 64, D)
            yield from self.of_activations(elements, x, y, z, w)
            cases: dict[str, Callable[[], Any]] = {
                "add": partial(add_to, z, x), "bias": partial(add_bias, z, b),
                "bias backward": partial(bias_backward, x, db), "zero": partial(z.fill, 0),
                "embedding": partial(embedding_forward, rows, ids),
                "embedding backward": partial(embedding_backward, x, ids, 64, self.view(2, 64, D)),
                "sum of squares": partial(np.dot, x.reshape(-1), x.reshape(-1)),
                "adamw": partial(adamw_step, moved, x.reshape(-1), mean, square, beta1=0.9, beta2=0.95, rate=1e-3,
                                 root=1.0, eps=1e-8, decay=0.999, scale=0.5),
                "loss": partial(self.loss, x), "loss backward": partial(self.loss_backward, x),
                "greatest": partial(greatest_of_rank, x.reshape(1, -1), 0)}
            if D >= 64:
                heads = x.reshape(1, len(x), D // 64, 64)
                cos, sin = (np.ones((len(x), 32), self.dtype) for _ in range(2))
                cases["rotary"] = partial(rotary_forward, heads, cos, sin, False)
                kept = self.view(2, 1, 2 * len(x), D // 64, 64)
                cases["append"] = partial(append, (kept, kept), (heads[:, :(len(x) + 1) // 2],) * 2, np.array([0]))
            for kind in ("layernorm", "rmsnorm"):
                bias = b if kind == "layernorm" else None
                cases[f"{kind} forward"] = partial(norm_forward, x, b, bias, kind, 1e-5)
                saved = norm_forward(y, b, bias, kind, 1e-5)[1]
                cases[f"{kind} backward"] = partial(norm_backward, x, saved, db, np.zeros(D, self.dtype))
            for what, function in cases.items():
                yield ("passes", what, (elements,)), function

    def of_activations(self, elements: int, x: Array, y: Array, z: Array, w: Array) -> Iterator[Case]:
        """Yield the activations; what overwrites its input is given a fresh one, whose copy is timed, too."""
        yield ("passes", "copy", (elements,)), partial(np.copyto, z, x)
        for name in ACTIVATIONS:
            yield ("passes", name, (elements,)), partial(activation_forward, name, x, z)
            yield ("passes", f"{name} kept", (elements,)), partial(activation_forward, name, x, None, z)
            yield ("passes", f"{name} gated", (elements,)), partial(self.gated, name, x, y, z, False)
            yield ("passes", f"{name} gated kept", (elements,)), partial(self.gated, name, x, y, z, True)
        yield ("passes", "activation backward", (elements,)), partial(activation_backward, x, y, z)
        yield ("passes", "gated backward", (elements,)), partial(self.gated_backward, x, y, z, w)

    @staticmethod
    def gated(name: str, x: Array, y: Array, z: Array, kept: bool) -> None:
        """Run a gated activation on a copy of x."""
        np.copyto(z, x)
        gated_forward(name, z, y, saved=kept)

    @staticmethod
    def gated_backward(x: Array, y: Array, z: Array, w: Array) -> None:
        """Run a gated activation's backward on a copy of x."""
        np.copyto(z, x)
        gated_backward(z, (y, w, y))

    @staticmethod
    def loss(x: Array) -> None:
        """Compute what a rank's columns add to a loss."""
        row_sums(x, row_maximum(x), np.zeros(len(x), np.int64), False)

    @staticmethod
    def loss_backward(x: Array) -> None:
        """Compute the gradient of the logits."""
        factor = np.ones(len(x), x.dtype)
        row_gradient(x, x[:, 0], np.zeros(len(x), np.int64), factor, factor, None, np.empty_like(x))

    def reads(self) -> Iterator[Case]:
        """Yield reading so many bytes, by products of BLAS with a vector."""
        vector = self.view(0, 1 << 10)
        source = np.ones(self.sizes.reads[-1] // self.dtype.itemsize, self.dtype)
        for size in self.sizes.reads:
            rows = source[:size // self.dtype.itemsize].reshape(-1, len(vector))
            yield ("reads", "", (size,)), partial(np.matmul, rows, vector)

    def messages(self) -> Iterator[Case]:
        """Yield all-reduces by the bytes that a rank sends."""
        sent: set[int] = set()
        for size in self.sizes.messages:
            x = np.zeros(max(1, size // self.dtype.itemsize), self.dtype)
            bytes_sent = wire_bytes("all_reduce", x.size, self.dtype.itemsize, self.group.size)
            if bytes_sent not in sent:                          # on one rank nothing is sent
                sent.add(bytes_sent)
                yield ("messages", "", (bytes_sent,)), partial(self.group.all_reduce, x, out=x)
        yield from self.messages_of_rows()

    def messages_of_rows(self) -> Iterator[Case]:
        """Yield the all-gathers and reduce-scatters of sequence parallelism, as many rows on each of several ranks."""
        ranks, most = self.group.size, self.sizes.most()
        sizes = {min(size // self.dtype.itemsize, most) for size in self.sizes.messages} if ranks > 1 else set()
        for elements in sorted(sizes):
            D = max(1, min(1024, elements // ranks))
            rows = Rows(self.group, (ranks, max(1, elements // (ranks * D))))
            x = self.view(0, rows.partition.size, D)
            sent = (x.size - x.size // ranks) * self.dtype.itemsize
            yield ("messages", "all_gather", (sent,)), partial(rows.all_gather, x[rows.own])
            yield ("messages", "reduce_scatter", (sent,)), partial(rows.scatter_array, x, self.dtype)

    # --- the machine ---------------------------------------------------------------------------------------------

    def machine(self, python: dict[str, float] | None = None) -> Machine:
        """Return the machine with the medians of all passes, and Python's seconds; the same on every rank."""
        medians = {point: statistics.median(times) for point, times in self.seconds.items()}
        tables: dict[str, Any] = {table: defaultdict(dict) for table in ("products", "scores", "passes", "reads",
                                                                         "messages")}
        for (table, what, size), seconds in medians.items():
            if table == "python":
                continue
            if what.endswith(("gated", "gated kept", "gated backward")):
                seconds = max(seconds - medians["passes", "copy", size], 1e-7)
            if table == "scores" and what != "token":
                seconds /= SCORED_HEADS
            tables[table][what][size] = seconds
        reads, messages = tables["reads"][""], tables["messages"].pop("")
        (small,), (large,), (most,) = min(messages), max(messages), max(reads)
        rate = (large - small) / max(messages[large,] - messages[small,], 1e-9) if large else 1e12
        rows, outs, ins = large_product = self.sizes.rows[-1], self.sizes.sides[-1], self.sizes.sides[-1]
        elements = self.sizes.elements
        return Machine(
            name=f"{self.group.size} ranks calibrated", source=machine_here(), device="cpu",
            ranks_per_host=self.group.size, memory_bytes=total_memory(),
            flops_per_second={self.dtype.name: 2 * rows * outs * ins / tables["products"]["forward"][large_product]},
            read_bytes_per_second=most / reads[most,],
            pass_bytes_per_second=3 * elements[-1] * self.dtype.itemsize / tables["passes"]["add"][elements[-1:]],
            python_seconds=tables["passes"]["add"][elements[:1]], inside=Link(messages[small,], rate),
            tables=Tables(dict(tables["products"]), dict(tables["scores"]), dict(tables["passes"]), reads, messages,
                          python or {}, dict(tables["messages"])))


def total_memory() -> int:
    """Return the bytes of memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
