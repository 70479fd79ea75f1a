"""One decoder block against its limit, torch + gloo, and dense torch: interleaved in one run.

    pip install '.[mpi,plot,threads]' torch
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE mpirun -n 2 python benchmarks/block.py [--rounds 9] [--out FOLDER]
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE mpirun -n 2 python benchmarks/block.py --modes [--out FOLDER]

Every row does the same mathematics: layer norm, causal attention of 8 heads, layer norm, tanh-GELU feed-forward of
4 h, biases everywhere, residuals, float32; backward makes dx and all gradients. A time is the slowest rank's. Rows:
  products      the bare matrix products of one rank's share with all ranks active, attention's as tiled: the limit
  mpitp         ParallelBlock; reproducible: the same with the same bits for any number of ranks
  torch gloo    the same on the same ranks: Megatron's f and g by autograd functions, all_reduce over gloo
  dense torch   one process with all the cores, while the other ranks sleep
--modes: mpitp's block with sequence parallelism and recomputation, its times over those without, and what it keeps.
"""
import argparse
import functools
import json
import os
import statistics
import sys
import tracemalloc

import common                                       # before NumPy

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as functional

import mpitp
from mpitp import measure, tables
from mpitp.comm.guard import guarded
from mpitp.layers.closed_forms import activation_bytes
from mpitp.ops.activation import activation_backward, activation_forward
from mpitp.ops.attention import attention_backward, attention_forward
from mpitp.ops.linear import bias_backward
from mpitp.ops.norm import norm_backward, norm_forward

HEADS = measure.BLOCK_HEADS
KINDS = ("forward", "forward+backward")
MODES = {                       # options of ParallelBlock, and whether rows are gathered again
    "whole x": ({}, False), "rows": (dict(sequence_parallel=True), False),
    "rows, gathered again": (dict(sequence_parallel=True), True),
    "attention again": (dict(recompute="attention"), False),
    "block again": (dict(recompute="block"), False),
    "rows, block again": (dict(sequence_parallel=True, recompute="block"), True)}


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


def require_same_numbers(group, single):
    """torch's rows, split and dense, compute what mpitp's do: output and all gradients, with biases that are not 0."""
    normal = np.random.default_rng(3).standard_normal
    x, dy = measure.block_data(48, 64)
    dense = {name: 0.1 * normal(spec.shape, dtype="f") + name.endswith("norm.weight")
             for name, spec in mpitp.ParallelBlock(single, measure.block_config(64)).specs.items()}
    for of_block in (single, group):
        block = mpitp.ParallelBlock(of_block, measure.block_config(64))
        block.load_dense(dense)
        y, saved = block.forward(x)
        dx, gradients = block.backward(dy, saved)
        cases = torch_cases(block, of_block.size, 48, 64, "torch")
        found, (model, given) = cases["torch forward"](), cases["torch forward+backward"]()
        pairs = [(y, found), (dx, given.grad), *((gradients[name], model.w[name].grad) for name in gradients)]
        worst = max(float(np.abs(a - b.numpy()).max(initial=0) / (1 + np.abs(a).max(initial=0))) for a, b in pairs)
        if not worst < 1e-5:
            raise RuntimeError(f"torch's block differs from mpitp's by {worst:.1e}")


# --- parts ---------------------------------------------------------------------------------------------------

