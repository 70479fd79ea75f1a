"""Which contiguous range of a dimension each rank owns: integers only, no arrays, no MPI.

A dimension is first cut into blocks, then every rank takes a run of whole blocks. With one block a rank
(the ordinary mode) that is the usual even split; with a fixed number of blocks (reproducible mode) the
blocks, and so everything that is computed per block, are the same for any number of ranks.

    10 features, 3 ranks, one block each     [0 1 2] [3 4 5] [6 7 8 9]
    10 features, 3 ranks, 4 blocks           [0 1] [2 3 4] [5 6] [7 8 9]  ->  ranks 0: 1 block, 1: 1, 2: 2
"""
from dataclasses import dataclass
from functools import cached_property, lru_cache


def ranges(size, parts):
    """Bounds of `parts` contiguous ranges of `size`, as equal as can be; empty ones where parts > size."""
    return [size * i // parts for i in range(parts + 1)]


@dataclass(frozen=True)
class Block:
    """One unit of work and of summation.

    index : position among the blocks of the dimension, and leaf of the summation tree
    start, stop : its range in the whole dimension
    local : the same range as a slice of the array of the rank that owns it
    """
    index: int
    start: int
    stop: int
    local: slice


@dataclass(frozen=True)
class Partition:
    """A dimension of `size` cut into `blocks`, dealt in runs over `ranks`; empty ranges are normal.

    A rank may own no block (more ranks than blocks), a block may own nothing (more blocks than features).
    """
    size: int
    ranks: int
    blocks: int

    @cached_property
    def block_bounds(self):
        return ranges(self.size, self.blocks)

    @cached_property
    def run_bounds(self):
        """Rank r owns blocks run_bounds[r] up to run_bounds[r + 1]."""
        return ranges(self.blocks, self.ranks)

    @cached_property
    def bounds(self):
        """Rank r owns features bounds[r] up to bounds[r + 1]."""
        return [self.block_bounds[run] for run in self.run_bounds]

    @cached_property
    def lengths(self):
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:])]

    def range(self, rank):
        """This rank's part of the dimension, as a slice."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def is_empty(self, block):
        return self.block_bounds[block] == self.block_bounds[block + 1]

    @lru_cache(maxsize=None)
    def blocks_of(self, rank):
        """The blocks that this rank owns and that hold anything, in order."""
        first = self.bounds[rank]
        return tuple(Block(b, start, stop, slice(start - first, stop - first))
                     for b in range(self.run_bounds[rank], self.run_bounds[rank + 1])
                     for start, stop in [self.block_bounds[b:b + 2]] if start < stop)
