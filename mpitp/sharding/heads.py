"""Which key/value heads a rank holds: grouped-query attention, where several query heads share one of them.

A key/value head is held wherever a query head that uses it is, and owned by the rank of the first one:

    6 query heads, 2 key/value heads, 4 ranks, one block each
    query heads      [0]   [1 2]   [3]   [4 5]
    key/value heads   0      0      1      1         held; rank 0 owns head 0, rank 2 owns head 1
"""
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, cache

from .partition import Partition


@dataclass(frozen=True)
class Segment(Partition):
    """A segment is the part first..last - 1 of a partition: the query heads of one key/value head."""
    first: int = 0
    last: int = 0

    @cached_property
    def block_bounds(self) -> list[int]:
        """Block b holds features block_bounds[b] up to block_bounds[b + 1]."""
        return [min(max(bound, self.first), self.last) for bound in self.dealt_bounds]


@dataclass(frozen=True)
class KeyValueUnit:
    """A unit is a run of key/value heads that are projected in one product, on every rank that needs them.

    Attributes
    ----------
    start, stop : int
        The key/value heads.
    blocks : tuple of int
        The blocks of query heads that need them; the first owns them.
    partition : Segment
        Their query heads, over which the gradients of key and value add up.
    """
    start: int
    stop: int
    blocks: tuple[int, ...]
    partition: Segment

    @property
    def is_shared(self) -> bool:
        """Whether several ranks hold a copy."""
        return self.partition.rank_of(self.blocks[0]) != self.partition.rank_of(self.blocks[-1])

    def held_by(self, rank: int) -> bool:
        """Return whether this rank has query heads that need the unit."""
        return any(self.partition.rank_of(block) == rank for block in self.blocks)


@cache
def key_value_units(heads: int, groups: int, ranks: int, blocks: int) -> tuple[KeyValueUnit, ...]:
    """Return the units of `groups` key/value heads that serve `heads` query heads, in order.

    Heads that one block alone needs form one unit, a head that several blocks need is a unit of its own. So a
    unit, and the bits of its product, depend on the blocks and never on which rank asks.
    """
    share, query = heads // groups, Partition(heads, ranks, blocks)
    bounds = query.block_bounds
    runs: list[tuple[int, int, tuple[int, ...]]] = []               # first kv head, stop, blocks
    for head in range(groups):
        first, last = (bisect_right(bounds, query_head) - 1 for query_head in (head * share, (head + 1) * share - 1))
        needed_by = tuple(b for b in range(first, last + 1) if not query.is_empty(b))
        if runs and runs[-1][2] == needed_by and len(needed_by) == 1:
            runs[-1] = runs[-1][0], head + 1, needed_by
        else:
            runs.append((head, head + 1, needed_by))
    return tuple(KeyValueUnit(start, stop, needed_by,
                              Segment(heads, ranks, blocks, first=start * share, last=stop * share))
                 for start, stop, needed_by in runs)
