"""Every collective of the group against NumPy; what the group refuses; the ledger; subgroups; how a group ends."""
import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import mpitp
from groups import group_fixture
from check_collectives import broadcast_problems, of_rank, partition_problems, reduction_problems
from mpitp import InputError
from mpitp.comm import guard
from mpitp.comm.ledger import Collective
from mpitp.sharding.partition import Partition
from spmd import same_bytes, sum_of_blocks

DTYPES = ["float32", "float64", "int32", "int64", "float16", ml_dtypes.bfloat16]


group = group_fixture("ordinary", scope="module")


@pytest.fixture
def in_messages(group):
    """Messages cut as they are above 2 GiB, but every 56 bytes."""
    group.transport.message_bytes, before = 56, group.transport.message_bytes
    yield group
    group.transport.message_bytes = before


# --- values ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, op", [(dtype, "sum") for dtype in DTYPES] + [
    ("float32", "max"), ("float64", "min"), ("int32", "max"), ("int64", "min"), ("float16", "min"),
    (DTYPES[-1], "max")])
@pytest.mark.parametrize("shape", [(), (7, 5), (3, 0)])
def test_reductions(group, op, dtype, shape):
    assert reduction_problems(group, shape, dtype, op) == []


@pytest.mark.parametrize("dtype", ["float32", "int64", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape, axis", [((size, 4, 2), 0) for size in (0, 1, 2, 5, 12)] +
                         [((3, size, 2), 1) for size in (1, 3, 7)] + [((3, 4, size), -1) for size in (0, 2, 9)] +
                         [((6,), 0), ((1, 9), 1), ((5, 0), 0), ((0, 5), -1), ((1, 1, 3), -1)])
def test_along_an_axis(group, shape, axis, dtype):
    assert partition_problems(group, shape, axis, dtype) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5, 3), (0, 2)])
def test_broadcast(group, shape, dtype):
    assert broadcast_problems(group, shape, dtype) == []


@pytest.mark.parametrize("dtype", ["float32", "int64", ml_dtypes.bfloat16])
def test_in_messages(in_messages, dtype):
    group = in_messages
    for shape in ((), (0,), (7, 5)):
        assert reduction_problems(group, shape, dtype, "sum") == [] == broadcast_problems(group, shape, dtype)
    for shape, axis in (((2, 13), 1), ((33, 2), 0), ((2, 1, 2), 1), ((4, 0), 0)):
        assert partition_problems(group, shape, axis, dtype) == []


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_sums_are_rounded_once(group, dtype):
    """float32 travels: numbers whose 16-bit partial sums would lose the small ones."""
    x = np.array([256.0 if group.rank == 0 else 0.5] * 3, dtype)
    expected = np.full(3, 256 + 0.5 * (group.size - 1)).astype(dtype)
    assert same_bytes(group.all_reduce(x), expected)
    assert same_bytes(group.all_reduce(x.copy(), out=x), expected)
    x = np.array([256.0 if group.rank == 0 else 0.5] * 3, dtype)
    mine = group.partition(3).range(group.rank)
    assert same_bytes(group.reduce_scatter(x, group.partition(3)), expected[mine])
    if group.size > 3:
        naive = x.dtype.type(256)
        for _ in range(group.size - 1):
            naive = naive + x.dtype.type(0.5)
        assert dtype != ml_dtypes.bfloat16 or naive != expected[0]     # the data would show it


def test_a_gather_in_reproducible_mode_follows_the_blocks(world):
    with mpitp.TensorParallelGroup(reproducible=True, blocks=4, check=True) as group:
        assert partition_problems(group, (3, 13), -1, "float32") == []
        assert partition_problems(group, (2, 5), 0, "float64") == []


def test_out_may_be_a_view_of_x(group):
    x = of_rank(group.rank, (4, 3), "float64")
    expected = group.all_reduce(x)
    assert same_bytes(group.all_reduce(x, out=x[:]), expected)


# --- what it refuses ---------------------------------------------------------------------------------------

