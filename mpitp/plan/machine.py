"""A machine, and the time that it takes for an Item of work: from tables that were measured, else from a few rates."""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

from ..errors import InputError
from .work import Item

# How many numbers an operation reads and writes for each of its elements; arithmetic that costs as much counts as such.
TRAFFIC = {"add": 3, "zero": 1, "bias": 2, "bias backward": 1, "embedding": 3, "embedding backward": 4, "append": 2,
           "rotary": 4, "activation backward": 3, "gated backward": 7, "loss": 3, "loss backward": 4, "greatest": 1,
           "adamw": 10,
           "sum of squares": 1, "layernorm forward": 5, "rmsnorm forward": 4, "layernorm backward": 7,
           "rmsnorm backward": 6}
OF_ACTIVATIONS = 5                  # where a name of the table above is none of the item's
# Operations that Python starts for each item: of "python" those of a layer beside its items.
STARTS = {"product": 1, "pass": 1, "scores": 3, "message": 1, "python": 8}
PARTS = ("products", "memory", "messages", "python")
TILE = 64                           # queries of attention that see the same keys
# Bytes of weights. Of the first size half lies in pages of 2 MiB, of more ever more; see measure/calibrate_in_use.py.
SMALL_ARRAY, LARGE_ARRAY = 4 << 20, 64 << 20


