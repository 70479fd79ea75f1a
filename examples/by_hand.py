"""Tensor parallelism of a transformer's feed-forward block, forward and backward, with NumPy and MPI alone.

    mpirun -n 2 python examples/by_hand.py

y = relu(x U^T + b) V^T + c. Each rank holds some rows of U, the same entries of b, the same columns of V, and all of c.
Dimension key: N rows (tokens), D hidden, F feed-forward, Fp the features of F that this rank holds.
"""
import numpy as np
from mpi4py import MPI
comm = MPI.COMM_WORLD

def all_reduce(summand):
    total = np.empty_like(summand)
    comm.Allreduce(summand, total)                              # the sum over the ranks, on every rank
    return total

def copy_to_ranks_forward(x_ND):                                # f: every rank has x,
    return x_ND
def copy_to_ranks_backward(dx_ND):                              # and uses it: their gradients of x add up
    return all_reduce(dx_ND)

def reduce_from_ranks_forward(y_ND):                            # g: every rank has a summand of y,
    return all_reduce(y_ND)
def reduce_from_ranks_backward(dy_ND):                          # and moves y as much as it moves itself
    return dy_ND

def mlp_forward(x_ND, up_FpD, up_bias_Fp, down_DFp, down_bias_D):
    x_ND = copy_to_ranks_forward(x_ND)
    h_NFp = np.maximum(x_ND @ up_FpD.T + up_bias_Fp, 0)         # column-parallel: these features, complete
    y_ND = reduce_from_ranks_forward(h_NFp @ down_DFp.T)        # row-parallel: the full shape, but a summand
    return y_ND + down_bias_D, h_NFp                            # this bias after the sum, so that it counts once

def mlp_backward(dy_ND, x_ND, h_NFp, up_FpD, down_DFp):
    dy_ND = reduce_from_ranks_backward(dy_ND)
    dh_NFp = (dy_ND @ down_DFp) * (h_NFp > 0)
    dx_ND = copy_to_ranks_backward(dh_NFp @ up_FpD)
    return dx_ND, dh_NFp.T @ x_ND, dh_NFp.sum(0), dy_ND.T @ h_NFp, dy_ND.sum(0)

def dense(x_ND, up_FD, up_bias_F, down_DF, down_bias_D, dy_ND):
    h_NF = np.maximum(x_ND @ up_FD.T + up_bias_F, 0)
    dh_NF = (dy_ND @ down_DF) * (h_NF > 0)
    return h_NF @ down_DF.T + down_bias_D, dh_NF @ up_FD, dh_NF.T @ x_ND, dh_NF.sum(0), dy_ND.T @ h_NF, dy_ND.sum(0)

N, D, F = 5, 10, 40
draw = np.random.default_rng(seed=0).standard_normal            # the same numbers on every rank
x, up, up_bias, down, down_bias, dy = map(draw, [(N, D), (F, D), F, (D, F), D, (N, D)])
mine = slice(F * comm.rank // comm.size, F * (comm.rank + 1) // comm.size)
y, h = mlp_forward(x, up[mine], up_bias[mine], down[:, mine], down_bias)
found = y, *mlp_backward(dy, x, h, up[mine], down[:, mine])
exact, dx, dup, dup_bias, ddown, ddown_bias = dense(x, up, up_bias, down, down_bias, dy)
expected = exact, dx, dup[mine], dup_bias[mine], ddown[:, mine], ddown_bias
difference = max(abs(a - b).max(initial=0) for a, b in zip(found, expected))        # of y and of all gradients
lines = comm.gather(f"rank {comm.rank}: features {mine.start:2}:{mine.stop:2}, summand {h[0] @ down[0, mine]:+.6f}, "
                    f"y {y[0, 0]:+.6f}, dense {exact[0, 0]:+.6f}, largest difference {difference:.0e}")
good = comm.gather(difference < 1e-12)
if comm.rank == 0:
    print(*lines, sep="\n", flush=True)
    if not all(good):
        comm.Abort(1)
