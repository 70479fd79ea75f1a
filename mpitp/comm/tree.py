"""A sum that does not know how many ranks there are: one fixed binary tree over blocks.

Floating-point addition is not associative, so MPI_Allreduce over P ranks has other bits for another P. Here
the leaves are the blocks of a partition, whose number is fixed; which rank has which block decides who adds,
never what is added to what:

    blocks    0   1   2   3   4   5   6   7
              +-+-+   +-+-+   +-+-+   +-+-+         2 ranks: rank 0 folds 0 to 3, rank 1 folds 4 to 7
                +---+---+       +---+---+           3 ranks: (0, 1) | (2, 3) and 4 | 5 and (6, 7)
                    +-------+-------+               every addition is the same one in both cases

A rank folds the aligned nodes that it owns (as a segment tree does); the ranks then exchange chunks
(MPI_Alltoall), each finishes the tree for its chunk, and MPI_Allgather spreads the result. A block that
holds nothing is absent, never a zero: -0.0 + 0.0 would be +0.0.
"""
from functools import cache
from typing import Any

from ..arrays import Array, module_of, sum_dtype
from ..sharding.partition import Block, Partition, ranges
from .ledger import Collective, dtype_name
from .mpi import messages
from .sums import Sum

Node = tuple[int, int]      # first leaf, width


class TreeSum(Sum):
    """The sum of reproducible mode: the same additions, so the same bits, for any number of ranks."""

    def __init__(self, group: Any, partition: Partition, shape: Any, dtype: Any):
        super().__init__(group, partition, shape, dtype)
        self.summand_dtype = sum_dtype(dtype)
        self.fold = Fold(partition, group.rank)

    def add(self, block: Block, summand: Array) -> None:
        self.fold.add(block.index, self.checked(block, summand))

    def all_reduce(self) -> Array:
        """Return the sum, on every rank. Collective: MPI_Alltoall(v) and MPI_Allgather(v), see bytes_sent."""
        group, total = self.group, self.group.xp.empty(self.shape, self.summand_dtype)
        collective = Collective("all_reduce", total.size, dtype_name(self.dtype))
        sent = bytes_sent(self.partition, group.rank, total.size, total.itemsize)
        with group.ledger.record_data(collective, sent):
            exchange(self.fold, group.rank, total.reshape(-1), group.transport)
        return total if total.dtype == self.dtype else total.astype(self.dtype)

    def local_sum(self) -> Array:
        return finish(self.fold.known, 0, root_width(self.partition.blocks))


def aligned_nodes(start: int, stop: int) -> list[Node]:
    """Return the fewest nodes (first leaf, width) of the tree that cover leaves start..stop-1."""
    nodes = []
    while start < stop:
        width = 1
        while start % (2 * width) == 0 and start + 2 * width <= stop:
            width *= 2
        nodes.append((start, width))
        start += width
    return nodes


def is_absent(partition: Partition, first: int, width: int) -> bool:
    """Return whether the leaves below node (first, width) hold nothing at all."""
    bounds = partition.block_bounds
    last = len(bounds) - 1
    return bounds[min(first, last)] == bounds[min(first + width, last)]


@cache
def nodes_of_ranks(partition: Partition) -> list[list[Node]]:
    """Return, for each rank, the nodes that it folds its leaves into and sends."""
    return [[node for node in aligned_nodes(start, stop) if not is_absent(partition, *node)]
            for start, stop in zip(partition.run_bounds, partition.run_bounds[1:])]


