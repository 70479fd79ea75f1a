"""Ranks that do not mean the same collective: caught on every rank, with what each one said."""
import numpy as np
import pytest

import mpitp
from mpitp import InputError
from mpitp.comm import agreement


@pytest.fixture(scope="module")
def group(world):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    with mpitp.TensorParallelGroup(check=True) as group:
        yield group


def last(group):
    """The last rank is the one that differs."""
    return group.rank == group.size - 1


MISMATCHES = {
    "dtype and length": lambda g: g.all_reduce(np.ones(4, "f8") if last(g) else np.ones(8, "f4")),
    "shape": lambda g: g.all_reduce(np.ones((6, 4) if last(g) else (4, 6))),
    "memory order": lambda g: g.all_reduce(np.ones((4, 6), order="F" if last(g) else "C")),
    "operation": lambda g: g.all_reduce(np.ones(3), "max" if last(g) else "sum"),
    "collective": lambda g: g.broadcast(np.ones(3)) if last(g) else g.all_reduce(np.ones(3)),
    "blocking": lambda g: g.begin_all_reduce(np.ones(3)) if last(g) else g.all_reduce(np.ones(3)),
    "root": lambda g: g.broadcast(np.ones(3), root=1 if last(g) else 0),
    "partition": lambda g: g.reduce_scatter(np.ones((6, 6)), g.partition(6), axis=0 if last(g) else 1),
    "the sum over blocks": lambda g: g.sum_blocks(lambda block: np.ones(3), g.partition(6 if last(g) else 7), (3,),
                                                  "float64"),
    "layer sizes": lambda g: mpitp.ParallelMLP(g, 4, 9).forward(np.ones((3 if last(g) else 2, 4), "f")),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_caught_on_every_rank(group, mismatch):
    caught = None
    try:
        MISMATCHES[mismatch](group)
    except InputError as error:
        caught = str(error)
    said = group.comm.allgather(caught)
    assert all(text and "the ranks disagree on a collective: rank" in text and "\n" not in text for text in said), said
    assert all(f"rank {group.size - 1}: " in text for text in said)
    assert group.all_reduce(np.ones(2))[0] == group.size            # the group can be used as before


def test_leaving_early_is_caught(world):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    group = mpitp.TensorParallelGroup(check=True)
    with pytest.raises(InputError, match="close.*all_reduce|all_reduce.*close"):
        group.close() if last(group) else group.all_reduce(np.ones(3))
    group.close()


@pytest.mark.parametrize("arguments", [dict(reproducible=True), dict(check=True), dict(blocks=4)])
def test_group_arguments(world, arguments):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    with pytest.raises(InputError, match="disagree on the group's arguments"):
        mpitp.TensorParallelGroup(**(arguments if world.rank == 0 else {}))


def test_without_check_nothing_more_is_sent(world):
    with mpitp.TensorParallelGroup() as group:
        group.all_reduce(np.ones(3))
        assert not group.ledger.control


def test_by_ranks():
    assert agreement.by_ranks(["a", "b", "a"]) == "ranks 0, 2: a; rank 1: b"


def test_agree(group):
    assert agreement.agree(group.comm, "the same") and not agreement.agree(group.comm, f"rank {group.rank}")
