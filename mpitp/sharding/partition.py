"""Which contiguous range of a dimension each rank owns: integers only, no arrays, no MPI.

A dimension is first cut into blocks, then every rank takes a run of whole blocks. With one block a rank
(the ordinary mode) that is the usual even split; with a fixed number of blocks (reproducible mode) the
blocks, and so everything that is computed per block, are the same for any number of ranks.

    10 features, 3 ranks, one block each     [0 1 2] [3 4 5] [6 7 8 9]
    10 features, 3 ranks, 4 blocks           [0 1] [2 3 4] [5 6] [7 8 9]  ->  ranks 0: 1 block, 1: 1, 2: 2

Attention heads are units of several features that stay together; and a key/value head that several query heads
share is held wherever one of them is, owned by the rank of the first:

    6 query heads, 2 key/value heads, 4 ranks, one block each
    query heads      [0]   [1 2]   [3]   [4 5]
    key/value heads   0      0      1      1         held; rank 0 owns head 0, rank 2 owns head 1
"""
from bisect import bisect_right
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

    unit : how many neighbours stay together, such as the features of a head
    share : how many query heads need one unit: those are dealt, and a unit belongs to the block of its first one
    """
    size: int
    ranks: int
    blocks: int
    unit: int = 1
    share: int = 1

    @cached_property
    def dealt_bounds(self):
        """Bounds of the blocks in what is dealt: query heads for a shared unit, else the units themselves."""
        return ranges(self.size // self.unit * self.share, self.blocks)

    @cached_property
    def block_bounds(self):
        return [self.unit * -(-bound // self.share) for bound in self.dealt_bounds]

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
        """The part of the dimension that this rank owns, as a slice."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def held(self, rank):
        """The part that this rank has a copy of: what it owns and, before it, the shared unit that it needs."""
        first, last = (self.dealt_bounds[run] for run in self.run_bounds[rank:rank + 2])
        if first == last:
            return self.range(rank)
        return slice(self.unit * (first // self.share), self.bounds[rank + 1])

    def owned_of_held(self, rank):
        """Where the owned part lies in the array that holds the held part, as a slice."""
        start = self.held(rank).start
        return slice(self.bounds[rank] - start, self.bounds[rank + 1] - start)

    def rank_of(self, block):
        return bisect_right(self.run_bounds, block) - 1

    def is_empty(self, block):
        return self.block_bounds[block] == self.block_bounds[block + 1]

    def blocks_of(self, rank):
        """The blocks that this rank owns and that hold anything, in order."""
        found = self.known_blocks.get(rank)
        if found is None:
            first = self.bounds[rank]
            found = self.known_blocks[rank] = tuple(
                Block(b, start, stop, slice(start - first, stop - first))
                for b in range(self.run_bounds[rank], self.run_bounds[rank + 1])
                for start, stop in [self.block_bounds[b:b + 2]] if start < stop)
        return found

    @cached_property
    def known_blocks(self):
        """Those of ranks that were asked for. Not lru_cache: to hash a partition would cost more than a token's sum."""
        return {}


@dataclass(frozen=True)
class Segment(Partition):
    """A partition of which only first..last - 1 is there: the query heads of one key/value head, to be summed over."""
    first: int = 0
    last: int = 0

    @cached_property
    def block_bounds(self):
        return [min(max(bound, self.first), self.last) for bound in self.dealt_bounds]


@dataclass(frozen=True)
class KeyValueUnit:
    """Key/value heads that are projected in one product, on every rank that needs them.

    start, stop : the key/value heads
    blocks : the blocks of query heads that need them; the first owns them
    partition : their query heads, over which the gradients of key and value add up
    """
    start: int
    stop: int
    blocks: tuple
    partition: Segment

    @property
    def is_shared(self):
        """Whether several ranks hold a copy."""
        return self.partition.rank_of(self.blocks[0]) != self.partition.rank_of(self.blocks[-1])

    def held_by(self, rank):
        return any(self.partition.rank_of(block) == rank for block in self.blocks)


@lru_cache(maxsize=None)
def key_value_units(heads, groups, ranks, blocks):
    """The units of `groups` key/value heads that serve `heads` query heads, in order.

    Heads that one block alone needs form one unit, a head that several blocks need is a unit of its own. So a
    unit, and the bits of its product, depend on the blocks and never on which rank asks.
    """
    share, query = heads // groups, Partition(heads, ranks, blocks)
    bounds = query.block_bounds
    runs = []                                   # [first kv head, stop, blocks]
    for head in range(groups):
        first, last = (bisect_right(bounds, query_head) - 1 for query_head in (head * share, (head + 1) * share - 1))
        needed_by = tuple(b for b in range(first, last + 1) if not query.is_empty(b))
        if runs and runs[-1][2] == needed_by and len(needed_by) == 1:
            runs[-1][1] = head + 1
        else:
            runs.append([head, head + 1, needed_by])
    return tuple(KeyValueUnit(start, stop, needed_by,
                              Segment(heads, ranks, blocks, first=start * share, last=stop * share))
                 for start, stop, needed_by in runs)
