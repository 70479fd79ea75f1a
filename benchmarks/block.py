"""One decoder block against its limit, torch + gloo, and dense torch: interleaved in one run.

    pip install '.[mpi,plot,threads]' torch
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE mpirun -n 2 python benchmarks/block.py [--rounds 9] [--out FOLDER]

Every row does the same mathematics: layer norm, causal attention of 8 heads, layer norm, tanh-GELU feed-forward of
4 h, biases everywhere, residuals, float32; backward makes dx and all gradients. A time is the slowest rank's. Rows:
  products      the bare matrix products of one rank's share with all ranks active, attention's as tiled: the limit
  mpitp         ParallelBlock; reproducible: the same with the same bits for any number of ranks
  torch gloo    the same on the same ranks: Megatron's f and g by autograd functions, all_reduce over gloo
  dense torch   one process with all the cores, while the other ranks sleep
"""
import argparse
import sys

import common                                       # before NumPy

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from threadpoolctl import threadpool_limits

import mpitp
from mpitp.commands import measure
from mpitp.comm.guard import guarded

HEADS = measure.BLOCK_HEADS


# --- torch ---------------------------------------------------------------------------------------------------

class CopyToRanks(torch.autograd.Function):
    """Megatron's f."""

    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, dy):
        dy = dy.contiguous()
        distributed.all_reduce(dy)
        return dy


class ReduceFromRanks(torch.autograd.Function):
    """Megatron's g."""

    @staticmethod
    def forward(context, x):
        x = x.clone() if not x.is_contiguous() else x
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(context, dy):
        return dy


class TorchBlock:
    """The same block by torch's functions and autograd, from the weights of a ParallelBlock (this rank's)."""

    def __init__(self, block, ranks):
        self.w = {name: torch.from_numpy(w.copy()).requires_grad_() for name, w in block.weights.items()}
        self.heads, self.ranks = block.attention.partition.lengths[block.group.rank], ranks
        self.into, self.sum = (CopyToRanks.apply, ReduceFromRanks.apply) if ranks > 1 else (lambda x: x,) * 2

    def __call__(self, x):
        w, D = self.w, x.shape[-1]
        h = self.into(functional.layer_norm(x, (D,), w["attention_norm.weight"], w["attention_norm.bias"]))
        q, k, v = (functional.linear(h, w[f"attention.{part}.weight"], w[f"attention.{part}.bias"])
                   .view(*x.shape[:2], self.heads, -1).transpose(1, 2) for part in ("query", "key", "value"))
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.row(a, "attention.out")
        h = self.into(functional.layer_norm(x, (D,), w["mlp_norm.weight"], w["mlp_norm.bias"]))
        a = functional.gelu(functional.linear(h, w["mlp.up.weight"], w["mlp.up.bias"]), approximate="tanh")
        return x + self.row(a, "mlp.down")

    def row(self, a, name):
        """A row-parallel linear; the bias after the sum."""
        if self.ranks == 1:
            return functional.linear(a, self.w[f"{name}.weight"], self.w[f"{name}.bias"])
        return self.sum(functional.linear(a, self.w[f"{name}.weight"])) + self.w[f"{name}.bias"]


def torch_cases(block, ranks, tokens, hidden, prefix):
    model = TorchBlock(block, ranks)
    x, dy = map(torch.from_numpy, measure.block_data(tokens, hidden))
    x.requires_grad_()

    def forward():
        with torch.no_grad():
            return model(x)

    def both():
        for tensor in (x, *model.w.values()):
            tensor.grad = None
        model(x).backward(dy)
        return model, x
    return {f"{prefix} forward": forward, f"{prefix} forward+backward": both}


def require_same_numbers(group):
    """torch's rows compute what mpitp's do, outputs and gradients."""
    block = mpitp.ParallelBlock(group, measure.block_config(64))
    x, dy = measure.block_data(48, 64)
    y, saved = block.forward(x)
    dx, gradients = block.backward(dy, saved)
    cases = torch_cases(block, group.size, 48, 64, "torch")
    found, (model, given) = cases["torch forward"](), cases["torch forward+backward"]()
    pairs = [(y, found), (dx, given.grad), *((gradients[name], model.w[name].grad) for name in gradients)]
    worst = max(float(np.abs(a - b.numpy()).max(initial=0) / (1 + np.abs(a).max(initial=0))) for a, b in pairs)
    if not worst < 1e-5:
        raise RuntimeError(f"torch's block differs from mpitp's by {worst:.1e}")


# --- parts ---------------------------------------------------------------------------------------------------

def part_cases(group, tokens, hidden):
    """What the parts of the block cost, forward and forward+backward: to see where time goes."""
    block = mpitp.ParallelBlock(group, measure.block_config(hidden))
    x, dy = measure.block_data(tokens, hidden)
    cases = {"all-reduce": lambda: group.all_reduce(dy, out=x)}
    for name, layer in (("attention", block.attention), ("mlp", block.mlp), ("norm", block.norms["attention_norm"])):
        gradients = layer.backward(dy, layer.forward(x)[1])[1]
        cases[f"{name} forward"] = lambda layer=layer: layer.forward(x, saved=False)
        cases[f"{name} both"] = lambda layer=layer, out=gradients: layer.backward(dy, layer.forward(x)[1], out=out)
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--parts", action="store_true", help="time mpitp's parts instead")
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(common.SHARE)
    with mpitp.TensorParallelGroup() as group, mpitp.TensorParallelGroup(reproducible=True) as fixed:
        with threadpool_limits(common.SHARE, user_api="blas"), common.gloo(group), group.subgroup(group.rank) as single:
            require_same_numbers(group)
            for hidden in arguments.hidden_size:
                run(group, fixed, single, hidden, arguments)


def run(group, fixed, single, hidden, arguments):
    tokens = arguments.seq_length
    if arguments.parts:
        seconds = measure.interleave(group, part_cases(group, tokens, hidden), arguments.rounds, 2e-2)
        if group.rank == 0:
            print(f"hidden {hidden}")
            for name, times in seconds.items():
                print(f"  {name:<20}{np.median(times) * 1e3:8.3f} ms")
        return
    cases = measure.block_product_cases(group, tokens, hidden)
    cases |= measure.block_cases(group, tokens, hidden, prefix="mpitp ")
    cases |= measure.block_cases(fixed, tokens, hidden, prefix="reproducible ")
    cases |= torch_cases(mpitp.ParallelBlock(group, measure.block_config(hidden)), group.size, tokens, hidden, "torch gloo")
    dense = torch_cases(mpitp.ParallelBlock(single, measure.block_config(hidden)), 1, tokens, hidden, "dense torch")
    cases |= common.alone(group.comm, dense)
    seconds = measure.interleave(group, cases, arguments.rounds, 2e-2)
    if group.rank == 0:
        kinds = {kind: f"products {kind}" for kind in ("forward", "forward+backward")}
        found = common.summary("mpitp.benchmark.block/1", seconds, kinds, group, arguments.rounds, hidden_size=hidden,
                               tokens=tokens, heads=HEADS)
        title = f"decoder block, h = {hidden}, {tokens} tokens, {HEADS} heads"
        common.show(found, title)
        if arguments.out:
            common.save(found, arguments.out, f"block-h{hidden}-n{group.size}", title, kinds)


if __name__ == "__main__":
    sys.exit(guarded(main))