def part_cases(group, tokens, hidden):
    """What a rank does in a block, part by part: {"part forward", "part forward+backward"}, without checks."""
    block = mpitp.ParallelBlock(group, measure.block_config(hidden))
    heads, K = block.attention.partition.lengths[group.rank], hidden // HEADS
    D, H, F = hidden, heads * K, block.mlp.partition.lengths[group.rank]
    normal = np.random.default_rng(3).standard_normal
    x, dy, h, dh, projected = (normal((tokens, features), dtype="f") for features in (D, D, F, F, H))
    q, k, v, a, da, dq = (normal((tokens, heads, 1, K), dtype="f").transpose(1, 2, 0, 3) for _ in range(6))
    k, v = k[:, 0], v[:, 0]                                 # with the strides that they have in the layer
    gain, bias, zeros = np.ones(D, "f"), np.zeros(D, "f"), np.zeros((tokens, D), "f")
    gradient_D = np.empty(D, "f")

    def norms(backward):
        for _ in range(2):
            _, saved = norm_forward(x, gain, bias, "layernorm", 1e-5)
            if backward:
                norm_backward(dy, saved, gradient_D, gradient_D)

    def gelu(backward):
        new = np.empty_like(h)
        activation_forward("gelu_tanh", h, **({"derivative": new} if backward else {"out": new}))
        if backward:
            activation_backward(dh, new, out=new)

    def attention(backward):
        lse = attention_forward(q, k, v, K ** -0.5, out=a)
        if backward:
            attention_backward(da, lse, q, k, v, a, K ** -0.5, dq=dq)

    def biases(backward):
        for y_NO in (projected, projected, projected, h, zeros, zeros):
            y_NO += np.zeros(y_NO.shape[1], "f")
            if backward:
                bias_backward(y_NO)

    def all_reduces(backward):
        for _ in range(4 if backward else 2):
            group.transport.all_reduce(zeros, "sum")        # they stay zeros

    def residuals(backward):
        for _ in range(4 if backward else 2):
            np.add(x, zeros, out=dy)

    parts = {"attention": attention, "norms": norms, "gelu": gelu, "biases": biases, "all-reduces": all_reduces,
             "residuals": residuals}
    return {f"{name} {kind}": functools.partial(part, kind != "forward")
            for name, part in parts.items() for kind in KINDS}


def show_parts(group, tokens, hidden, rounds):
    """A table: bare products, parts, whole block. Attention's own products are in the first and in "attention"."""
    cases = measure.block_product_cases(group, tokens, hidden) | part_cases(group, tokens, hidden)
    cases |= measure.block_cases(group, tokens, hidden, prefix="block ")
    seconds = measure.interleave(group, cases, rounds, 1e-2)
    if group.rank == 0:
        names = dict.fromkeys(name.rsplit(" ", 1)[0] for name in cases)
        print(f"h = {hidden}, {tokens} tokens, {group.size} ranks, medians of {rounds} interleaved rounds")
        print("\n".join(tables.table(("part", *KINDS), [
            (name, *(tables.seconds(measure.timing(seconds[f"{name} {kind}"]).median) for kind in KINDS))
            for name in names])), flush=True)


# --- sequence parallelism and recomputation ---------------------------------------------------------------------------

def kept_bytes(group, tokens, hidden, options, gather_again):
    """(what a rank keeps of a block for backward, by tracemalloc; by the formula)"""
    blocks = [mpitp.ParallelBlock(group, measure.block_config(hidden), seed=None, **options) for _ in range(3)]
    rows = mpitp.Rows(group, (1, tokens), gather_again) if options.get("sequence_parallel") else None
    x, _ = measure.block_data(tokens, hidden)
    x, found = rows.split(x) if rows else x, []
    tracemalloc.start()
    for block in blocks:                        # the first two allocate what is used again
        x, saved = block.forward(x, rows=rows)
        found.append((tracemalloc.get_traced_memory()[0], saved))
    tracemalloc.stop()
    return found[2][0] - found[1][0], activation_bytes(blocks[0], tokens, gather_again)


