"""Ranks that do not mean the same collective: caught on every rank, with what each one said."""
import sys

import numpy as np
import pytest

import mpitp
from groups import group_fixture
from mpitp import InputError
from mpitp.comm import agreement, collectives
from mpitp.comm.tree import nodes_of_ranks
from spmd import same_bytes, sum_of_blocks


group = group_fixture("ordinary", scope="module")


@pytest.fixture(autouse=True)
def several_ranks(request, world):
    if "group" in request.fixturenames and world.size == 1:
        pytest.skip("one rank agrees with itself")


def last(group):
    """The last rank is the one that differs."""
    return group.rank == group.size - 1


MISMATCHES = {
    "dtype and length": lambda g: g.all_reduce(np.ones(4, "f8") if last(g) else np.ones(8, "f4")),
    "shape": lambda g: g.all_reduce(np.ones((6, 4) if last(g) else (4, 6))),
    "operation": lambda g: g.all_reduce(np.ones(3), "max" if last(g) else "sum"),
    "collective": lambda g: g.broadcast(np.ones(3)) if last(g) else g.all_reduce(np.ones(3)),
    "blocking": lambda g: g.begin_all_reduce(np.ones(3)) if last(g) else g.all_reduce(np.ones(3)),
    "root": lambda g: g.broadcast(np.ones(3), root=1 if last(g) else 0),
    "partition": lambda g: g.reduce_scatter(np.ones((6, 6)), g.partition(6), axis=0 if last(g) else 1),
    "the sum over blocks": lambda g: sum_of_blocks(g, lambda block: np.ones(3), g.partition(6 if last(g) else 7), (3,),
                                                  "float64"),
    "layer sizes": lambda g: mpitp.ParallelMLP(g, 4, 9).forward(np.ones((3 if last(g) else 2, 4), "f")),
}


# One rank alone meets bad input: the others must not wait for it.
ONE_RANKS_ERRORS = {
    "no array": (lambda g: g.all_reduce([1.0] if last(g) else np.ones(1)), "found builtins.list"),
    "no dtype for it": (lambda g: g.all_reduce(np.ones(3, complex if last(g) else float)), "all_reduce of complex128"),
    "no such operation": (lambda g: g.all_reduce(np.ones(3), "mean" if last(g) else "sum"), "operation 'mean'"),
    "no place for it": (lambda g: g.all_reduce(np.ones(3), out=np.ones(4) if last(g) else None),
                        "found out float64 (4,)"),
    "its part": (lambda g: g.all_gather(np.ones(99 if last(g) else g.partition(7).lengths[g.rank]), g.partition(7)),
                 "all_gather of shape (99,)"),
    "the axis": (lambda g: g.reduce_scatter(np.ones((6, 6)), g.partition(6), 5 if last(g) else 0), "along axis 5"),
    "the root": (lambda g: g.broadcast(np.ones(3), g.size if last(g) else 0), "broadcast with root"),
    "the dtype of a sum": (lambda g: sum_of_blocks(g, lambda b: np.ones(3), g.partition(9), (3,),
                                                  "int32" if last(g) else "float64"), "a sum of int32"),
}


def caught_everywhere(group, call):
    """What each rank says was wrong, None for a rank that noticed nothing."""
    try:
        call(group)
        caught = None
    except InputError as error:
        caught = str(error)
    return group.comm.allgather(caught)


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_mismatch_is_caught_on_every_rank(group, mismatch):
    said = caught_everywhere(group, MISMATCHES[mismatch])
    assert all(text and "the ranks disagree on a collective: rank" in text and "\n" not in text for text in said), said
    assert all(f"rank {group.size - 1}: " in text for text in said)
    assert group.all_reduce(np.ones(2))[0] == group.size            # the group can be used as before


@pytest.mark.host
@pytest.mark.parametrize("error", ONE_RANKS_ERRORS)
def test_bad_input_of_one_rank_is_caught_on_every_rank(group, error):
    call, words = ONE_RANKS_ERRORS[error]
    said = caught_everywhere(group, call)
    assert all(text and words in text and f"rank {group.size - 1}: " in text and "\n" not in text
               for text in said), said
    assert group.all_reduce(np.ones(2))[0] == group.size


def test_both_say_what_they_meant(group):
    text = caught_everywhere(group, MISMATCHES["dtype and length"])[0]
    assert "all_reduce sum float32 (8,)" in text and "all_reduce sum float64 (4,)" in text


def test_the_same_axis_counted_from_either_end_is_no_mismatch(group):
    whole = np.ones((2, 8))
    assert group.reduce_scatter(whole, group.partition(8), 1 if last(group) else -1).max() == group.size


def test_a_reproducible_sum_is_checked_too(world):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    with mpitp.TensorParallelGroup(reproducible=True, check=True) as group:
        said = caught_everywhere(group, lambda g: sum_of_blocks(
            g, lambda block: np.ones(3 + last(g), "f"), g.partition(8), (3 + last(g),), "float32"))
        assert all("sum float32 (3,)" in text and "sum float32 (4,)" in text for text in said)


