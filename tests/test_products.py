"""f, g, gather and scatter: what they compute, and that each is the adjoint of its neighbour.

<dy, A x> = <A* dy, x>, where a replicated tensor counts once and a split one is summed over its parts. With a second
all-reduce in place of the identity both sides would be P times too large and still agree, if copies were counted:
so the values themselves are compared too.
"""
from collections import Counter

import numpy as np
import pytest

from mpitp.comm.ledger import Collective
from mpitp.layers import gather, products
from spmd import draw, everywhere, same_bytes

SIZES = pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
ROWS = 3


def inner(a, b):
    """Of two replicated tensors: each counts once."""
    return float((a * b).sum())


def split_inner(group, a, b):
    """Of two tensors of which each rank has a part."""
    return group.comm.allreduce(inner(a, b))


def close(a, b):
    return everywhere(abs(a - b) <= 1e-12 * max(1.0, abs(a)))


def leaves(partition):
    """What block b contributes: (ROWS, 4), the same whoever computes it."""
    return {b: draw(100 + b, ROWS, 4) for b in range(partition.blocks) if not partition.is_empty(b)}


@SIZES
def test_f_and_g(group, size):
    """Both ways of the sum: f* and g. The parts are one term a block."""
    partition = group.partition(size)
    terms = leaves(partition)
    mine = [b.index for b in partition.blocks_of(group.rank)]
    x, dy = draw(1, ROWS, 4), draw(2, ROWS, 4)
    for reduce in (products.copy_to_ranks_backward, products.reduce_from_ranks_forward):
        group.ledger.clear()
        total = group.sum(partition, (ROWS, 4), np.float64)
        for block in partition.blocks_of(group.rank):
            total.add(block, terms[block.index].copy())
        total = reduce(total)
        assert everywhere(np.abs(total - sum(terms.values())).max() < 1e-13)
        assert group.ledger.counts() == Counter({Collective("all_reduce", ROWS * 4, "float64"): 1})
        # f: every block used x, and sent back its term;  g: every block's term counts once
        for identity, value in ((products.copy_to_ranks_forward, x), (products.reduce_from_ranks_backward, dy)):
            assert identity(value) is value
            of_parts = group.comm.allreduce(sum(inner(terms[b], identity(value)) for b in mine))
            assert close(inner(total, value), of_parts)
    assert group.ledger.counts() == Counter({Collective("all_reduce", ROWS * 4, "float64"): 1})


@SIZES
def test_gather(group, size):
    partition = group.partition(size)
    whole, dy = draw(1, ROWS, size), draw(2, ROWS, size)
    part = np.ascontiguousarray(whole[:, partition.range(group.rank)])
    group.ledger.clear()
    y = gather.gather_from_ranks_forward(part, partition, group)
    assert everywhere(same_bytes(y, whole))
    assert group.ledger.counts() == Counter({Collective("all_gather", ROWS * size, "float64"): 1})
    d_part = gather.gather_from_ranks_backward(dy, partition, group)
    assert everywhere(same_bytes(d_part, np.ascontiguousarray(dy[:, partition.range(group.rank)])))
    assert sum(group.ledger.counts().values()) == 1         # the way back needs none
    assert close(inner(dy, y), split_inner(group, d_part, part))


@SIZES
def test_scatter(group, size):
    partition = group.partition(size)
    x, whole_dy = draw(1, ROWS, size), draw(2, ROWS, size)
    group.ledger.clear()
    part = gather.scatter_to_ranks_forward(x, partition, group)
    assert not group.ledger.counts()
    assert everywhere(same_bytes(part, np.ascontiguousarray(x[:, partition.range(group.rank)])))
    dy = np.ascontiguousarray(whole_dy[:, partition.range(group.rank)])
    dx = gather.scatter_to_ranks_backward(dy, partition, group)
    assert everywhere(same_bytes(dx, whole_dy))
    assert group.ledger.counts() == Counter({Collective("all_gather", ROWS * size, "float64"): 1})
    assert close(split_inner(group, dy, part), inner(dx, x))
