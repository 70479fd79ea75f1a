"""The rows of sequence parallelism: which tokens a rank has, how it gets all of them, and how their sum is dealt again.

A batch of B sequences of S positions is N = B S rows. They are dealt as features are: cut into blocks, a run of blocks
a rank, so that any number of rows goes on any number of ranks:

    2 sequences of 4 positions, 3 ranks, one block each         [0 1] [2 3 4] [5 6 7]
    position in its sequence                                     0 1   2 3 0   1 2 3

Everything that goes by token asks this one partition: norms, dropout's addresses, learned positions.

Dimension key: N rows of all ranks, n of this one, D features.
"""
from collections.abc import Sequence
from copy import copy
from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InputError, is_integer, require
from ..sharding.partition import Block, Partition, ranges
from .collectives import _flat, _raw, _wire_dtype
from .ledger import Collective, dtype_name
from .mpi import concatenate
from .sums import Sum
from .tree import finish, nodes_of_ranks, root_width


class Rows:
    """The rows of one batch, dealt over the ranks of a group: what layers take as `rows` in sequence parallelism.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    shape : (int, int)
        B and S: sequences, and positions of each.
    gather_again : bool
        What enters a product is gathered again in backward, where its weight gradient needs it, instead of being kept.

    Attributes
    ----------
    partition : Partition
        Of the B S rows, row b S + s for position s of sequence b.
    own : slice
        The rows of this rank.

    Raises
    ------
    InputError
        For a shape that is not two numbers from 0.

    Notes
    -----
    Source: Korthikanti et al., arXiv 2205.05198, section 4.2.2.
    """

    def __init__(self, group: Any, shape: Sequence[int], gather_again: bool = False):
        good = len(shape) == 2 and all(is_integer(n) and n >= 0 for n in shape)
        require(good, f"rows of shape {tuple(shape)!r}", "(sequences, positions)")
        self.group, self.gather_again = group, bool(gather_again)
        self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))
        self.partition: Partition = group.partition(prod(self.shape))
        self.own = self.partition.range(group.rank)

    @property
    def own_blocks(self) -> tuple[Block, ...]:
        """The blocks of rows that this rank has."""
        return self.partition.blocks_of(self.group.rank)

    @property
    def positions(self) -> Array:
        """The position in its sequence of each row of this rank, (n,)."""
        return np.arange(self.own.start, self.own.stop) % max(1, self.shape[1])

    def split(self, x: Array) -> Array:
        """Return this rank's rows (n, D), a copy, of x (B, S, D) that every rank has."""
        require(x.shape[:-1] == self.shape, f"x of shape {x.shape}", f"{self.shape} and features")
        return x.reshape(self.partition.size, x.shape[-1])[self.own].copy()

    # --- the ways between a rank's rows and all of them -------------------------------------------------------------

    def all_gather(self, x_nD: Array) -> Array:
        """Return the rows of all ranks (N, D) of those of each (n, D). Collective: one all-gather of N x D.

        A rank sends its rows to each other rank: (P - 1) n D elements.
        """
        group = self.group
        group._enter("all_gather", x_nD, partition=self.partition, axis=0, part=True)
        width = prod(x_nD.shape[1:])
        x_ND = group.xp.empty((self.partition.size, *x_nD.shape[1:]), x_nD.dtype)
        with self.record("all_gather", x_ND, x_nD.itemsize * (group.size - 1) * x_nD.size):
            group.transport.all_gather(_raw(_flat(x_nD)), _raw(x_ND.reshape(-1)),
                                       [length * width for length in self.partition.lengths])
        return x_ND

    def reduce_scatter(self, total: Sum) -> Array:
        """Return this rank's rows of a sum (..., N, D) over the ranks. Collective: one reduce-scatter.

        A rank sends the others their rows of its partial result: (N - n) D elements; in reproducible mode those of each
        node that it has folded its blocks into. These are the additions of total.all_reduce(), so the same bits there.
        """
        while total.waiting:                                # another rank waits for none of it
            function, arguments = total.waiting.popleft()
            function(*arguments)
        if self.group.reproducible:
            return self.reduce_scatter_tree(total)
        xp, partial = self.group.xp, total.total
        if partial is None:                                 # more ranks than features: this one has nothing to add
            partial = xp.zeros(total.shape, total.summand_dtype)
        return self.scatter_array(partial, total.dtype)

    def scatter_array(self, partial: Array, dtype: Any) -> Array:
        """Return this rank's rows of the sum of an array (..., N, D) of each rank, by MPI_Reduce_scatter."""
        group, outer, width = self.group, prod(partial.shape[:-2]), partial.shape[-1]
        partial = partial.astype(_wire_dtype(partial), copy=False)
        mine = group.xp.empty((*partial.shape[:-2], self.partition.lengths[group.rank], width), partial.dtype)
        with self.record("reduce_scatter", partial, partial.itemsize * (partial.size - mine.size), dtype):
            group.transport.reduce_scatter(by_rank([partial], [self.partition.range(p) for p in range(group.size)],
                                                  partial),
                                           mine.reshape(-1),
                                           [outer * length * width for length in self.partition.lengths], "sum")
        return mine if mine.dtype == dtype else mine.astype(dtype)

    def reduce_scatter_tree(self, total: Any) -> Array:
        """Return this rank's rows of a TreeSum: each rank finishes the tree for its own rows."""
        group, rank = self.group, self.group.rank
        nodes = nodes_of_ranks(total.partition)
        mine = [total.fold.known[node] for node in nodes[rank]]
        count = sum(map(len, nodes))
        outer, width, own = prod(total.shape[:-2]), total.shape[-1], self.partition.lengths[rank]
        found = group.xp.zeros((*total.shape[:-2], own, width), total.summand_dtype)
        sent = found.itemsize * len(mine) * (prod(total.shape) - found.size)
        with self.record("reduce_scatter", found, sent, total.dtype, prod(total.shape)):
            # As many messages on every rank, of which each takes the same part of every rank's rows.
            bytes_in_all = found.itemsize * prod(total.shape) * max(1, count)
            parts = -(-bytes_in_all // group.transport.message_bytes) if count else 0
            cuts = [ranges(length, max(1, parts)) for length in self.partition.lengths]
            for part in range(parts):
                rows = [slice(first + cut[part], first + cut[part + 1])
                        for first, cut in zip(self.partition.bounds, cuts)]
                lengths = [outer * width * (cut[part + 1] - cut[part]) for cut in cuts]
                received = group.xp.empty((count, lengths[rank]), total.summand_dtype)
                group.transport.all_to_all(by_rank(mine, rows, received.reshape(-1)),
                                           [len(mine) * length for length in lengths], received.reshape(-1),
                                           [len(of_rank) * lengths[rank] for of_rank in nodes])
                every_node = [node for of_rank in nodes for node in of_rank]
                done = finish(dict(zip(every_node, received)), 0, root_width(total.partition.blocks))
                window = found[..., cuts[rank][part]:cuts[rank][part + 1], :]
                window[...] = done.reshape(window.shape)
        return found if found.dtype == total.dtype else found.astype(total.dtype)

    def record(self, operation: str, x: Array, sent: int, dtype: Any = None, elements: int | None = None) -> Any:
        """Return a context manager that counts a collective of which this rank sends so many bytes."""
        name, size = dtype_name(x.dtype if dtype is None else dtype), x.size if elements is None else elements
        return self.group.ledger.record_data(Collective(operation, size, name), sent)

    # --- what enters a product, in backward -------------------------------------------------------------------------

    def kept(self, x: Array, x_ND: Array) -> Array:
        """Return what forward keeps of the input of a product: all rows, or this rank's if they are gathered again."""
        return x if self.gather_again else x_ND

    def again(self, kept: Array) -> Array:
        """Return all rows of what kept() returned. Collective where they are gathered again: an all-gather."""
        return self.all_gather(kept) if self.gather_again else kept

    def keeping(self) -> "Rows":
        """Return the same rows for a recomputation, whose gathered arrays live no longer than the backward after it."""
        rows = copy(self)
        rows.gather_again = False
        return rows


def by_rank(arrays: list[Array], rows: list[slice], like: Array) -> Array:
    """Return the rows of each rank of some arrays (..., N, D), one rank after the other, as one flat array.

    like : an array of the dtype and module that the result has where there are none
    """
    in_all = sum(part.stop - part.start for part in rows)
    if len(arrays) == 1 and arrays[0].size == in_all * arrays[0].shape[-1]:
        return arrays[0].reshape(-1)                        # they lie so already
    parts = [array[..., part, :].reshape(-1) for part in rows for array in arrays]
    return concatenate(parts) if parts else like[:0]


def require_rows(rows: Any, group: Any) -> Rows:
    """Return rows. Raises InputError unless they are Rows of this group."""
    if not isinstance(rows, Rows):
        raise InputError(f"rows: found {type(rows).__name__}, expected mpitp.Rows(group, (sequences, positions)): with "
                         f"sequence_parallel=True a rank's x says not how many rows the others have")
    require(rows.group is group, "rows of another group", "those of the layer's")
    return rows
