"""A gradient of one's own layer, checked against the dense one. Plain NumPy, no MPI; any tensor-parallel code will do.

    python examples/oracle.py
"""
import numpy as np

from mpitp import oracle

draw = np.random.default_rng(seed=0).standard_normal
x, dy = draw((16, 12), dtype=np.float32), draw((16, 12), dtype=np.float32)
w = {"up.weight": draw((48, 12), dtype=np.float32), "down.weight": draw((12, 48), dtype=np.float32)}


def dense(w, x, dy):
    """The same by mpitp.oracle: y, dx and the gradient of each weight."""
    y, saved = oracle.feed_forward.forward(x, w, "relu")
    dx, gradients = oracle.feed_forward.backward(dy, saved)
    return {"y": y, "dx": dx, **gradients}


def my_layer(w, x, dy, shards=3):
    """The layer on trial, here three shards in a loop: each has some rows of `up` and the same columns of `down`."""
    y, dx, d_up, d_down = np.zeros_like(x), np.zeros_like(dy), [], []
    for up, down in zip(np.split(w["up.weight"], shards), np.split(w["down.weight"], shards, axis=1)):
        h = x @ up.T
        a = np.maximum(h, 0)
        dh = (dy @ down) * (h > 0)
        y, dx = y + a @ down.T, dx + dh @ up
        d_up, d_down = [*d_up, dh.T @ x], [*d_down, dy.T @ a]
    return {"y": y, "dx": dx, "up.weight": np.concatenate(d_up), "down.weight": np.concatenate(d_down, axis=1)}


found = my_layer(w, x, dy)
print(*oracle.compare_all(found, dense, w, x, dy), sep="\n")
found["up.weight"] *= np.float32(1.0001)                    # a mistake of a ten-thousandth
print(oracle.compare_all(found, dense, w, x, dy)[2])
