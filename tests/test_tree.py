"""The fixed tree: the same additions whatever the number of ranks and the order in which leaves come."""
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from mpitp.comm import tree
from mpitp.sharding.partition import Partition
from spmd import draw, same_bytes, sum_of_blocks

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=150)


def reference(leaves, first, width):
    """The tree by its definition. leaves: {block: value}."""
    if width == 1:
        return leaves.get(first)
    left, right = reference(leaves, first, width // 2), reference(leaves, first + width // 2, width // 2)
    return right if left is None else left if right is None else left + right


def root(blocks):
    return 1 << (blocks - 1).bit_length()


def test_aligned_nodes():
    assert tree.aligned_nodes(0, 8) == [(0, 8)]
    assert tree.aligned_nodes(2, 5) == [(2, 2), (4, 1)]
    assert tree.aligned_nodes(5, 8) == [(5, 1), (6, 2)]
    assert tree.aligned_nodes(3, 3) == []


@SETTINGS
@given(st.integers(1, 40), st.integers(1, 33), st.integers(1, 12), st.integers(0, 10_000))
def test_fold_and_finish_make_the_tree(size, blocks, ranks, seed):
    """Any order of arrival, any number of ranks, blocks that are absent: the bits of the definition."""
    partition = Partition(size, ranks, blocks)
    leaves = {b: draw(seed + b, 3, dtype=np.float32) for b in range(blocks) if not partition.is_empty(b)}
    known = {}
    for rank in range(ranks):
        fold = tree.Fold(partition, rank)
        mine = [block.index for block in partition.blocks_of(rank)]
        random.Random(seed).shuffle(mine)
        for b in mine:
            fold.add(b, leaves[b].copy())
        assert sorted(fold.known) == tree.nodes_of_ranks(partition)[rank]
        known.update(fold.known)
    found = tree.finish(known, 0, root(blocks))
    assert same_bytes(found, reference(leaves, 0, root(blocks)))


def test_few_partial_sums_are_alive():
    fold = tree.Fold(Partition(64, 1, 64), 0)
    most = 0
    for b in range(64):
        fold.add(b, np.ones(1))
        most = max(most, len(fold.known))
    assert most <= 6


def test_an_absent_block_is_not_a_zero():
    """-0.0 + 0.0 is +0.0."""
    partition = Partition(3, 2, 8)
    leaves = {b: np.array([-0.0]) for b in range(8) if not partition.is_empty(b)}
    known = {}
    for rank in range(2):
        fold = tree.Fold(partition, rank)
        for block in partition.blocks_of(rank):
            fold.add(block.index, leaves[block.index].copy())
        known.update(fold.known)
    assert np.signbit(tree.finish(known, 0, 8)[0])


def values(partition, seed, shape, dtype):
    return {b: (draw(seed + b, *shape) * 10.0 ** (b % 5)).astype(dtype) for b in range(partition.blocks)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size, blocks, shape", [(64, 8, (3, 5)), (3, 8, (4,)), (7, 6, (2, 2)), (40, 1, (3,)),
                                                 (40, 32, (1,)), (9, 8, (0, 4)), (8, 8, ())])
def test_a_sum_has_the_same_bits_for_every_number_of_ranks(world, size, blocks, shape, dtype):
    """Groups of 1, 2, ... ranks out of this job against the definition, in several messages and in one."""
    for ranks in range(1, world.size + 1):
        part = world.Split(0 if world.rank < ranks else 1)
        with mpitp.TensorParallelGroup(part, reproducible=True, blocks=blocks, check=True) as group:
            partition = group.partition(size)
            leaves = values(partition, 5, shape, dtype)
            expected = reference({b: x for b, x in leaves.items() if not partition.is_empty(b)}, 0, root(blocks))
            for message_bytes in (1 << 30, 100):
                group.transport.message_bytes = message_bytes
                found = sum_of_blocks(group, lambda block: leaves[block.index].copy(), partition, shape, dtype)
                assert same_bytes(found, np.asarray(expected)), (ranks, message_bytes)
        part.Free()


@pytest.mark.parametrize("size, blocks, shape", [(64, 8, (5, 7)), (3, 8, (11,)), (9, 5, (2, 2)), (1, 8, (6,)),
                                                 (20, 32, (3,)),
                                                 (8, 8, (0, 3))])