@pytest.mark.host
@pytest.mark.parametrize("call", ["all_reduce", "begin_all_reduce", "broadcast"])
@pytest.mark.parametrize("x, said", [([1.0], "list"), (1.0, "float"), (None, "NoneType"),
                                     (np.ones(3, complex), "complex128"), (np.array(["a"]), "<U1"),
                                     (np.ones(2, ">f4"), ">f4"), (np.ones(2, bool), "bool")])
def test_not_an_array_of_numbers(group, call, x, said):
    with pytest.raises(InputError, match=f"{said}.*expected"):
        getattr(group, call)(x)


@pytest.mark.host
def test_refusals(group):
    x, P = np.ones((4, 6)), group.size
    with pytest.raises(InputError, match="operation 'mean', expected one of sum, max, min"):
        group.all_reduce(x, "mean")
    for out in (np.ones((6, 4)), np.ones((4, 6), "f"), np.ones((6, 4)).T, [1]):
        with pytest.raises(InputError, match="found out.*expected a C-contiguous float64"):
            group.all_reduce(x, out=out)
    strided = np.ones((4, 12))[:, ::2]
    with pytest.raises(InputError, match="found out.*expected a C-contiguous float64"):
        group.all_reduce(strided, out=strided)
    with pytest.raises(InputError, match=r"shape \(4, 77\), expected \d along axis 1 on rank|disagree"):
        group.all_gather(np.ones((4, 77)), group.partition(7))
    with pytest.raises(InputError, match=r"shape \(4, 6\), expected 7 along axis 1"):
        group.reduce_scatter(x, group.partition(7))
    for axis in (2, -3):
        with pytest.raises(InputError, match=f"along axis {axis} of shape"):
            group.all_gather(x, group.partition(6), axis)
    with pytest.raises(InputError, match=r"along axis -1 of shape \(\)"):
        group.reduce_scatter(np.float64([1])[0:1].reshape(()), group.partition(1))
    with pytest.raises(InputError, match=f"root {P}, expected a rank from 0 to {P - 1}"):
        group.broadcast(x, P)
    with pytest.raises(InputError, match="root -1"):
        group.gather(x, group.partition(6), root=-1)
    with pytest.raises(InputError, match=f"expected one of this group's {P} ranks"):
        group.all_gather(x, Partition(6, P + 1, P + 1))


@pytest.mark.host
def test_a_sum_refuses_what_it_would_sum_wrongly(group):
    """A leaf that is not C-contiguous would be reduced in a copy, one of another dtype as other numbers."""
    partition = group.partition(group.size)             # every rank has a block: all raise
    for leaf in (np.ones((3, 4), order="F"), np.ones((4, 3)), np.ones((3, 4), "f"), np.ones((3, 8))[:, ::2]):
        with pytest.raises(InputError, match=r"found a partial result.*expected a C-contiguous float64 \(3, 4\)"):
            sum_of_blocks(group, lambda block: leaf, partition, (3, 4), "float64")
    with pytest.raises(InputError, match="a sum of float16, expected one of float32, float64"):
        sum_of_blocks(group, lambda block: np.ones(3, "e"), partition, (3,), "float16")
    with pytest.raises(InputError, match="expected one block a rank"):
        sum_of_blocks(group, lambda block: np.ones(3), Partition(8, group.size, group.size + 1), (3,), float)


@pytest.mark.parametrize("arguments, said", [
    (dict(device="tpu"), "found device 'tpu', expected 'cpu' or 'gpu'"), (dict(blocks=0), "found blocks = 0"),
    (dict(blocks=2.5), "found blocks = 2.5"), (dict(reproducible=True, blocks=-1), "found blocks = -1")])
def test_bad_arguments_of_a_group(world, arguments, said):
    with pytest.raises(InputError, match=said):
        mpitp.TensorParallelGroup(**arguments)


# --- the ledger --------------------------------------------------------------------------------------------