def test_a_check_that_ignores_something_is_seen(group, monkeypatch):
    """The tester, tested."""
    monkeypatch.setattr(collectives.Collectives, "_describe", lambda *arguments, **options: arguments[1:2])
    assert caught_everywhere(group, MISMATCHES["shape"]) == [None] * group.size


def in_this_ranks_order(group, x):
    """The same array, column by column on the last rank."""
    return np.asfortranarray(x) if last(group) else np.ascontiguousarray(x)


@pytest.mark.host
def test_ranks_that_agree_are_not_accused(group):
    """Another memory order, another kind of integer, and no `out` where others have one are no disagreement."""
    P, size = group.size, (np.int64 if last(group) else int)
    x = np.arange(24.0).reshape(4, 6)
    mine = in_this_ranks_order(group, x)
    partition = group.partition(size(6), size(1))
    assert same_bytes(group.all_reduce(mine, out=None if last(group) else np.empty((4, 6))), P * x)
    assert same_bytes(group.broadcast(mine, size(0)), x)
    part = partition.range(group.rank)
    assert same_bytes(group.reduce_scatter(mine, partition, size(1)), np.ascontiguousarray(P * x[:, part]))
    assert same_bytes(group.all_gather(in_this_ranks_order(group, x[:, part]), partition, size(1)), x)
    assert same_bytes(sum_of_blocks(group, lambda block: x[0] / len(partition.blocks_of(group.rank)), partition,
                                    (size(6),), "float64"), P * x[0])


def test_leaving_early_is_caught(world):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    group = mpitp.TensorParallelGroup(check=True)
    with pytest.raises(InputError, match="close.*all_reduce|all_reduce.*close"):
        group.close() if last(group) else group.all_reduce(np.ones(3))
    group.close()


@pytest.mark.parametrize("arguments, words", [
    (dict(reproducible=True), "rank 0: device='cpu' reproducible=True"), (dict(check=True), "check=True"),
    (dict(blocks=4), "blocks=4 check=False; rank"), (dict(blocks=0), "rank 0: found blocks = 0, expected"),
    (dict(device="tpu"), "rank 0: found device 'tpu', expected"), (dict(device="gpu"), "rank 0: found no CuPy")])
def test_group_arguments(world, monkeypatch, arguments, words):
    """A rank whose own arguments are bad does not leave the others waiting for it, either."""
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InputError, match="disagree on the group's arguments") as caught:
        mpitp.TensorParallelGroup(**(arguments if world.rank == 0 else {}))
    assert words in str(caught.value)


class Spy:
    """A communicator that writes down which of its functions are called."""
    def __init__(self, comm):
        self.comm, self.calls = comm, []

    def __getattr__(self, name):
        found = getattr(self.comm, name)
        if not callable(found):
            return found
        self.calls.append(name)
        return found


def test_without_check_nothing_more_is_sent(world):
    with mpitp.TensorParallelGroup() as group:
        control = group.comm = Spy(group.comm)
        data = group.transport.comm = Spy(group.transport.comm)
        x, partition = np.ones((2, 6)), group.partition(6)
        gather = "Allgatherv" if 6 % world.size else "Allgather"
        group.all_reduce(x)
        group.begin_all_reduce(x).wait()
        group.all_gather(x[:, partition.range(group.rank)], partition)
        group.gather(x[:, partition.range(group.rank)], partition)
        group.reduce_scatter(x, partition)
        group.broadcast(x)
        sum_of_blocks(group, lambda block: np.ones(2), partition, (2,), float)
        assert data.calls == ["Allreduce", "Iallreduce", gather, "Gatherv", "Reduce_scatter", "Bcast",
                              "Allreduce"]
        assert control.calls == [] and not group.ledger.control
        group.comm = control.comm


@pytest.mark.parametrize("blocks, elements", [(8, 12), (8, 13), (6, 12), (6, 13), (1, 12), (1, 13), (2, 2)])
def test_what_a_reproducible_sum_sends(world, blocks, elements):
    """Equal counts take the plain call, which is faster; every rank must decide alike, those without a block, too."""
    with mpitp.TensorParallelGroup(reproducible=True, blocks=blocks) as group:
        data = group.transport.comm = Spy(group.transport.comm)
        summand = np.arange(elements, dtype=float)
        found = sum_of_blocks(group, lambda block: summand.copy(), group.partition(24), (elements,), float)
        assert same_bytes(found, blocks * summand)
        nodes = {len(of_rank) for of_rank in nodes_of_ranks(group.partition(24))}
        even = elements % world.size == 0
        assert data.calls == ["Alltoall" if even and len(nodes) == 1 else "Alltoallv",
                              "Allgather" if even else "Allgatherv"]


def test_by_ranks():
    assert agreement.by_ranks(["a", "b", "a"]) == "ranks 0, 2: a; rank 1: b"


def test_agree(group):
    assert agreement.agree(group.comm, "the same") and not agreement.agree(group.comm, f"rank {group.rank}")
