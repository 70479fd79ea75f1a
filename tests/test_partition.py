"""Ranges, blocks and who owns them."""
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitp.sharding.heads import key_value_units
from mpitp.sharding.partition import Partition, ranges

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=100)
SIZES = st.integers(1, 70)
PARTS = st.integers(1, 20)


@SETTINGS
@given(SIZES, PARTS)
def test_ranges_cover_everything_evenly(size, parts):
    bounds = ranges(size, parts)
    lengths = [b - a for a, b in zip(bounds, bounds[1:])]
    assert bounds[0] == 0 and bounds[-1] == size and len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1


@SETTINGS
@given(SIZES, PARTS, PARTS)
def test_every_feature_has_one_rank_and_one_block(size, ranks, blocks):
    partition = Partition(size, ranks, blocks)
    owned = [i for rank in range(ranks) for i in range(size)[partition.range(rank)]]
    assert owned == list(range(size))
    assert sum(partition.lengths) == size
    covered = []
    for rank in range(ranks):
        array = list(range(size))[partition.range(rank)]
        for block in partition.blocks_of(rank):
            assert block.start < block.stop and not partition.is_empty(block.index)
            assert array[block.local] == list(range(block.start, block.stop))
            covered.append(block.index)
    assert covered == [b for b in range(blocks) if not partition.is_empty(b)]


@SETTINGS
@given(SIZES, PARTS, PARTS, PARTS)
def test_blocks_do_not_depend_on_the_number_of_ranks(size, blocks, few, many):
    def blocks_of(ranks):
        partition = Partition(size, ranks, blocks)
        return [(b.index, b.start, b.stop) for rank in range(ranks) for b in partition.blocks_of(rank)]
    assert blocks_of(few) == blocks_of(many)


def test_the_notebook_on_two_ranks():
    assert Partition(40, 2, 2).bounds == [0, 20, 40]


def test_more_ranks_than_features():
    assert Partition(2, 5, 5).lengths == [0, 0, 1, 0, 1]


# --- heads: units that stay together, and key/value heads that several query heads share ----------------------

heads = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.booleans())


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(heads)
def test_key_value_heads_have_one_owner_and_their_holders(case):
    groups, share, ranks, unit, fixed = case
    blocks = 8 if fixed else ranks
    query = Partition(groups * share, ranks, blocks)
    rows = Partition(groups * unit, ranks, blocks, unit, share)
    assert rows.bounds[0] == 0 and rows.bounds[-1] == groups * unit and sum(rows.lengths) == groups * unit
    for rank in range(ranks):
        mine = query.range(rank)
        needed = sorted({head // share for head in range(mine.start, mine.stop)})
        held, owned = rows.held(rank), rows.range(rank)
        assert list(range(held.start // unit, held.stop // unit)) == needed
        assert [head for head in needed if mine.start <= head * share] == \
            list(range(owned.start // unit, owned.stop // unit))
        inside = rows.owned_of_held(rank)
        assert (held.start + inside.start, held.start + inside.stop) == (owned.start, owned.stop)


@settings(derandomize=True, deadline=None, database=None, max_examples=300)
@given(heads)
def test_units_cover_the_heads_and_do_not_depend_on_the_ranks(case):
    groups, share, ranks, _, fixed = case
    blocks = 8 if fixed else ranks
    units = key_value_units(groups * share, groups, ranks, blocks)
    assert [head for unit in units for head in range(unit.start, unit.stop)] == list(range(groups))
    query = Partition(groups * share, ranks, blocks)
    for unit in units:
        assert unit.partition.first == unit.start * share and unit.partition.last == unit.stop * share
        assert len(unit.blocks) == 1 or unit.stop == unit.start + 1
        found = {block.index: block for rank in range(ranks) for block in unit.partition.blocks_of(rank)}
        assert tuple(found) == unit.blocks
        assert sum(block.stop - block.start for block in found.values()) == (unit.stop - unit.start) * share
        holders = [rank for rank in range(ranks) if unit.held_by(rank)]
        for rank in range(ranks):
            mine = query.range(rank)
            needs = any(unit.start <= head // share < unit.stop for head in range(mine.start, mine.stop))
            assert needs == (rank in holders)
        assert unit.is_shared == (len(holders) > 1)
    if fixed:
        alone = key_value_units(groups * share, groups, 1, blocks)
        assert [(unit.start, unit.stop, unit.blocks) for unit in units] == [(u.start, u.stop, u.blocks) for u in alone]


def test_heads_by_example():
    """The picture in partition.py."""
    rows = Partition(2, 4, 4, share=3)
    assert [rows.held(rank) for rank in range(4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    assert rows.lengths == [1, 0, 1, 0]
    assert [unit.blocks for unit in key_value_units(6, 2, 4, 4)] == [(0, 1), (2, 3)]
    assert [(u.start, u.stop) for u in key_value_units(8, 8, 2, 2)] == [(0, 4), (4, 8)]
