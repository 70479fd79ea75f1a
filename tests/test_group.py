"""Every collective of the group against NumPy on data that each rank can compute for all."""
import ml_dtypes
import numpy as np
import pytest

import mpitp
from mpitp import InputError
from mpitp.comm.ledger import Collective, wire_bytes
from spmd import draw, same_bytes

DTYPES = ["float32", "float64", "int32", "int64"]


@pytest.fixture(scope="module", params=[1 << 30, 64], ids=["whole", "pieces"])
def group(request):
    """Messages at once, and in pieces as they go for more than 2 GiB."""
    with mpitp.TensorParallelGroup(check=True) as group:
        group.transport.piece_bytes = request.param
        yield group


def of_rank(rank, shape, dtype):
    return np.asarray(draw(100 + rank, *shape) * 10).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "max", "min"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, 0), (2, 3, 11)])
def test_all_reduce(group, op, dtype, shape):
    x = of_rank(group.rank, shape, dtype)
    before = x.tobytes()
    everyone = np.array([of_rank(r, shape, dtype) for r in range(group.size)])
    expected = np.asarray(getattr(everyone, op)(axis=0))
    y = group.all_reduce(x, op)
    assert y is not x and x.tobytes() == before and y.dtype == x.dtype and y.shape == x.shape
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 if op == "sum" else 0)
    other = np.empty_like(x)
    assert group.all_reduce(x, op, out=other) is other and same_bytes(other, y) and x.tobytes() == before
    assert group.all_reduce(x, op, out=x) is x and same_bytes(x, y)
    assert len(set(group.comm.allgather(y.tobytes()))) == 1         # the same bits on every rank


def test_all_reduce_of_other_memory_orders(group):
    whole = of_rank(group.rank, (6, 8), "float64")
    expected = group.all_reduce(whole)
    assert same_bytes(group.all_reduce(np.asfortranarray(whole)), expected)
    assert same_bytes(group.all_reduce(whole[::2, 1::3]), np.ascontiguousarray(expected[::2, 1::3]))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_sums_are_rounded_once(group, dtype):
    """float32 travels: the exact sum of the ranks' numbers, rounded at the end."""
    x = (of_rank(group.rank, (50,), "float32") / 8).astype(dtype)
    total = sum((of_rank(r, (50,), "float32") / 8).astype(dtype).astype(np.float64) for r in range(group.size))
    y = group.all_reduce(x)
    assert y.dtype == x.dtype
    exact = total.astype(np.float32).astype(dtype)
    nearly = np.abs(y.astype(np.float64) - total) <= np.abs(exact.astype(np.float64) - total) * 1.001
    assert nearly.all()
    for result in (group.broadcast(x), group.all_gather(x[group.partition(50).range(group.rank)], group.partition(50)),
                   group.reduce_scatter(x, group.partition(50))):
        assert result.dtype == x.dtype


def test_begin_all_reduce(group):
    x = of_rank(group.rank, (9, 4), "float32")
    before = x.tobytes()
    pending = group.begin_all_reduce(x)
    first = pending.wait()
    assert pending.wait() is first and same_bytes(first, group.all_reduce(x)) and x.tobytes() == before
    in_place = group.begin_all_reduce(x, out=x)
    assert in_place.wait() is x and same_bytes(x, first)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_gathers_put_the_parts_side_by_side(group, axis, size, dtype):
    shape = [3, 4, 2]
    shape[axis] = size
    whole = of_rank(0, shape, dtype)
    partition = group.partition(size)
    window = [slice(None)] * 3
    window[axis] = partition.range(group.rank)
    part = whole[tuple(window)]                                     # not contiguous for most axes
    assert same_bytes(group.all_gather(part, partition, axis), whole)
    for root in {0, group.size - 1}:
        gathered = group.gather(part, partition, axis, root)
        assert (gathered is None) == (group.rank != root)
        assert gathered is None or same_bytes(gathered, whole)
    everyone = np.array([of_rank(r, shape, dtype) for r in range(group.size)])
    mine = group.reduce_scatter(of_rank(group.rank, shape, dtype), partition, axis)
    np.testing.assert_allclose(mine, everyone.sum(axis=0)[tuple(window)], rtol=1e-5, atol=1e-4)
    assert mine.flags.c_contiguous and mine.dtype == np.dtype(dtype)


