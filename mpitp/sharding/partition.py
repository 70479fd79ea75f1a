"""Which contiguous range of a dimension each rank owns: integers only, no arrays, no MPI.

A dimension is first cut into blocks, then every rank takes a run of whole blocks. With one block a rank
(the ordinary mode) that is the usual even split; with a fixed number of blocks (reproducible mode) the
blocks, and so everything that is computed per block, are the same for any number of ranks.

    10 features, 3 ranks, one block each     [0 1 2] [3 4 5] [6 7 8 9]
    10 features, 3 ranks, 4 blocks           [0 1] [2 3 4] [5 6] [7 8 9]  ->  ranks 0: 1 block, 1: 1, 2: 2

The features of an attention head stay together: bounds are then multiples of its size. See heads.py.
"""
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property


def ranges(size: int, parts: int) -> list[int]:
    """Return the bounds of `parts` contiguous ranges of `size`, as equal as can be; empty ones where parts > size."""
    return [size * i // parts for i in range(parts + 1)]


@dataclass(frozen=True)
class Block:
    """A block is what is computed, and added to a sum, at one time.

    Attributes
    ----------
    index : int
        Position among the blocks of the dimension, and leaf of the summation tree.
    start, stop : int
        Its range in the whole dimension.
    local : slice
        The same range in the array of the rank that owns it.
    """
    index: int
    start: int
    stop: int
    local: slice


@dataclass(frozen=True)
class Partition:
    """A partition cuts a dimension of `size` into `blocks` and deals them in runs over `ranks`.

    Empty ranges are normal: a rank may own no block (more ranks than blocks), and a block may hold nothing (more
    blocks than features).

    Parameters
    ----------
    size : int
        Length of the dimension.
    ranks, blocks : int
        How many ranks and blocks there are.
    multiple : int
        Every bound is a multiple of this. The features of a head, for example, stay together.
    share : int
        Grouped-query attention, for a dimension of key/value heads: how many query heads use one of them. The query
        heads are dealt, and a key/value head belongs to the block of its first query head.
    """
    size: int
    ranks: int
    blocks: int
    multiple: int = 1
    share: int = 1

    @cached_property
    def dealt_bounds(self) -> list[int]:
        """The bounds of the blocks in what is dealt: query heads, where they share key/value heads; else multiples."""
        return ranges(self.size // self.multiple * self.share, self.blocks)

    @cached_property
    def block_bounds(self) -> list[int]:
        """Block b holds features block_bounds[b] up to block_bounds[b + 1]."""
        return [self.multiple * -(-bound // self.share) for bound in self.dealt_bounds]

    @cached_property
    def run_bounds(self) -> list[int]:
        """Rank r owns blocks run_bounds[r] up to run_bounds[r + 1]."""
        return ranges(self.blocks, self.ranks)

    @cached_property
    def bounds(self) -> list[int]:
        """Rank r owns features bounds[r] up to bounds[r + 1]."""
        return [self.block_bounds[run] for run in self.run_bounds]

    @cached_property
    def lengths(self) -> list[int]:
        """How many features each rank owns."""
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:])]

    def range(self, rank: int) -> slice:
        """Return the part of the dimension that this rank owns."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def held(self, rank: int) -> slice:
        """Return the part that this rank has a copy of.

        That is the part that it owns. In front of it may stand one key/value head more, which an earlier rank
        owns and that this rank's first query heads use too.
        """
        first, last = (self.dealt_bounds[run] for run in self.run_bounds[rank:rank + 2])
        if first == last:
            return self.range(rank)
        return slice(self.multiple * (first // self.share), self.bounds[rank + 1])

    def owned_of_held(self, rank: int) -> slice:
        """Return where the owned part lies in the array of the held part."""
        start = self.held(rank).start
        return slice(self.bounds[rank] - start, self.bounds[rank + 1] - start)

    def rank_of(self, block: int) -> int:
        """Return the rank that owns a block."""
        return bisect_right(self.run_bounds, block) - 1

    def is_empty(self, block: int) -> bool:
        """Return whether a block holds nothing."""
        return self.block_bounds[block] == self.block_bounds[block + 1]

    def blocks_of(self, rank: int) -> tuple[Block, ...]:
        """Return the blocks that this rank owns and that hold anything, in order."""
        found = self.known_blocks.get(rank)
        if found is None:
            first = self.bounds[rank]
            found = self.known_blocks[rank] = tuple(
                Block(b, start, stop, slice(start - first, stop - first))
                for b in range(self.run_bounds[rank], self.run_bounds[rank + 1])
                for start, stop in [self.block_bounds[b:b + 2]] if start < stop)
        return found

    @cached_property
    def known_blocks(self) -> dict[int, tuple[Block, ...]]:
        """Keep the results of blocks_of. Hashing a partition for lru_cache would cost more than a token's sum."""
        return {}