def test_ledger_counts_every_collective(group):
    group.ledger.clear()
    x, partition = np.ones((4, 6), "f"), group.partition(6)
    group.all_reduce(x)
    group.all_reduce(x, "max")
    group.begin_all_reduce(x).wait()
    group.all_gather(x[:, partition.range(group.rank)], partition)
    group.reduce_scatter(x, partition)
    group.broadcast(x)
    group.gather(x[:, partition.range(group.rank)], partition)
    sum_of_blocks(group, lambda block: np.ones(3), partition, (3,), "float64")
    assert group.ledger.counts() == {
        Collective("all_reduce", 24, "float32"): 3, Collective("all_gather", 24, "float32"): 1,
        Collective("reduce_scatter", 24, "float32"): 1, Collective("broadcast", 24, "float32"): 1,
        Collective("gather", 24, "float32"): 1, Collective("all_reduce", 3, "float64"): 1}
    assert group.ledger.control["agreement"].calls == 8
    P = group.size
    assert group.ledger.data[Collective("all_reduce", 24, "float32")].wire_bytes == 3 * (2 * 96 * (P - 1) // P)
    assert group.ledger.seconds() > 0


def test_16_bit_reductions_travel_as_4_bytes(group):
    P = group.size
    group.ledger.clear()
    group.all_reduce(np.ones(12, np.float16))
    group.broadcast(np.ones(12, np.float16))
    assert group.ledger.data[Collective("all_reduce", 12, "float16")].wire_bytes == 2 * 48 * (P - 1) // P
    assert group.ledger.data[Collective("broadcast", 12, "float16")].wire_bytes == 24 * (P - 1) // P


# --- groups ------------------------------------------------------------------------------------------------

def test_subgroups(world):
    with mpitp.TensorParallelGroup(check=True) as group:
        half = group.subgroup(group.rank % 2, key=-group.rank)      # reversed order
        members = [r for r in range(group.size) if r % 2 == group.rank % 2][::-1]
        assert (half.size, half.rank) == (len(members), members.index(group.rank))
        assert half.all_reduce(np.array([group.rank]))[0] == sum(members)
        assert group.all_reduce(np.array([1]))[0] == group.size     # the two do not meet
        half.close()
        half.close()                                                # twice is once
        first = group.subgroup(0 if group.rank == 0 else None)
        assert (first is None) == (group.rank != 0)
        if first:
            first.close()


def test_a_subgroup_is_of_its_groups_kind(world):
    with mpitp.TensorParallelGroup(reproducible=True, blocks=5) as group:
        group.workers.count = 3
        with group.subgroup(0) as part:
            assert part.reproducible and part.blocks == 5 and part.workers.count == 3 and not part.check


def test_a_group_of_its_own_communicator(world):
    """Messages of the group and of the program do not meet."""
    with mpitp.TensorParallelGroup(world) as group:
        assert group.comm != world and (group.rank, group.size) == (world.rank, world.size)
        assert group.xp is np and group.partition(10).blocks == group.size
    with mpitp.TensorParallelGroup(world, reproducible=True, blocks=np.int64(5)) as group:
        assert group.partition(10).blocks == 5 and type(group.blocks) is int
    with mpitp.TensorParallelGroup(MPI.COMM_SELF) as group:
        assert group.size == 1 and group.all_reduce(np.ones(2)).tolist() == [1, 1]


def test_report_and_root_first(world):
    with mpitp.TensorParallelGroup() as group:
        assert group.report(group.rank) == (list(range(group.size)) if group.rank == 0 else None)
        assert group.root_first(lambda: group.rank * 10) == group.rank * 10

        def fails():
            assert group.rank == 0, "only rank 0 looks"
            raise OSError("found nothing, expected something")
        with pytest.raises(InputError, match="found nothing, expected something"):
            group.root_first(fails)
        with pytest.raises(InputError, match="found nothing, expected something"):
            group.on_root(fails)
        assert group.on_root(lambda: group.rank + 1) == (1 if group.rank == 0 else None)


def test_bad_input_of_every_rank_leaves_the_body_as_it_is(world):
    """The caller may catch it; the group is closed then."""
    with pytest.raises(InputError, match="found all_reduce of complex128"):
        with mpitp.TensorParallelGroup(check=True) as group:
            group.all_reduce(np.ones(2, complex))
    assert group.comm == MPI.COMM_NULL


def test_a_closed_group_says_that_it_is_closed():
    """Not MPI's words of an invalid communicator; what was closed may be closed again."""
    group = mpitp.TensorParallelGroup()
    layer = mpitp.ParallelMLP(group, 4, 8)
    x, partition = np.ones((2, 4), "f"), group.partition(4)
    total = group.sum(partition, (2, 4), np.float32)
    group.close()
    group.close()
    for call in (lambda: group.all_reduce(x), lambda: group.begin_all_reduce(x), lambda: group.broadcast(x),
                 lambda: group.reduce_scatter(x, partition), lambda: layer.forward(x), lambda: total.all_reduce(),
                 lambda: group.subgroup(0), lambda: group.report(1)):
        with pytest.raises(InputError, match="found a collective of a closed group, expected one of an open group"):
            call()


def test_the_context_manager_watches_threads_while_it_lasts(world, monkeypatch):
    import threading
    before = threading.__excepthook__
    monkeypatch.setattr(threading, "excepthook", before)        # an earlier test may have left guard's
    with mpitp.TensorParallelGroup() as group:
        assert (threading.excepthook is before) == (world.size == 1)
        with group.subgroup(0):
            pass
        assert (threading.excepthook is before) == (world.size == 1)
    assert threading.excepthook is before


def test_all_leave(world):
    comm = world.Dup()
    request = comm.Ibarrier()                                       # a collective under way does not matter
    assert guard.all_leave(comm)
    request.Wait()
    comm.Free()


# --- the tester, tested: faults planted into the transport, the same on every rank -----------------------------

def found_everywhere(group, problems, *names):
    assert set(names) <= set.intersection(*map(set, group.comm.allgather(problems))), problems


@pytest.fixture
def faulty(group, world):
    if world.size == 1:
        pytest.skip("on one rank these are not mistakes")
    yield group
    vars(group.transport).pop("all_reduce", None)
    vars(group.transport).pop("all_gather", None)
    vars(group.transport).pop("reduce_scatter", None)


def test_an_all_reduce_done_twice_is_seen(faulty):
    right = faulty.transport.all_reduce
    faulty.transport.all_reduce = lambda x, op: (right(x, op), right(x, op))
    found_everywhere(faulty, reduction_problems(faulty, (7, 5), "float64", "sum"), "all_reduce C", "in place")


def test_an_all_reduce_that_is_missing_is_seen(faulty):
    faulty.transport.all_reduce = lambda x, op: None
    found_everywhere(faulty, reduction_problems(faulty, (7, 5), "float64", "max"), "all_reduce C", "same on all ranks")


def test_an_argument_reduced_in_place_is_seen(faulty, monkeypatch):
    right = faulty._prepare_reduction
    monkeypatch.setattr(faulty, "_prepare_reduction",
                        lambda operation, x, op, out: right(operation, x, op, x if x.flags.c_contiguous else out))
    found_everywhere(faulty, reduction_problems(faulty, (7, 5), "float64", "sum"), "argument", "out")


def test_parts_in_the_wrong_order_are_seen(faulty):
    right = faulty.transport.all_gather

    def mirrored(send, receive, counts):
        right(send, receive, counts)
        receive[...] = receive[::-1].copy()
    faulty.transport.all_gather = mirrored
    found_everywhere(faulty, partition_problems(faulty, (3, 12), 1, "float32"), "all_gather C")


def test_a_part_of_another_rank_is_seen(faulty):
    right = faulty.transport.reduce_scatter

    def rolled(send, receive, counts, op):
        right(send.reshape(-1)[::-1].copy(), receive, counts, op)
    faulty.transport.reduce_scatter = rolled
    found_everywhere(faulty, partition_problems(faulty, (12 * faulty.size,), 0, "float64"), "reduce_scatter sum C")