def test_broadcast(group):
    for root in range(group.size):
        x = of_rank(group.rank, (5, 3), "float64")
        before = x.tobytes()
        assert same_bytes(group.broadcast(x, root), of_rank(root, (5, 3), "float64")) and x.tobytes() == before


@pytest.mark.parametrize("call", ["all_reduce", "broadcast"])
@pytest.mark.parametrize("x, said", [([1.0], "list"), (1.0, "float"), (None, "NoneType"),
                                     (np.ones(3, complex), "complex128"), (np.array(["a"]), "<U1")])
def test_not_an_array_of_numbers(group, call, x, said):
    with pytest.raises(InputError, match=f"{said}.*expected"):
        getattr(group, call)(x)


def test_refusals(group):
    x = np.ones((4, 6))
    with pytest.raises(InputError, match="operation 'mean', expected one of sum, max, min"):
        group.all_reduce(x, "mean")
    for out in (np.ones((6, 4)), np.ones((4, 6), "f"), np.ones((6, 4)).T, [1]):
        with pytest.raises(InputError, match="found out.*expected a C-contiguous float64"):
            group.all_reduce(x, out=out)
    with pytest.raises(InputError, match="expected .* along axis"):
        group.all_gather(np.ones((4, 77)), group.partition(7))
    with pytest.raises(InputError, match="expected 7 along axis -1"):
        group.reduce_scatter(x, group.partition(7))


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
    group.sum_blocks(lambda block: np.ones(3), partition, (3,), "float64")
    assert group.ledger.counts() == {
        Collective("all_reduce", 24, "float32"): 3, Collective("all_gather", 24, "float32"): 1,
        Collective("reduce_scatter", 24, "float32"): 1, Collective("broadcast", 24, "float32"): 1,
        Collective("gather", 24, "float32"): 1, Collective("all_reduce", 3, "float64"): 1}
    assert group.ledger.control["agreement"].calls == 8
    P = group.size
    assert group.ledger.data[Collective("all_reduce", 24, "float32")].wire_bytes == 3 * (2 * 96 * (P - 1) // P)
    assert group.ledger.seconds() > 0


def test_wire_bytes():
    assert wire_bytes("all_reduce", 100, 4, 1) == 0
    assert wire_bytes("all_reduce", 100, 4, 4) == 600
    assert wire_bytes("all_gather", 100, 4, 4) == 300


def test_subgroups(world):
    with mpitp.TensorParallelGroup(check=True) as group:
        half = group.subgroup(group.rank % 2, key=-group.rank)      # reversed order
        members = [r for r in range(group.size) if r % 2 == group.rank % 2][::-1]
        assert (half.size, half.rank) == (len(members), members.index(group.rank))
        assert half.all_reduce(np.array([group.rank]))[0] == sum(members)
        half.close()
        half.close()                                                # twice is once
        first = group.subgroup(0 if group.rank == 0 else None)
        assert (first is None) == (group.rank != 0)
        if first:
            first.close()


def test_a_group_of_its_own_communicator(world):
    """Messages of the group and of the program do not meet."""
    with mpitp.TensorParallelGroup(world) as group:
        assert group.comm != world and (group.rank, group.size) == (world.rank, world.size)
        assert group.xp is np and group.partition(10).blocks == group.size
    with mpitp.TensorParallelGroup(world, reproducible=True, blocks=5) as group:
        assert group.partition(10).blocks == 5


def test_report_and_root_first(world):
    with mpitp.TensorParallelGroup() as group:
        assert group.report(group.rank) == (list(range(group.size)) if group.rank == 0 else None)
        assert group.root_first(lambda: group.rank * 10) == group.rank * 10

        def fails():
            assert group.rank == 0, "only rank 0 looks"
            raise OSError("found nothing, expected something")
        with pytest.raises(InputError, match="found nothing, expected something"):
            group.root_first(fails)
