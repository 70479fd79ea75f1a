"""Gradients add up: over the pieces of a global batch, and over the ranks of a data group.

In ordinary mode each rank adds up its own pieces, and the ranks of the data group all-reduce the sums in buckets, after
backward or beside it (see buckets.py). In reproducible mode the pieces are the leaves of one fixed tree, as the blocks
of a dimension are: the same additions on every grid (see comm/tree.py), after the last backward.

In sequence parallelism a rank's gradients of norms are summands of its own rows, until the step's end: then one message
to its tensor group adds up those of all pieces (see layers/norm_sums.py), before the data group's sum.
"""
from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..comm.tree import Fold, finish, root_width
from ..layers.base import ParallelLayer
from ..layers.closed_forms import step_norm_collectives
from ..layers.decoder import Decoder
from ..layers.norm_sums import NormSumsOfStep, names_of_step
from ..sharding.partition import Block, Partition

# Bytes of a message. Each costs a start, and reaches the speed of a link from some megabytes on; but MPI needs as much
# memory again, and beside backward a message begins when the gradients of all of it are complete.
BUCKET = 32 << 20
ALIGNED = 64            # elements: each gradient begins where a product is fast, and where cuBLAS copies nothing


class Flat:
    """The gradients of a model in one array, so that one operation adds them all.

    They lie in the order of the layers, so backward completes them from the end of the array to its start. Those of
    norms in sequence parallelism, which are complete at a step's end, are the first.

    Parameters
    ----------
    model : Decoder
    array : (n,) array, optional
        What they lie in; None: a new one.

    Attributes
    ----------
    array : (n,) array
    named : {name: array}
        Views of it, shaped as this rank's slices.
    starts : {name: int}
        Where each begins in it.
    first : set of str
        Those that lie before the others: of norms, in sequence parallelism.
    """

    def __init__(self, model: Decoder, array: Array | None = None):
        if array is None:                           # what lies between them is added up, too
            array = model.group.xp.zeros(flat_size(model), model.sum_dtype)
        self.array, self.named, self.starts, start = array, {}, {}, 0
        self.first = names_of_step(model) if model.sequence_parallel else set()
        for name in sorted(model.weights, key=lambda name: name not in self.first):         # the others in their order
            w = model.weights[name]
            self.named[name], self.starts[name] = array[start:start + w.size].reshape(w.shape), start
            start += padded(w.size)

    def start_of(self, layer: ParallelLayer) -> int:
        """Return where the gradients of one of the model's layers begin, but for those that lie first of all."""
        return min(self.starts[name] for name in layer.specs if name not in self.first)


