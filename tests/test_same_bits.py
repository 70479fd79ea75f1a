"""reproducible=True over any shape: the bytes of all ranks together are those of one rank alone, in the same process.

Narrow blocks are the hard case: BLAS has kernels of its own for a few columns (see ops/linear.py).
"""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import mpitp
from mpitp.ops.activation import ACTIVATIONS
from spmd import draw, same_bytes

SETTINGS = settings(derandomize=True, deadline=None, database=None, max_examples=40)
TOKENS = st.sampled_from([0, 1, 1, 1, 2, 3, 5, 17, 64])
SMALL = st.one_of(st.integers(1, 10), st.integers(1, 70))       # up to a column a block, and up to nine
DTYPES = st.sampled_from(["float32", "float64"])


@pytest.fixture(scope="module", params=[8, 5])
def groups(request):
    """All ranks, and this rank alone, with the same blocks."""
    with mpitp.TensorParallelGroup(reproducible=True, blocks=request.param, check=True) as every, \
            mpitp.TensorParallelGroup(MPI.COMM_SELF, reproducible=True, blocks=request.param) as alone:
        yield every, alone


def require_same(group, found, expected):
    """found is None but on rank 0, where dense gradients are gathered."""
    different = found is not None and [name for name in expected if not same_bytes(found[name], expected[name])]
    assert not any(of_ranks := group.comm.allgather(different)), f"other bits in, by rank: {of_ranks}"


@SETTINGS
@given(tokens=TOKENS, hidden=SMALL, ffn=SMALL, activation=st.sampled_from(list(ACTIVATIONS)), gated=st.booleans(),
       bias=st.booleans(), dtype=DTYPES)
def test_mlp(groups, tokens, hidden, ffn, activation, gated, bias, dtype):
    def results(group):
        layer = mpitp.ParallelMLP(group, hidden, ffn, activation, gated, bias, dtype=dtype, seed=3)
        x, dy = draw(1, tokens, hidden, dtype=dtype), draw(2, tokens, hidden, dtype=dtype)
        y, saved = layer.forward(x)
        without, _ = layer.forward(x, save=False)
        dx, gradients = layer.backward(dy, saved)
        gradients = layer.gather(gradients)
        return gradients and {"y": y, "y of save=False": without, "dx": dx, **gradients}
    every, alone = groups
    require_same(every, results(every), results(alone))


@pytest.mark.parametrize("kind", [mpitp.ColumnParallelLinear, mpitp.RowParallelLinear])
@SETTINGS
@given(tokens=TOKENS, inner=SMALL, outer=SMALL, bias=st.booleans(), order=st.sampled_from("CF"), dtype=DTYPES)
def test_linear(groups, kind, tokens, inner, outer, bias, order, dtype):
    """The memory order of x and dy does not matter either."""
    def results(group, order):
        whole = {"gather_output": True} if kind is mpitp.ColumnParallelLinear else {"input_is_parallel": False}
        layer = kind(group, inner, outer, bias, dtype=dtype, seed=3, **whole)
        x, dy = draw(1, tokens, inner, dtype=dtype), draw(2, tokens, outer, dtype=dtype)
        y, saved = layer.forward(np.array(x, order=order))
        dx, gradients = layer.backward(np.array(dy, order=order), saved)
        gradients = layer.gather(gradients)
        return gradients and {"y": y, "dx": dx, **gradients}
    every, alone = groups
    require_same(every, results(every, order), results(alone, "C"))
