"""Every collective against NumPy on data that each rank can compute for all ranks. Returns what is wrong by name.

A list instead of asserts, so that planted faults can be required to be found on every rank.
"""
import numpy as np

from spmd import draw, same_bytes

REDUCTIONS = {"sum": np.sum, "max": np.max, "min": np.min}


def of_rank(rank, shape, dtype):
    """What this rank contributes: small whole numbers of both signs, so that every order of adding is exact."""
    return np.asarray(np.round(draw(100 + rank, *shape) * 4)).astype(dtype)


def layouts(x):
    """The same values in every memory layout that a caller may have."""
    spread = np.zeros([2 * n for n in x.shape], x.dtype)[(..., *(slice(None, None, 2) for _ in x.shape))]
    spread[...] = x
    return {"C": x, "F": np.array(x, order="F"), "strided": spread}


def reduction_problems(group, shape, dtype, op):
    """all_reduce, begin_all_reduce: values, out, the argument left alone, the same bits on every rank."""
    everyone = np.array([of_rank(rank, shape, dtype) for rank in range(group.size)])
    expected = np.asarray(REDUCTIONS[op](everyone, axis=0)).astype(dtype)       # small integers: sums are exact
    wrong = set()

    def expect(name, condition):
        if not condition:
            wrong.add(name)

    for layout, x in layouts(of_rank(group.rank, shape, dtype)).items():
        before = x.tobytes()
        y = group.all_reduce(x, op)
        expect(f"all_reduce {layout}", np.array_equal(y, expected) and y.dtype == x.dtype and y.flags.c_contiguous)
        expect("argument", y is not x and x.tobytes() == before)
        expect("same on all ranks", len(set(group.comm.allgather(y.tobytes()))) == 1)
        out = np.full(shape, 7, dtype)
        expect("out", group.all_reduce(x, op, out=out) is out and same_bytes(out, y))
        pending, second = group.begin_all_reduce(x, op), group.begin_all_reduce(x, op, out=np.empty(shape, dtype))
        expect("begin", np.array_equal(second.wait(), y) and np.array_equal(pending.wait(), y))
        expect("wait twice", pending.wait() is pending.wait() and np.array_equal(pending.wait(), y))
        expect("argument", x.tobytes() == before)
    x = of_rank(group.rank, shape, dtype)
    expect("in place", group.all_reduce(x, op, out=x) is x and np.array_equal(x, expected))
    x = of_rank(group.rank, shape, dtype)
    expect("begin in place", group.begin_all_reduce(x, op, out=x).wait() is x and np.array_equal(x, expected))
    return sorted(wrong)


def partition_problems(group, shape, axis, dtype):
    """all_gather, gather, reduce_scatter along one axis."""
    partition = group.partition(shape[axis])
    window = [slice(None)] * len(shape)
    window[axis] = partition.range(group.rank)
    window = tuple(window)
    whole = of_rank(0, shape, dtype)
    everyone = np.array([of_rank(rank, shape, dtype) for rank in range(group.size)])
    wrong = set()

    def expect(name, condition):
        if not condition:
            wrong.add(name)

    for layout, x in layouts(whole[window]).items():
        before = x.tobytes()
        expect(f"all_gather {layout}", same_bytes(group.all_gather(x, partition, axis), whole))
        root = group.size - 1 if layout == "C" else 0
        gathered = group.gather(x, partition, axis, root)
        expect(f"gather {layout}", same_bytes(gathered, whole) if group.rank == root else gathered is None)
        expect("argument", x.tobytes() == before)
    for layout, x in layouts(everyone[group.rank]).items():
        before = x.tobytes()
        op = {"C": "sum", "F": "max", "strided": "min"}[layout]
        mine = group.reduce_scatter(x, partition, axis, op)
        expected = REDUCTIONS[op](everyone, axis=0)[window].astype(dtype)
        expect(f"reduce_scatter {op} {layout}", np.array_equal(mine, expected) and mine.dtype == expected.dtype
               and mine.flags.c_contiguous)
        expect("argument", x.tobytes() == before and not np.shares_memory(mine, x))
    return sorted(wrong)


def broadcast_problems(group, shape, dtype):
    wrong = set()
    for root in range(group.size):
        for layout, x in layouts(of_rank(group.rank, shape, dtype)).items():
            before = x.tobytes()
            y = group.broadcast(x, root)
            if not same_bytes(y, of_rank(root, shape, dtype)):
                wrong.add(f"broadcast {layout}")
            if y is x or np.shares_memory(x, y) or x.tobytes() != before:
                wrong.add("argument")
    return sorted(wrong)
