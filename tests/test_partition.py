"""Ranges, blocks and who owns them."""
from hypothesis import given, settings
from hypothesis import strategies as st

from mpitp.partition import Partition, ranges

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