def test_bytes_sent(world, size, blocks, shape):
    """The ledger's bytes against what is really handed to the transport for other ranks."""
    with mpitp.TensorParallelGroup(reproducible=True, blocks=blocks) as group:
        sent = []
        to_all, gather = group.transport.all_to_all, group.transport.all_gather

        def all_to_all(send, send_counts, receive, receive_counts):
            sent.append(send.itemsize * (sum(send_counts) - send_counts[group.rank]))
            to_all(send, send_counts, receive, receive_counts)

        def all_gather(send, receive, counts):
            sent.append(send.nbytes * (group.size - 1))
            gather(send, receive, counts)

        group.transport.all_to_all, group.transport.all_gather = all_to_all, all_gather
        sum_of_blocks(group, lambda block: np.ones(shape), group.partition(size), shape, "float64")
        assert group.ledger.wire_bytes() == sum(sent)
        best = 2 * (group.size - 1) * 8 * int(np.prod(shape)) // group.size
        if blocks % group.size == 0 and size % blocks == 0 and np.prod(shape) % group.size == 0:
            assert sum(sent) == best                                # as little as the best all-reduce


def test_a_sum_of_nothing_is_zero(world):
    for reproducible in (False, True):
        with mpitp.TensorParallelGroup(reproducible=reproducible, check=True) as group:
            total = sum_of_blocks(group, lambda block: 1 / 0, group.partition(0), (2, 3), "float32")
            assert same_bytes(total, np.zeros((2, 3), "f"))


def sum_of_few_blocks(leaf):
    with mpitp.TensorParallelGroup(reproducible=True) as group:
        return sum_of_blocks(group, lambda block: np.full(5, leaf), group.partition(3), (5,), "float64")


def test_a_sum_of_few_blocks_keeps_the_sign_of_zero(world):
    assert np.signbit(sum_of_few_blocks(-0.0)).all() and not np.signbit(sum_of_few_blocks(0.0)).any()


def test_every_rank_has_the_same_bits(world):
    with mpitp.TensorParallelGroup(reproducible=True, blocks=6) as group:
        total = sum_of_blocks(group, lambda block: draw(block.index, 1000), group.partition(90), (1000,), "float64")
        assert len(set(world.allgather(total.tobytes()))) == 1


# --- the tester, tested ------------------------------------------------------------------------------------

def test_a_sum_in_rank_order_would_be_seen(world):
    """MPI_Allreduce in place of the tree: other bits for some number of ranks."""
    partition = Partition(64, 3, 8)
    leaves = values(partition, 5, (200,), "float32")
    expected = reference(leaves, 0, 8)
    by_rank = [sum(leaves[block.index] for block in partition.blocks_of(rank)) for rank in range(3)]
    assert not same_bytes(by_rank[0] + by_rank[1] + by_rank[2], expected)


@pytest.fixture
def sum_of_ranks(world):
    """The bytes of one reproducible sum on all the ranks of this job."""
    def compute():
        with mpitp.TensorParallelGroup(reproducible=True) as group:
            partition = group.partition(64)
            leaves = values(partition, 5, (200,), "float32")
            total = sum_of_blocks(group, lambda block: leaves[block.index].copy(), partition, (200,), "float32")
            return total.tobytes()
    return compute


def test_nodes_added_one_after_the_other_would_be_seen(world, monkeypatch, sum_of_ranks):
    if world.size == 1:
        pytest.skip("one rank has one node")
    right = sum_of_ranks()

    def wrong(known, first, width):
        total = 0
        for node in sorted(known, reverse=True):
            total = total + known[node]
        return total
    monkeypatch.setattr(tree, "finish", wrong)
    assert (sum_of_ranks() != right) == (world.size != 2)           # two nodes have one order


def test_a_zero_for_an_absent_block_would_be_seen(world, monkeypatch):
    right = tree.finish

    def wrong(known, first, width):
        node = right(known, first, width)
        return None if node is None else node + 0.0
    monkeypatch.setattr(tree, "finish", wrong)
    assert not np.signbit(sum_of_few_blocks(-0.0)).any()
