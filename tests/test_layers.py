"""The parallel layers against dense: forward, every gradient, the collectives; any shape, any number of ranks."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from groups import group_fixture
from check_layers import dense_weights, linear_problems, mlp_problems
from mpitp.ops.activation import ACTIVATIONS
from spmd import draw, everywhere, same_bytes

LEADS = st.lists(st.integers(0, 4), max_size=3).map(tuple)
SIZES = st.sampled_from([1, 2, 3, 5, 7, 10, 13, 16, 31])


def settings_for(examples):
    return settings(derandomize=True, deadline=None, database=None, max_examples=examples)


def require_none(problems, group):
    """Every rank raises when one has a problem: else Hypothesis would shrink on one rank alone."""
    found = group.comm.allgather(problems)
    assert not any(found), f"problems by rank: {found}"


group = group_fixture("ordinary", "reproducible", scope="module")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "single"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_equals_dense(group, activation, gated, bias, dtype):
    require_none(mlp_problems(group, 11, 37, activation, gated, bias, dtype), group)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mlp_of_a_larger_size(group, dtype):
    require_none(mlp_problems(group, 96, 384, dtype=dtype, lead=(50,)), group)


@settings_for(25)
@given(hidden=SIZES, ffn=SIZES, lead=LEADS, activation=st.sampled_from(list(ACTIVATIONS)), gated=st.booleans(),
       bias=st.booleans(), dtype=st.sampled_from(["float32", "float64"]), seed=st.integers(0, 5))
def test_mlp_of_any_shape(group, hidden, ffn, lead, activation, gated, bias, dtype, seed):
    require_none(mlp_problems(group, hidden, ffn, activation, gated, bias, dtype, lead, seed), group)


@pytest.mark.parametrize("whole", [False, True], ids=["split", "whole"])
@pytest.mark.parametrize("kind", ["column", "row"])
@settings_for(12)
@given(inner=SIZES, outer=SIZES, lead=LEADS, bias=st.booleans(), dtype=st.sampled_from(["float32", "float64"]))
def test_linear_of_any_shape(group, kind, whole, inner, outer, lead, bias, dtype):
    require_none(linear_problems(group, kind, inner, outer, bias, whole, dtype, lead), group)


def loss_and_gradients(group, gated, activation):
    """<dy, mlp(x)> as a function of x and the dense weights, and its gradients by backward."""
    layer = mpitp.ParallelMLP(group, 6, 13, activation, gated, dtype="float64")
    weights = dense_weights(layer.specs, 3, "float64")
    x, dy = draw(1, 4, 6), draw(2, 4, 6)

    def loss(x, weights):
        layer.load_dense(weights)
        return float((dy * layer.forward(x, save=False)[0]).sum())

    layer.load_dense(weights)
    dx, gradients = layer.backward(dy, layer.forward(x)[1])
    return loss, x, weights, dx, group.comm.bcast(layer.gather(gradients))


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu", "identity"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "single"])
def test_numeric_gradients(group, gated, activation):
    """(loss(v + h d) - loss(v - h d)) / 2h = <gradient, d> for a random direction d of each variable."""
    loss, x, weights, dx, gradients = loss_and_gradients(group, gated, activation)
    h = 1e-5
    for name in ["x", *weights]:
        value, gradient = (x, dx) if name == "x" else (weights[name], gradients[name])
        d = draw(50, *value.shape)

        def at(step):
            moved = value + step * d
            return loss(moved, weights) if name == "x" else loss(x, {**weights, name: moved})

        numeric, analytic = (at(h) - at(-h)) / (2 * h), float((gradient * d).sum())
        assert abs(numeric - analytic) <= 1e-7 * max(1, abs(analytic), abs(gradient * d).sum()), name


@pytest.mark.parametrize("kind", ["column", "row"])
def test_adjoint_identity(group, kind):
    """<dy, W v> = <W^T dy, v>, where a replicated tensor counts once and a split one is summed over its parts."""
    layer = (mpitp.ColumnParallelLinear(group, 7, 11, False, dtype="float64") if kind == "column" else
             mpitp.RowParallelLinear(group, 7, 11, False, dtype="float64"))
    mine = layer.partition.range(group.rank)
    v, dy = draw(1, 5, 7), draw(2, 5, 11)
    if kind == "column":
        y, saved = layer.forward(v)
        dv, _ = layer.backward(np.ascontiguousarray(dy[:, mine]), saved)
        left = group.comm.allreduce((dy[:, mine] * y).sum())
        right = (dv * v).sum()
    else:
        y, saved = layer.forward(np.ascontiguousarray(v[:, mine]))
        dv, _ = layer.backward(dy, saved)
        left = (dy * y).sum()
        right = group.comm.allreduce((dv * v[:, mine]).sum())
    assert abs(left - right) <= 1e-13 * np.abs(dy).sum()


def test_gradient_buffers_are_used_again(group):
    layer = mpitp.ParallelMLP(group, 8, 19, gated=True)
    x, dy = draw(1, 5, 8, dtype="float32"), draw(2, 5, 8, dtype="float32")
    _, saved = layer.forward(x)
    _, first = layer.backward(dy, saved)
    kept = {name: g.copy() for name, g in first.items()}
    for g in first.values():
        g.fill(np.nan)
    _, second = layer.backward(dy, saved, out=first)
    assert all(second[name] is first[name] and same_bytes(second[name], kept[name]) for name in kept)


def test_the_weights_are_the_same_model_on_any_number_of_ranks(group, world):
    """Bytes of the gathered weights against those of a group of one."""
    split = mpitp.ParallelMLP(group, 10, 23, gated=True, seed=5, name="layers.3.mlp").gather()
    with mpitp.TensorParallelGroup(world.Split(world.rank)) as alone:
        whole = mpitp.ParallelMLP(alone, 10, 23, gated=True, seed=5, name="layers.3.mlp").weights
    if world.rank == 0:
        assert whole.keys() == split.keys()
        assert all(same_bytes(whole[name], split[name]) for name in whole)


def test_load_dense_takes_anything_that_slices(group, tmp_path):
    layer = mpitp.ParallelMLP(group, 6, 21, seed=None, bias=False)
    weights = dense_weights(layer.specs, 0, "float64")
    path = tmp_path / f"up{group.rank}"
    weights["up.weight"].tofile(path)
    layer.load_dense({"up.weight": np.memmap(path, "float64", "r", shape=(21, 6)),
                      "down.weight": np.asfortranarray(weights["down.weight"])})
    assert all(w.flags.c_contiguous and w.dtype == np.float32 for w in layer.weights.values())
    dense = layer.gather()
    if group.rank == 0:
        assert all(same_bytes(dense[name], weights[name].astype("float32")) for name in weights)


def test_everywhere_is_collective(world):
    assert everywhere(True) and not everywhere(world.rank != 0)