@dataclass(frozen=True)
class Link:
    """How ranks reach each other: seconds of one hop, and bytes a second out of one rank, or of one host."""
    alpha_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Machine:
    """A Machine is hosts of one kind, and what one rank of them does in a second while all of them work.

    Parameters
    ----------
    name, source : str
        What it is called, and where the numbers come from.
    device : str
        "cpu" or "gpu".
    ranks_per_host : int
        Ranks that share a host.
    memory_bytes : int
        Of a host.
    flops_per_second : dict
        {dtype: rate of a rank's large products}.
    read_bytes_per_second, pass_bytes_per_second : float
        Of a rank: reading a weight once, and passing over arrays.
    python_seconds : float
        Until one operation is started.
    inside, outside : Link
        Between ranks of a host (bytes a second of a rank), and between hosts (of a host).
    tables : Tables or None
        What was measured; None: times follow from the rates alone.
    """
    name: str
    source: str
    device: str
    ranks_per_host: int
    memory_bytes: int
    flops_per_second: dict[str, float]
    read_bytes_per_second: float
    pass_bytes_per_second: float
    python_seconds: float
    inside: Link
    outside: Link | None = None
    tables: Tables | None = None

    def seconds(self, item: Item, dtype: str, itemsize: int, working_bytes: int = 0) -> float:
        """Return the time of an item.

        Parameters
        ----------
        item : Item
        dtype : str
            A key of flops_per_second.
        itemsize : int
            Bytes of a number.
        working_bytes : int
            Of all arrays that the phase works on: where they do not fit into a cache, an item's arrays are not there.
        """
        if item.kind == "message":
            sent_bytes, ranks, sharing = item.size
            return item.count * self.message_seconds(sent_bytes, ranks, sharing, item.what)
        if self.tables is not None:
            return item.count * self.tables.seconds(item, itemsize, working_bytes)
        return item.count * (self.least_seconds(item, dtype, itemsize) + STARTS[item.kind] * self.python_seconds)

    def least_seconds(self, item: Item, dtype: str, itemsize: int) -> float:
        """Return the time of an item by the rates: that of its flops, or of its bytes where that is longer."""
        if item.kind in ("product", "scores"):
            flops, numbers = effort(item)
            return max(flops / self.flops_per_second[dtype], numbers * itemsize / self.read_bytes_per_second)
        if item.kind == "pass":
            return item.size[0] * itemsize * TRAFFIC.get(item.what, OF_ACTIVATIONS) / self.pass_bytes_per_second
        return 0.0

    def message_seconds(self, sent_bytes: int, ranks: int, sharing: int = 1, operation: str = "all_reduce") -> float:
        """Return the time of one collective in which a rank sends so many bytes.

        Parameters
        ----------
        sent_bytes, ranks : int
            Of a rank; how many take part.
        sharing : int
            Ranks of a host whose messages leave it at the same time, each in a collective of its own.
        operation : str
            Where it was measured by itself; by rates each takes what its bytes take.
        """
        if ranks == 1:
            return self.tables.message(0, operation) if self.tables else 0.0
        hops = math.ceil(math.log2(ranks))
        if ranks * sharing <= self.ranks_per_host:
            if self.tables is not None:
                more_hops = hops - math.ceil(math.log2(max(2, self.ranks_per_host)))
                return self.tables.message(sent_bytes, operation) + more_hops * self.inside.alpha_seconds
            return hops * self.inside.alpha_seconds + sent_bytes / self.inside.bytes_per_second
        link, sharing = self.outside, min(sharing, self.ranks_per_host)
        if link is not None and self.tables is not None and self.tables.outside_messages:
            more_hops = hops - math.ceil(math.log2(max(2, self.tables.outside_ranks)))
            return self.tables.message(sharing * sent_bytes, "outside") + more_hops * link.alpha_seconds
        if link is None:
            raise InputError(f"found {ranks} ranks that add up on machine {self.name!r}, expected at most "
                             f"{self.ranks_per_host}: it is one host")
        return hops * link.alpha_seconds + max(sharing * sent_bytes / link.bytes_per_second,
                                               sent_bytes / self.inside.bytes_per_second)

    def part(self, item: Item, dtype: str, itemsize: int) -> str:
        """Return which part of the time an item belongs to: one of PARTS."""
        if item.kind == "product":
            flops, numbers = effort(item)
            bound_by_flops = flops / self.flops_per_second[dtype] > numbers * itemsize / self.read_bytes_per_second
            return "products" if bound_by_flops else "memory"
        return {"scores": "memory" if item.what == "token" else "products", "pass": "memory", "message": "messages",
                "python": "python"}[item.kind]

    def hosts(self, ranks: int) -> int:
        """Return how many hosts so many ranks need."""
        return -(-ranks // self.ranks_per_host)


def effort(item: Item) -> tuple[int, int]:
    """Return the flops of a product, or of one sequence's scores, and the numbers that are read and written."""
    if item.kind == "product":
        rows, out_features, in_features = item.size
        return 2 * rows * out_features * in_features, \
            out_features * in_features + rows * (out_features + in_features)
    if item.what == "token":
        heads, held, keys, features = item.size
        return 4 * heads * keys * features, 2 * held * keys * features
    heads, queries, keys, features = item.size
    seen = queries * (keys + min(TILE, queries)) // 2           # causal, by tiles
    products = 7 if item.what == "backward" else 2
    return 2 * products * heads * seen * features + 8 * heads * seen, 4 * heads * keys * features


# --- what was measured -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tables:
    """Times that were measured, as points between which they are interpolated, in logarithms.

    Parameters
    ----------
    products : dict
        {"forward", "dx", "dw": {(rows, out features, in features): seconds}}, on a grid.
    scores : dict
        {"forward", "backward": {(tokens, features of a head): seconds of a head}, "token": {numbers read: seconds}}.
    passes : dict
        {operation: {elements: seconds}}.
    reads, large_reads : dict
        {bytes: seconds of reading them once}, of arrays of 4 MiB, and of 64 MiB.
    messages : dict
        Of all-reduces: {bytes that a rank sends: seconds}.
    python : dict
        {layer and phase: seconds beside its items}.
    row_messages : dict
        {"all_gather", "reduce_scatter" of rows: as messages}; what is missing takes as long as an all-reduce of as many
        bytes.
    outside_messages, outside_ranks : dict, int
        Of all-reduces over several hosts, as messages, and the ranks that took part in them.
    """
    products: dict[str, dict[tuple[int, ...], float]]
    scores: dict[str, dict[tuple[int, ...], float]]
    passes: dict[str, dict[tuple[int, ...], float]]
    reads: dict[tuple[int, ...], float]
    messages: dict[tuple[int, ...], float]
    python: dict[str, float] = field(default_factory=dict)
    row_messages: dict[str, dict[tuple[int, ...], float]] = field(default_factory=dict)
    outside_messages: dict[tuple[int, ...], float] = field(default_factory=dict)
    outside_ranks: int = 0
    large_reads: dict[tuple[int, ...], float] = field(default_factory=dict)

    def seconds(self, item: Item, itemsize: int, working_bytes: int) -> float:
        """Return the time of one item that is no message.

        The tables are of arrays that are used again and again. To that comes the time in which as many bytes are read
        out of the working set, less that in which they are read out of these arrays alone.
        No product takes less than its numbers take out of the working set.
        """
        if item.kind == "python":
            return self.python.get(item.what, 0.0)
        if item.kind == "pass":
            found = self.grids["pass", item.what if ("pass", item.what) in self.grids else "add"].seconds(item.size)
            return found + self.fetched(item.size[0] * itemsize * min(4, TRAFFIC.get(item.what, 3)), working_bytes)
        if item.kind == "scores":
            heads, second, keys, features = item.size
            if item.what == "token":                # which reads keys and values that other layers' follow
                numbers = 2 * second * keys * features
                return self.grids["scores", "token"].one(numbers) + self.fetched(numbers * itemsize, working_bytes)
            return heads * self.grids["scores", item.what].seconds((keys, features))
        grid = self.grids["product", item.what]
        inside = [min(size, axis[-1]) for size, axis in zip(item.size, grid.axes)]
        numbers, of_grid = (effort(replace(item, size=tuple(size)))[1] for size in (item.size, inside))
        size = numbers * itemsize
        return max(grid.seconds(item.size) + self.fetched(size, working_bytes, of_grid * itemsize),
                   size * self.seconds_per_byte(max(working_bytes, size), size) if working_bytes else 0.0)

    def fetched(self, size: int, working_bytes: int, own: int | None = None) -> float:
        """Return the time that so many bytes take more out of the working set than out of their own arrays."""
        own = size if own is None else own
        return size * max(0.0, self.seconds_per_byte(max(working_bytes, own), size) - self.seconds_per_byte(own, size))

    def seconds_per_byte(self, size: int, array: int) -> float:
        """Return the time of one byte of an array of `array` bytes where `size` bytes are read again and again."""
        if not size:
            return 0.0
        small = self.grids["read", ""].one(size) / size
        if not self.large_reads or size < LARGE_ARRAY or array <= SMALL_ARRAY:
            return small
        share = SMALL_ARRAY / array
        return share * small + (1 - share) * self.grids["read", "large"].one(size) / size

    def message(self, sent_bytes: int, operation: str = "all_reduce") -> float:
        """Return the time of one collective in which a rank sends so many bytes."""
        what = operation if ("message", operation) in self.grids else ""
        return self.grids["message", what].one(sent_bytes)

    @cached_property
    def grids(self) -> dict[tuple[str, str], Grid]:
        """Return the Grid of each table."""
        found = {("product", what): Grid(points) for what, points in self.products.items()}
        found |= {("scores", what): Grid(points) for what, points in self.scores.items()}
        found |= {("pass", what): Grid(points) for what, points in self.passes.items()}
        found |= {("message", what): Grid(points) for what, points in self.row_messages.items()}
        if self.large_reads:
            found["read", "large"] = Grid(self.large_reads)
        if self.outside_messages:
            found["message", "outside"] = Grid(self.outside_messages)
        return found | {("read", ""): Grid(self.reads), ("message", ""): Grid(self.messages)}


class Grid:
    """Times on a grid of sizes. Between its points the logarithm of the time is linear in those of the sizes.

    Beyond its last point the time grows as the size, before its first one it stays.

    Parameters
    ----------
    points : {(size, ...): seconds}
        Every combination of the sizes of each axis.
    """

    def __init__(self, points: dict[tuple[int, ...], float]):
        self.points = points
        self.axes = [sorted(set(axis)) for axis in zip(*points)]

    def one(self, size: int) -> float:
        """Return the time of a size, on a grid of one axis."""
        return self.seconds((size,))

    def seconds(self, size: Sequence[int]) -> float:
        """Return the time of a size, of as many numbers as the grid has axes."""
        places, beyond = [], 1.0
        for axis, value in zip(self.axes, size):
            inside = min(max(value, axis[0]), axis[-1])
            beyond *= max(1.0, value / axis[-1]) if axis[-1] else 1.0
            at = max(0, min(bisect_right(axis, inside) - 1, len(axis) - 2))
            low, high = axis[at], axis[min(at + 1, len(axis) - 1)]
            share = 0.0 if low == high else math.log((inside + 1) / (low + 1)) / math.log((high + 1) / (low + 1))
            places.append(((low, 1 - share), (high, share)))
        total = 0.0
        for corner in product(*places):
            weight = math.prod(share for _, share in corner)
            if weight:
                total += weight * math.log(self.points[tuple(value for value, _ in corner)])
        return beyond * math.exp(total)