def padded(size: int) -> int:
    """Return the elements that a gradient of this size takes in a Flat."""
    return -(-size // ALIGNED) * ALIGNED


def flat_size(model: Decoder) -> int:
    """Return the elements of a model's Flat on this rank."""
    return sum(padded(prod(spec.local_shape(model.group.place))) for spec in model.specs.values())


class GradientSum:
    """The sum over pieces and data ranks in ordinary mode, over the data ranks after the last backward.

    Use: begin(), then for each piece of this rank backward into room() and add(), then finish().

    Parameters
    ----------
    model : Decoder
    data : TensorParallelGroup or None
        Over whose ranks gradients add up; None: this rank has them all.
    partition : Partition
        Of the sequences over the data ranks.

    Attributes
    ----------
    norms : NormSumsOfStep or None
        What each piece's backward is given, in sequence parallelism.
    """
    overlaps = False        # whether the last piece's backward is given this sum, to begin it beside

    def __init__(self, model: Decoder, data: TensorParallelGroup | None, partition: Partition):
        self.model, self.data, self.partition = model, data, partition
        self.norms = NormSumsOfStep(model.group) if model.sequence_parallel else None
        self.total: Flat | None = None
        self.more: Flat | None = None       # of a second piece, and those after it
        self.count, self.loss = 0, 0.0

    def begin(self) -> None:
        """Begin a step."""
        self.count, self.loss = 0, 0.0
        self.total = self.total or Flat(self.model)
        if self.norms:
            self.norms.clear()

    def room(self) -> dict[str, Array]:
        """Return the arrays that the next piece's gradients go into."""
        assert self.total is not None, "begin() first"
        if self.count == 0:
            return self.total.named
        self.more = self.more or Flat(self.model)
        return self.more.named

    def add(self, piece: Block, loss: float) -> None:
        """Add what lies in room(), and the piece's part of the loss."""
        if self.count and self.total and self.more:
            self.total.array += self.more.array
        self.count, self.loss = self.count + 1, self.loss + loss

    def finish(self) -> tuple[float, dict[str, Array]]:
        """Return the loss and {name: gradient} of the global batch, on every rank.

        Collective: see collectives() and norm_collectives().
        """
        assert self.total is not None, "begin() first"
        if self.norms:
            for found in self.norms.all_reduce():           # of all pieces together, if there is any
                self.norms.write(found, self.total.named)
        if self.data is None:
            return self.loss, self.total.named
        if self.count == 0:                         # more data ranks than sequences
            self.total.array[...] = 0
        self.sum_over_ranks(self.data, self.total.array)
        loss = self.data.xp.full(1, self.loss, np.float64)
        return float(self.data.all_reduce(loss, out=loss)[0]), self.total.named

    def sum_over_ranks(self, data: TensorParallelGroup, total: Array) -> None:
        """Make `total` the sum over the data ranks. Collective: an all-reduce of each bucket."""
        for part in self.messages(total):
            bucket = total[part]
            data.all_reduce(bucket, out=bucket)

    def messages(self, total: Array) -> list[slice]:
        """Return which part of `total` each message to the data ranks has."""
        return buckets(total.size, total.itemsize)

    def abandon(self) -> None:
        """Leave a step that one of the data ranks cannot finish. Collective, as finish() is."""

    def collectives(self) -> Counter:
        """Return the closed form of the data group's collectives of a step: a Counter of Collective."""
        name = self.model.sum_dtype.name
        parts = buckets(flat_size(self.model), self.model.sum_dtype.itemsize) if self.data else []
        of_gradients = [Collective("all_reduce", part.stop - part.start, name) for part in parts]
        return Counter(of_gradients + ([Collective("all_reduce", 1, "float64")] if self.data else []))

    def norm_collectives(self, pieces: int) -> Counter:
        """Return the closed form of the tensor group's collectives that end a step of so many pieces of this rank."""
        return step_norm_collectives(self.model, pieces)


class GradientTreeSum(GradientSum):
    """The sum over pieces and data ranks in reproducible mode: the same additions on every grid.

    The pieces are the leaves. At most log2(leaves) + 2 Flats are alive on a rank.
    """

    def __init__(self, model: Decoder, data: TensorParallelGroup | None, partition: Partition):
        super().__init__(model, data, partition)
        self.flats: list[Flat] = []
        self.pieces: list[Block] = []               # of this step, in order
        self.fold, self.losses, self.written = Fold(partition, 0), Fold(partition, 0), 0

    def begin(self) -> None:
        rank = self.data.rank if self.data else 0
        self.fold, self.losses, self.pieces = Fold(self.partition, rank), Fold(self.partition, rank), []
        if self.norms:
            self.norms.clear()

    def room(self) -> dict[str, Array]:
        in_use = {id(array) for array in self.fold.known.values()}
        free = [i for i, flat in enumerate(self.flats) if id(flat.array) not in in_use]
        if not free:
            free = [len(self.flats)]
            self.flats.append(Flat(self.model))
        self.written = free[0]
        return self.flats[self.written].named

    def add(self, piece: Block, loss: float) -> None:
        self.fold.add(piece.index, self.flats[self.written].array)
        self.losses.add(piece.index, self.model.group.xp.full(1, loss, np.float64))
        self.pieces.append(piece)

    def add_norms(self, norms: NormSumsOfStep) -> None:
        """Write the gradients of norms into what the pieces were folded into, folded in the same way. Collective."""
        fold = Fold(self.partition, self.data.rank if self.data else 0)
        for piece, found in zip(self.pieces, norms.all_reduce()):
            fold.add(piece.index, found)
        for node, found in fold.known.items():
            norms.write(found, Flat(self.model, self.fold.known[node]).named)

    def finish(self) -> tuple[float, dict[str, Array]]:
        if self.norms:
            self.add_norms(self.norms)
        if self.data is None:
            width = root_width(self.partition.blocks)
            total, loss = finish(self.fold.known, 0, width), finish(self.losses.known, 0, width)
        else:
            total = self.over_ranks(self.fold, flat_size(self.model), self.model.sum_dtype)
            loss = self.over_ranks(self.losses, 1, np.dtype(np.float64))
        return float(loss[0]), Flat(self.model, total).named

    def over_ranks(self, fold: Fold, elements: int, dtype: np.dtype) -> Array:
        """Return the sum of what the data ranks have folded. Collective: one all-reduce in the tree."""
        assert self.data is not None, "no data group"
        total: Any = self.data.sum(self.partition, (elements,), dtype)
        total.fold = fold
        return total.all_reduce()

    def collectives(self) -> Counter:
        """Return the closed form of the data group's collectives of a step: a Counter of Collective."""
        sizes = ((flat_size(self.model), self.model.sum_dtype.name), (1, "float64"))
        return Counter(Collective("all_reduce", size, name) for size, name in sizes if self.data)


def buckets(size: int, itemsize: int) -> list[slice]:
    """Cut so many elements into messages of at most BUCKET bytes."""
    step = BUCKET // itemsize
    return [slice(at, min(at + step, size)) for at in range(0, size, step)]
