"""The layers in one's own MPI program: a residual feed-forward block, split over the ranks, learns 32 vectors.

    OMP_NUM_THREADS=1 mpirun -n 2 python examples/own_layer.py

OMP_NUM_THREADS: the cores of the machine over the ranks; left alone, BLAS starts a thread per core in every rank.
"""
import numpy as np

import mpitp

with mpitp.TensorParallelGroup() as group:                      # every rank; a failure of one ends the job
    mlp = mpitp.ParallelMLP(group, hidden_size=64, ffn_hidden_size=256, activation="silu", gated=True)
    draw = np.random.default_rng(seed=0).standard_normal        # the same data on every rank
    x, target = draw((32, 64), dtype=np.float32), draw((32, 64), dtype=np.float32)
    gradients = None
    for step in range(101):
        y, saved = mlp.forward(x)                               # one all-reduce
        error = x + y - target
        loss = (error * error).sum() / len(x)
        d_out = error * np.float32(2 / len(x))
        dx, gradients = mlp.backward(d_out, saved, out=gradients)       # one all-reduce
        # dx + d_out would be the gradient for a layer before this one.
        for name, weight in mlp.weights.items():                # each rank has its slices, and moves them
            weight -= np.float32(0.1) * gradients[name]
        if group.rank == 0 and step % 20 == 0:
            print(f"step {step:3d}  loss {loss:8.4f}")
