"""The feed-forward block against its limit, torch + gloo, and dense: interleaved in one run.

    pip install '.[mpi,plot,threads]' torch
    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE mpirun -n 2 python benchmarks/ffn.py [--rounds 9] [--out benchmarks/results]

Every row does the same mathematics: y = gelu_tanh(x U^T) V^T without bias, float32; backward makes dx and both weight
gradients. A time is the slowest rank's. Rows:
  products      the bare matrix products of one rank's share with all ranks active: the limit
  mpitp         ParallelMLP; reproducible: the same with the same bits for any number of ranks
  torch gloo    the same on the same ranks, torch.matmul and torch.distributed.all_reduce over gloo
  dense         NumPy, torch: one process with all the cores, while the other ranks sleep
  read          a plain read of one rank's weights: the limit of one token
"""
import argparse
import json
import os
import platform
import sys
import tempfile
import time

from mpi4py import MPI

from mpitp.comm import launch

CORES = launch.cores()
SHARE = launch.set_blas_threads(MPI.COMM_WORLD)     # before NumPy
launch.keep_freed_memory()                          # as python -m mpitp does; for torch's arrays as well

import numpy as np                                  # noqa: E402
import torch                                        # noqa: E402
import torch.distributed as distributed             # noqa: E402
from threadpoolctl import threadpool_limits         # noqa: E402

import mpitp                                        # noqa: E402
from mpitp.commands import measure, report          # noqa: E402
from mpitp.comm.guard import guarded                # noqa: E402
from mpitp.ops.activation import activation_backward, activation_forward        # noqa: E402


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
    """One process, by the ops of mpitp (dense.py is an oracle, not a fast program)."""
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


def alone(comm, cases):
    """The cases on rank 0 with all cores of its node; the other ranks sleep, where MPI would spin."""
    def on_rank_0(function):
        def call():
            if comm.rank == 0:
                with threadpool_limits(len(CORES), user_api="blas"):
                    torch.set_num_threads(len(CORES))
                    function()
                    torch.set_num_threads(SHARE)
            request = comm.Ibarrier()
            while not request.Test():
                time.sleep(2e-4)
        return call
    return {name: on_rank_0(function) for name, function in cases.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    D, F, tokens = arguments.hidden_size, 4 * arguments.hidden_size, arguments.seq_length
    torch.set_num_threads(SHARE)
    with mpitp.TensorParallelGroup() as group, mpitp.TensorParallelGroup(reproducible=True) as fixed:
        with threadpool_limits(SHARE, user_api="blas"):     # reproducible mode holds one thread; here all have theirs
            store = group.comm.bcast(tempfile.mktemp() if group.rank == 0 else None)
            distributed.init_process_group("gloo", init_method=f"file://{store}", rank=group.rank, world_size=group.size)
            cases = measure.product_cases(group, tokens, D, F)
            cases |= measure.mlp_cases(group, tokens, D, F, prefix="mpitp ")[0]
            cases |= measure.mlp_cases(fixed, tokens, D, F, prefix="reproducible ")[0]
            cases |= torch_cases(group.rank, group.size, tokens, D, F, "torch gloo")
            cases |= alone(group.comm, numpy_dense_cases(tokens, D, F))
            cases |= alone(group.comm, torch_cases(0, 1, tokens, D, F, "dense torch"))
            cases |= measure.read_case(group, D, F)
            one = measure.mlp_cases(group, 1, D, F, prefix="mpitp one token ")[0]
            cases["mpitp one token"] = one["mpitp one token forward"]
            cases["torch gloo one token"] = torch_cases(group.rank, group.size, 1, D, F, "one")["one forward"]
            seconds = measure.interleave(group, cases, arguments.rounds, 2e-2)
            distributed.destroy_process_group()
        if group.rank == 0:
            write(summary(seconds, group, arguments), arguments.out)


def summary(seconds, group, arguments):
    rows = {}
    for kind in ("forward", "forward+backward", "one token"):
        limit = "read" if kind == "one token" else f"products {kind}"
        for name, times in seconds.items():
            if name.endswith(f" {kind}") or name == limit:
                timing = measure.timing(times)
                rows[name] = dict(kind=kind, median_seconds=timing.median, least_seconds=timing.least,
                                  most_seconds=timing.most, over_limit=measure.ratio(times, seconds[limit]),
                                  torch_gloo_over_this=measure.ratio(seconds[f"torch gloo {kind}"], times))
                if name.startswith("reproducible"):
                    rows[name]["over_ordinary"] = measure.ratio(times, seconds[f"mpitp {kind}"])
    return {"schema": "mpitp.benchmark.ffn/1", "command": f"mpirun -n {group.size} python {' '.join(sys.argv)}",
            "ranks": group.size, "cores_per_rank": SHARE, "hidden_size": arguments.hidden_size,
            "tokens": arguments.seq_length, "dtype": "float32", "rounds": arguments.rounds,
            "machine": launch.machine(), "mpi": launch.library_name(), "torch": torch.__version__,
            "python": platform.python_version(), "rows": rows}


def write(found, folder):
    print(f"{found['command']}\n{found['machine']}, {found['mpi']}, torch {found['torch']}, Python {found['python']}")
    print(f"h = {found['hidden_size']}, {found['tokens']} tokens and one, {found['ranks']} ranks of "
          f"{found['cores_per_rank']} core(s), medians of {found['rounds']} interleaved rounds")
    print("\n".join(report.table(
        ("", "median", "fastest", "slowest", "over limit", "torch gloo over this"),
        [(name, *(report.seconds(row[f"{which}_seconds"]) for which in ("median", "least", "most")),
          f"{row['over_limit']:.3f}", f"{row['torch_gloo_over_this']:.2f}") for name, row in found["rows"].items()])))
    for name, row in found["rows"].items():
        if "over_ordinary" in row:
            print(f"  {name} over mpitp: {row['over_ordinary']:.3f}")
    if folder:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"ffn-h{found['hidden_size']}-n{found['ranks']}")
        with open(f"{path}.json", "w", encoding="utf-8") as out:
            json.dump(found, out, indent=1)
            out.write("\n")
        plot(f"{path}.png", found)


def plot(path, found):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    kinds = ("forward", "forward+backward", "one token")
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for axis, kind in zip(axes, kinds):
        rows = {name: row for name, row in found["rows"].items() if row["kind"] == kind}
        names = [name.removesuffix(f" {kind}") for name in rows]
        times = [row["median_seconds"] * 1e3 for row in rows.values()]
        colors = ["0.6" if name in ("products", "read") else "C0" if name in ("mpitp", "reproducible") else "C1"
                  for name in names]
        bars = axis.barh(names[::-1], times[::-1], color=colors[::-1])
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set(xlabel="milliseconds (median; shorter is better)", title=kind, xlim=(0, max(times) * 1.15))
    figure.suptitle(f"h = {found['hidden_size']}, {found['tokens']} tokens, float32, {found['ranks']} ranks: "
                    f"{found['machine']}", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(guarded(main))
