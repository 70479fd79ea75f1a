"""The feed-forward block against its limit, torch + gloo, and dense: interleaved in one run.

    pip install '.[mpi,plot,threads]' torch
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE mpirun -n 2 python benchmarks/ffn.py [--rounds 9] [--out FOLDER]

Every row does the same mathematics: y = gelu_tanh(x U^T) V^T without bias, float32; backward makes dx and both weight
gradients. A time is the slowest rank's. Rows:
  products      the bare matrix products of one rank's share with all ranks active: the limit
  mpitp         ParallelMLP; reproducible: the same with the same bits for any number of ranks
  torch gloo    the same on the same ranks, torch.matmul and torch.distributed.all_reduce over gloo
  dense         NumPy, torch: one process with all the cores, while the other ranks sleep
  read          a plain read of one rank's weights: the limit of one token
"""
import argparse
import sys

import common                                       # before NumPy

import numpy as np
import torch
import torch.distributed as distributed

import mpitp
from mpitp import measure
from mpitp.comm.guard import guarded
from mpitp.ops.activation import activation_backward, activation_forward


def torch_cases(rank, size, tokens, hidden, ffn, prefix):
    """Megatron's f and g over gloo, by hand: no autograd, no copies that mpitp does not make."""
    part = ffn * (rank + 1) // size - ffn * rank // size
    x, dy = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    up, down = torch.randn(part, hidden) / hidden ** 0.5, torch.randn(hidden, part) / ffn ** 0.5
    dup, ddown = torch.empty_like(up), torch.empty_like(down)

    def forward():
        h = x @ up.T
        a = torch.nn.functional.gelu(h, approximate="tanh")
        y = a @ down.T
        if size > 1:
            distributed.all_reduce(y)
        return h, a

    def both():
        h, a = forward()
        torch.matmul(dy.T, a, out=ddown)
        dh = torch.ops.aten.gelu_backward(dy @ down, h, approximate="tanh")
        torch.matmul(dh.T, x, out=dup)
        dx = dh @ up
        if size > 1:
            distributed.all_reduce(dx)

    return {f"{prefix} forward": forward, f"{prefix} forward+backward": both}


def numpy_dense_cases(tokens, hidden, ffn):
    """One process, by the ops of mpitp; mpitp.oracle is there to be read, not to be fast."""
    draw = np.random.default_rng(0).standard_normal
    x, dy = draw((tokens, hidden), dtype="f"), draw((tokens, hidden), dtype="f")
    up, down = draw((ffn, hidden), dtype="f") / 45, draw((hidden, ffn), dtype="f") / 90
    dup, ddown = np.empty_like(up), np.empty_like(down)

    def forward():
        h = x @ up.T
        activation_forward("gelu_tanh", h, out=h)
        return h @ down.T

    def both():
        h = x @ up.T
        a, slope = activation_forward("gelu_tanh", h, derivative=h)
        a @ down.T
        np.matmul(dy.T, a, out=ddown)
        dh = dy @ down
        activation_backward(dh, slope, out=dh)
        np.matmul(dh.T, x, out=dup)
        dh @ up

    return {"dense NumPy forward": forward, "dense NumPy forward+backward": both}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    D, F, tokens = arguments.hidden_size, 4 * arguments.hidden_size, arguments.seq_length
    torch.set_num_threads(common.SHARE)
    with mpitp.TensorParallelGroup() as group, mpitp.TensorParallelGroup(reproducible=True) as fixed:
        # Reproducible mode holds BLAS to one thread; here all have theirs.
        with common.blas_threads(common.SHARE), common.gloo(group):
            cases = measure.product_cases(group, tokens, D, F)
            cases |= measure.mlp_cases(group, tokens, D, F, prefix="mpitp ")[0]
            cases |= measure.mlp_cases(fixed, tokens, D, F, prefix="reproducible ")[0]
            cases |= torch_cases(group.rank, group.size, tokens, D, F, "torch gloo")
            cases |= common.alone(group.comm, numpy_dense_cases(tokens, D, F))
            cases["pause"] = common.pause
            cases |= common.alone(group.comm, torch_cases(0, 1, tokens, D, F, "dense torch"))
            cases["second pause"] = common.pause
            cases |= measure.read_case(group, D, F)
            one = measure.mlp_cases(group, 1, D, F, prefix="mpitp one token ")[0]
            cases["mpitp one token"] = one["mpitp one token forward"]
            cases["torch gloo one token"] = torch_cases(group.rank, group.size, 1, D, F, "one")["one forward"]
            seconds = measure.interleave(group, cases, arguments.rounds, 2e-2)
        if group.rank == 0:
            kinds = {kind: f"products {kind}" for kind in ("forward", "forward+backward")} | {"one token": "read"}
            found = common.summary("mpitp.benchmark.ffn/1", seconds, kinds, group, arguments.rounds, hidden_size=D,
                                   tokens=tokens)
            title = f"h = {D}, {tokens} tokens and one"
            common.show(found, title)
            if arguments.out:
                common.save(found, arguments.out, f"ffn-h{D}-n{group.size}", title, kinds)


if __name__ == "__main__":
    sys.exit(guarded(main))