class Fold:
    """One rank's part of the tree, which adds leaves up as they come, in any order, into nodes_of_ranks[rank].

    At most log2(leaves) + 1 partial sums are alive when leaves come in order. Leaves are overwritten.
    """

    def __init__(self, partition: Partition, rank: int):
        self.partition = partition
        self.start, self.stop = partition.run_bounds[rank:rank + 2]
        self.known: dict[Node, Array] = {}

    def add(self, block: int, leaf: Array) -> None:
        """Add the leaf of a block, and every parent whose children are both there then."""
        first, width, value = block, 1, leaf
        while True:
            parent = first - first % (2 * width)
            sibling = parent + width if first == parent else parent
            inside = self.start <= parent and parent + 2 * width <= self.stop
            if not inside or (sibling, width) not in self.known and not is_absent(self.partition, sibling, width):
                break
            if (sibling, width) in self.known:
                other = self.known.pop((sibling, width))
                value, other = (value, other) if first == parent else (other, value)
                value += other                  # left + right, whichever came first
            first, width = parent, 2 * width
        self.known[first, width] = value


def finish(known: dict[Node, Array], first: int, width: int) -> Any:
    """Return the value of node (first, width) from the known nodes below it; None where all of it is absent.

    The arrays in `known` are overwritten.
    """
    if (first, width) in known:
        return known[first, width]
    if width == 1:
        return None
    left = finish(known, first, width // 2)
    right = finish(known, first + width // 2, width // 2)
    if left is None or right is None:
        return right if left is None else left
    left += right
    return left


def root_width(blocks: int) -> int:
    """Return how many leaves the whole tree over so many blocks has: the next power of two."""
    return 1 << (blocks - 1).bit_length()


def bytes_sent(partition: Partition, rank: int, elements: int, itemsize: int) -> int:
    """Return the bytes that exchange() sends from this rank to others."""
    chunk = ranges(elements, partition.ranks)
    own = chunk[rank + 1] - chunk[rank]
    folded = len(nodes_of_ranks(partition)[rank])
    return itemsize * (folded * (elements - own) + (partition.ranks - 1) * own)


def exchange(fold: Fold, rank: int, total: Array, transport: Any) -> None:
    """Finish the sum over the ranks into the flat array `total`. Collective.

    MPI_Alltoall of this rank's nodes, a chunk to each rank, then MPI_Allgather of one finished chunk: where P divides
    the blocks that is 2 (P-1)/P of the array, as little as the best all-reduce sends. Where ranks have unequal numbers
    of nodes or chunks differ, MPI_Alltoallv and MPI_Allgatherv: a chunk's width is a rank's own, its nodes another's,
    so counts that are all equal on one rank are so on all.
    """
    nodes = nodes_of_ranks(fold.partition)
    mine = [fold.known[node].reshape(-1) for node in nodes[rank]]
    node_count = sum(map(len, nodes))                       # a rank sends or receives no more than so many arrays
    if node_count == 0:
        total[...] = 0                                      # every block is empty
        return
    for part in messages(total.size, node_count * total.itemsize, transport.message_bytes):
        exchange_message(nodes, fold.partition.blocks, rank, [node[part] for node in mine], total[part], transport)


def exchange_message(nodes: list[list[Node]], blocks: int, rank: int, mine: list[Array], total: Array,
                     transport: Any) -> None:
    """Finish as much of the sum as a message holds: exchange chunks of every node, add them in the tree, spread it."""
    xp: Any = module_of(total)
    size = len(nodes)
    chunk = ranges(total.size, size)
    width = [stop - start for start, stop in zip(chunk, chunk[1:])]
    if len(mine) == 1:
        send = mine[0]
    else:                                                   # chunk p of every node goes to rank p
        parts = [node[chunk[p]:chunk[p + 1]] for p in range(size) for node in mine]
        send = xp.concatenate(parts) if parts else xp.empty(0, total.dtype)
    every_node = [node for of_rank in nodes for node in of_rank]
    received = xp.empty((len(every_node), width[rank]), total.dtype)
    transport.all_to_all(send, [len(mine) * w for w in width],
                         received.reshape(-1), [len(of_rank) * width[rank] for of_rank in nodes])
    transport.all_gather(finish(dict(zip(every_node, received)), 0, root_width(blocks)), total, width)