def run_modes(group, hidden, arguments):
    tokens, cases = arguments.seq_length, {}
    for name, (options, gather_again) in MODES.items():
        cases |= measure.block_cases(group, tokens, hidden, prefix=f"{name} ", gather_again=gather_again, **options)
    seconds = measure.interleave(group, cases, arguments.rounds, 5e-2)
    kept = {name: group.comm.allgather(kept_bytes(group, tokens, hidden, *mode)) for name, mode in MODES.items()}
    if group.rank != 0:
        return
    rows = {name: dict({f"{kind} median_seconds": measure.timing(seconds[f"{name} {kind}"]).median for kind in KINDS},
                       **{f"{kind} over_whole_x": measure.ratio(seconds[f"{name} {kind}"], seconds[f"whole x {kind}"])
                          for kind in KINDS},
                       kept_bytes=max(of_rank[0] for of_rank in kept[name]),
                       formula_bytes=max(of_rank[1] for of_rank in kept[name])) for name in MODES}
    print(f"decoder block, h = {hidden}, {tokens} tokens, {group.size} ranks, medians of {arguments.rounds} rounds, "
          f"interleaved; what is kept is the largest rank's")
    print("\n".join(tables.table(("", *KINDS, "over whole x", "kept MiB", "by formula"), [
        (name, *(tables.seconds(row[f"{kind} median_seconds"]) for kind in KINDS),
         f"{row['forward+backward over_whole_x']:.3f}", f"{row['kept_bytes'] / 2 ** 20:.2f}",
         f"{row['formula_bytes'] / 2 ** 20:.2f}") for name, row in rows.items()])), flush=True)
    if arguments.out:
        os.makedirs(arguments.out, exist_ok=True)
        with open(os.path.join(arguments.out, f"block-modes-h{hidden}-n{group.size}.json"), "w") as out:
            json.dump({"schema": "mpitp.benchmark.block_modes/1", "ranks": group.size, "hidden_size": hidden,
                       "tokens": tokens, "rounds": arguments.rounds, "dtype": "float32",
                       "machine": common.launch.machine(), "mpi": common.launch.library_name(), "rows": rows}, out,
                      indent=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden-size", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--parts", action="store_true", help="time mpitp's parts instead")
    parser.add_argument("--modes", action="store_true", help="time sequence parallelism and recomputation instead")
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(common.SHARE)
    with mpitp.TensorParallelGroup() as group, mpitp.TensorParallelGroup(reproducible=True) as fixed:
        with common.blas_threads(common.SHARE), common.gloo(group), group.subgroup(group.rank) as single:
            require_same_numbers(group, single)
            for hidden in arguments.hidden_size:
                run(group, fixed, single, hidden, arguments)


def run(group, fixed, single, hidden, arguments):
    tokens, config = arguments.seq_length, measure.block_config(hidden)
    if arguments.modes:
        return run_modes(group, hidden, arguments)
    if arguments.parts:
        return show_parts(group, tokens, hidden, arguments.rounds)
    cases = measure.block_product_cases(group, tokens, hidden)
    cases |= measure.block_cases(group, tokens, hidden, prefix="mpitp ")
    cases |= measure.block_cases(fixed, tokens, hidden, prefix="reproducible ")
    cases |= torch_cases(mpitp.ParallelBlock(group, config), group.size, tokens, hidden, "torch gloo")
    dense = torch_cases(mpitp.ParallelBlock(single, config), 1, tokens, hidden, "dense torch")
    cases |= common.alone(group.comm, dense)
    cases["pause"] = common.pause
    seconds = measure.interleave(group, cases, arguments.rounds, 5e-2)
    if group.rank == 0:
        found = common.summary("mpitp.benchmark.block/1", seconds, {kind: f"products {kind}" for kind in KINDS}, group,
                               arguments.rounds, hidden_size=hidden, tokens=tokens, heads=HEADS)
        title = f"decoder block, h = {hidden}, {tokens} tokens, {HEADS} heads"
        common.show(found, title)
        for kind in KINDS:
            better = min((seconds[f"{name} {kind}"] for name in ("torch gloo", "dense torch")), key=statistics.median)
            ratio = found["rows"][f"mpitp {kind}"]["better_torch_over_this"] = \
                measure.ratio(better, seconds[f"mpitp {kind}"])
            print(f"  the better torch {kind} over mpitp: {ratio:.2f}")
        if arguments.out:
            common.save(found, arguments.out, f"block-h{hidden}-n{group.size}", title, KINDS)


if __name__ == "__main__":
    sys.exit(guarded(main))
