"""Mistakes found in published tensor-parallel code, planted here: the checks of test_layers.py must see each.

The faults are the same on every rank, so that the run stays in step. Each test names the results that must fail.
"""
import numpy as np
import pytest

import mpitp
from check_layers import linear_problems, mlp_problems
from mpitp.sharding import parameters, rng
from mpitp.comm.group import TensorParallelGroup
from mpitp.comm.sums import Sum
from mpitp.layers import linear, mlp

pytestmark = [pytest.mark.usefixtures("several_ranks"), pytest.mark.host]     # the mistakes are made in NumPy
SHAPE = dict(hidden=11, ffn=37, gated=True)


@pytest.fixture
def several_ranks(world):
    if world.size == 1:
        pytest.skip("on one rank these are not mistakes")


def seen_everywhere(group, problems, *names):
    found = set.intersection(*map(set, group.comm.allgather(problems)))
    assert set(names) <= found, f"expected {names} to fail, found {found}"


def test_nothing_is_found_without_a_fault(group):
    assert mlp_problems(group, **SHAPE) == [] and linear_problems(group, "row", 13, 7) == []


# 1. The row bias, added on every rank, or divided by P.

def test_row_bias_on_every_rank(group, monkeypatch):
    right = Sum.checked

    def wrong(total, block, summand):           # added before the sum: counted once a block, and once after it
        return right(total, block, summand + np.ones(total.shape[-1], total.summand_dtype))
    monkeypatch.setattr(Sum, "checked", wrong)
    seen_everywhere(group, mlp_problems(group, **SHAPE), "y")
    seen_everywhere(group, linear_problems(group, "row", 13, 7), "y")


def test_row_bias_divided_by_the_ranks(group, monkeypatch):
    right = linear.bias_backward

    def wrong(dy, out=None):
        right(dy, out=out)
        if out.shape[-1] in (7, 11):            # the replicated one
            out /= group.size
        return out
    monkeypatch.setattr(mlp, "bias_backward", wrong)
    monkeypatch.setattr(linear, "bias_backward", wrong)
    seen_everywhere(group, mlp_problems(group, **SHAPE), "down.bias")
    seen_everywhere(group, linear_problems(group, "row", 13, 7), "l.bias")


# 2. The all-reduce missing, or done twice, in f's backward and in g's forward.

def missing(total, rows=None):
    return sum(total.fold.known.values()) if total.group.reproducible else total.local_sum()


def twice(total, rows=None):
    return total.group.all_reduce(total.all_reduce())


@pytest.mark.parametrize("fault", [missing, twice])
def test_all_reduce_in_f_backward(group, monkeypatch, fault):
    monkeypatch.setattr(mlp, "copy_to_ranks_backward", fault)
    monkeypatch.setattr(linear, "copy_to_ranks_backward", fault)
    seen_everywhere(group, mlp_problems(group, **SHAPE), "dx")
    seen_everywhere(group, linear_problems(group, "column", 7, 13), "dx")


@pytest.mark.parametrize("fault", [missing, twice])
def test_all_reduce_in_g_forward(group, monkeypatch, fault):
    monkeypatch.setattr(mlp, "reduce_from_ranks_forward", fault)
    monkeypatch.setattr(linear, "reduce_from_ranks_forward", fault)
    seen_everywhere(group, mlp_problems(group, **SHAPE), "y")
    seen_everywhere(group, linear_problems(group, "row", 13, 7), "y")


def test_the_ledger_sees_the_second_one(group, monkeypatch):
    monkeypatch.setattr(mlp, "copy_to_ranks_backward", twice)
    assert any("ledger" in problem for problem in mlp_problems(group, **SHAPE))


# 3. Shards swapped between ranks; gate and up taken wrongly out of a fused matrix.

def test_shards_swapped(group, monkeypatch):
    right = parameters.ParameterSpec.window

    def wrong(spec, place):                     # counted from the other end: the shard of another rank
        mirrored = tuple(slice(n - part.stop, n - part.start) for n, part in zip(spec.shape, right(spec, place)))
        return mirrored if spec.name == "up.weight" else right(spec, place)
    monkeypatch.setattr(parameters.ParameterSpec, "window", wrong)
    seen_everywhere(group, mlp_problems(group, 11, 48), "y", "dx", "up.weight")


def test_gate_and_up_interleaved(group):
    def load(layer, weights):
        fused = np.concatenate([weights["gate.weight"], weights["up.weight"]])      # [2F, D]: gate, then up
        mixed = {**weights, "gate.weight": fused[0::2], "up.weight": fused[1::2]}   # read as if row by row
        layer.load_dense(mixed)
    seen_everywhere(group, mlp_problems(group, load=load, **SHAPE), "y", "dx", "down.weight")


# 9. A seed of the rank's own.

def test_a_seed_per_rank(group, world, monkeypatch):
    def same_model():
        dense = mpitp.ParallelMLP(group, 10, 24, seed=5).gather()
        with TensorParallelGroup(world.Split(world.rank)) as alone:
            monkeypatch.undo()
            whole = mpitp.ParallelMLP(alone, 10, 24, seed=5).weights
        good = dense is None or all(dense[name].tobytes() == whole[name].tobytes() for name in whole)
        return all(world.allgather(good))

    assert same_model()
    right = rng.key
    monkeypatch.setattr(rng, "key", lambda seed, name: right(seed + group.rank, name))
    assert not same_model()
