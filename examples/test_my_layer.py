"""A test of one's own tensor-parallel layer by the judge of mpitp. Plain NumPy, no MPI; any such code will do.

    pytest examples/test_my_layer.py
"""
import numpy as np
import pytest

from mpitp import oracle

D, F, RANKS = 12, 50, 3
draw = np.random.default_rng(seed=0).standard_normal
INPUTS = {"x": draw((16, D), dtype=np.float32), "dy": draw((16, D), dtype=np.float32)}
WEIGHTS = {"up.weight": draw((F, D), dtype=np.float32), "down.weight": draw((D, F), dtype=np.float32),
           "down.bias": draw(D, dtype=np.float32)}


def my_layer(x, dy, w, bias_times=1):
    """The layer on trial: what each rank has of y, dx, and the gradients."""
    summands, dx, d_up, d_down = [], 0, [], []
    for up, down in zip(np.array_split(w["up.weight"], RANKS), np.array_split(w["down.weight"], RANKS, axis=1)):
        h = x @ up.T
        a, dh = np.maximum(h, 0), (dy @ down) * (h > 0)
        summands.append(a @ down.T)
        dx = dx + dh @ up
        d_up, d_down = [*d_up, dh.T @ x], [*d_down, dy.T @ a]
    y = sum(summands) + bias_times * w["down.bias"]
    return {"y": [y] * RANKS}, {"dx": [dx] * RANKS, "up.weight": d_up, "down.weight": d_down,
                                "down.bias": [dy.sum(axis=0)] * RANKS}


def check(outputs, gradients):
    """Raise AssertionError, in three lines, unless the results are right."""
    return oracle.check_layer("mlp", {"activation": "relu"}, WEIGHTS, INPUTS, outputs, gradients,
                              layouts={"up.weight": 0, "down.weight": 1})


def test_my_layer():
    assert check(*my_layer(**INPUTS, w=WEIGHTS)).good


def test_that_the_judge_sees_a_bias_that_is_added_on_every_rank():
    with pytest.raises(AssertionError, match="bias is added on every rank before the sum: 3 times"):
        check(*my_layer(**INPUTS, w=WEIGHTS, bias_times=RANKS))
