"""mpitp on GPUs against torch (eager, CUDA graphs) with NCCL doing the same mathematics: interleaved in one run.

    mpirun -n P python benchmarks/gpu.py [--rows ffn,tokens,stack,decoder,sums] [--rounds 11] [--json FILE]

One rank a GPU; P = 1 compares without collectives. A time is the slowest rank's, from an idle GPU to an idle GPU. Rows:
  ffn       feed-forward block, 2048 tokens, 8192 -> 32768 -> 8192: forward, and forward + backward
  tokens    the same block, 1 and 16 tokens, forward
  stack     16 blocks of h = 4096 and 24 of h = 1024 (ffn 4 h), one token: as calls, and recorded as a CUDA graph
  decoder   12 layers, h = 2048: one token of generation, called and recorded, and a training step of 1024 tokens
            (gpu_decoder.py)
  sums      the transports against NCCL's own all-reduce, 8 B to 128 MiB, called and in CUDA graphs (gpu_sums.py; P > 1)
Biases are left out, weights are the same memory for both, and what layers return is compared before it is timed. The
limit of a row, where it has one: the bare products by torch.matmul, or the weights' bytes at the rate at which a copy
on the device reads and writes. torch is as it comes: eager, its default AdamW, its own sums in 16-bit products.
"""
import argparse
import json
import os
import platform
import socket
import sys

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import cupy
import torch
import torch.distributed as distributed
from mpi4py import MPI

import gpu_decoder
import gpu_sums
import mpitp
from gpu_common import TORCH, as_torch, draw, finished, randomise, relative_difference, torch_graph
from mpitp import measure, tables
from mpitp.comm import launch
from mpitp.comm.guard import guarded
from mpitp.errors import require

ROWS = ("ffn", "tokens", "stack", "decoder", "sums")
gelu = torch.nn.functional.gelu


def init_nccl(comm):
    """torch.distributed over NCCL, by a port that rank 0 finds free."""
    address = None
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            address = socket.gethostname(), probe.getsockname()[1]
    host, port = comm.bcast(address)
    distributed.init_process_group("nccl", init_method=f"tcp://{host}:{port}", rank=comm.rank, world_size=comm.size)


def torch_mlp(layer, size):
    """(forward, forward and backward) of a ParallelMLP without bias, by torch on the same weights."""
    up, down = (as_torch(layer.parameter(name)) for name in ("up.weight", "down.weight"))
    grads = torch.empty_like(up), torch.empty_like(down)

    def forward(x):
        h = x @ up.T
        a = gelu(h, approximate="tanh")
        y = a @ down.T
        if size > 1:
            distributed.all_reduce(y)
        return y, h, a

    def both(x, dy):
        _, h, a = forward(x)
        torch.matmul(dy.T, a, out=grads[1])
        dh = torch.ops.aten.gelu_backward(dy @ down, h, approximate="tanh")
        torch.matmul(dh.T, x, out=grads[0])
        dx = dh @ up
        if size > 1:
            distributed.all_reduce(dx)
        return dx
    return forward, both


class Rows:
    """Runs cases against each other and keeps what came out."""

    def __init__(self, group, rounds):
        self.group, self.rounds, self.found = group, rounds, {}

    def add(self, name, cases, limit=None, bytes_read=None, check=None):
        """Time {who: function}. limit : name of the case that is the row's; bytes_read : what the row must read."""
        if check:
            ours, theirs, most = check
            worst = relative_difference(ours, theirs)
            if not worst < most:
                raise SystemExit(f"{name}: found a relative difference of {worst:.2g} to torch, expected below {most}")
        seconds = measure.interleave(self.group, {who: finished(f) for who, f in cases.items()}, self.rounds, 4e-3)
        row = self.found[name] = {"relative_difference": worst if check else None, "cases": {}}
        for who, times in seconds.items():
            timing = measure.timing(times)
            case = row["cases"][who] = dict(median_seconds=timing.median, least_seconds=timing.least,
                                            most_seconds=timing.most)
            for base in ("torch", "torch graph", "nccl"):
                if base in seconds and who.startswith("mpitp"):
                    case[f"{base} over this".replace(" ", "_")] = measure.ratio(seconds[base], times)
            if limit:
                case["limit_over_this"] = measure.ratio(seconds[limit], times)
            elif bytes_read:
                case["limit_over_this"] = bytes_read / self.bandwidth / timing.median
        if self.group.rank == 0:
            for who, case in row["cases"].items():
                ratios = "  ".join(f"{key.replace('_', ' ')} {value:.2f}" for key, value in case.items()
                                   if key.endswith("over_this"))
                print(f"{name:44} {who:14} {tables.seconds(case['median_seconds']):>9}  {ratios}", flush=True)

    def measure_bandwidth(self):
        """Bytes a second that a copy on the device reads and writes."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        seconds = measure.interleave(self.group, {"copy": finished(lambda: target.copy_(source))}, 9)["copy"]
        self.bandwidth = 2 * source.numel() / measure.timing(seconds).median


def ffn_rows(rows, groups):
    N, D, F = 2048, 8192, 32768
    for name, dtype in (("float32", "float32"), ("tf32", "float32"), ("bfloat16", "bfloat16")):
        group = groups(tf32=name == "tf32")
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        layer = randomise(mpitp.ParallelMLP(group, D, F, bias=False, dtype=dtype, seed=None))
        x, dy = draw(N, D, dtype=layer.dtype), draw(N, D, dtype=layer.dtype)
        forward, both = torch_mlp(layer, group.size)
        tx, tdy = as_torch(x), as_torch(dy)
        h, a = torch.empty(N, layer.parameter("up.weight").shape[0], device="cuda", dtype=TORCH[layer.dtype.name]), None
        up, down = (as_torch(layer.parameter(part)) for part in ("up.weight", "down.weight"))
        y, a, dw = torch.empty_like(tx), torch.randn_like(h), (torch.empty_like(up), torch.empty_like(down))

        def products():
            torch.matmul(tx, up.T, out=h)
            torch.matmul(a, down.T, out=y)

        def all_products():
            products()
            torch.matmul(tdy.T, a, out=dw[1])
            torch.matmul(tdy, down, out=h)
            torch.matmul(h.T, tx, out=dw[0])
            torch.matmul(h, up, out=y)
        rows.add(f"feed-forward {N} x {D} -> {F}, {name}, forward", {
            "mpitp": lambda: layer.forward(x, save=False), "torch": lambda: forward(tx), "products": products},
            limit="products", check=(layer.forward(x, save=False)[0], forward(tx)[0], 0.02))
        kept = [layer.backward(dy, layer.forward(x)[1])[1]]

        def ours():
            layer.backward(dy, layer.forward(x)[1], out=kept[0])
        rows.add(f"feed-forward {N} x {D} -> {F}, {name}, both", {
            "mpitp": ours, "torch": lambda: both(tx, tdy), "products": all_products}, limit="products",
                 check=(layer.backward(dy, layer.forward(x)[1])[0], both(tx, tdy), 0.02))
        group.close()
        del layer, kept, forward, both, up, down, h, a, y, dw
        empty_pools()


def token_rows(rows, groups):
    D, F = 8192, 32768
    with groups() as group:
        for dtype in ("float32", "bfloat16"):
            layer = randomise(mpitp.ParallelMLP(group, D, F, bias=False, dtype=dtype, seed=None))
            forward, _ = torch_mlp(layer, group.size)
            for N in (1, 16):
                x = draw(N, D, dtype=layer.dtype)
                tx = as_torch(x)
                rows.add(f"feed-forward {N} x {D} -> {F}, {dtype}",
                         {"mpitp": lambda: layer.forward(x, save=False), "torch": lambda: forward(tx)},
                         bytes_read=layer.local_bytes(),
                         check=(layer.forward(x, save=False)[0], forward(tx)[0], 0.02))
            del layer, forward
            empty_pools()


def stack_rows(rows, groups):
    for count, h in ((16, 4096), (24, 1024)):
        for dtype in ("float32", "float16", "bfloat16"):
            with groups() as group:
                layers = [randomise(mpitp.ParallelMLP(group, h, bias=False, dtype=dtype, seed=None), 1.3, number)
                          for number in range(count)]
                forwards = [torch_mlp(layer, group.size)[0] for layer in layers]
                x = draw(1, h, dtype=layers[0].dtype)
                tx = as_torch(x)

                def ours(x):
                    for layer in layers:
                        x, _ = layer.forward(x, save=False)
                    return x

                def theirs():
                    y = tx
                    for forward in forwards:
                        y, _, _ = forward(y)
                    return y
                cases = {"mpitp": lambda: ours(x), "torch": theirs, "torch graph": torch_graph(theirs)}
                if group.transport.records:
                    captured = mpitp.Captured(group, ours, x)
                    cases["mpitp graph"] = lambda: captured(x)
                rows.add(f"{count} blocks of h = {h}, one token, {dtype}", cases,
                         bytes_read=sum(layer.local_bytes() for layer in layers), check=(ours(x), theirs(), 0.05))
                del layers, forwards, cases
            empty_pools()


def empty_pools():
    cupy.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="which, with commas")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    require(set(names) <= set(ROWS), f"--rows {arguments.rows}", f"some of {','.join(ROWS)}")
    comm = MPI.COMM_WORLD

    def groups(**more):
        return mpitp.TensorParallelGroup(device="gpu", transport=arguments.transport, **more)
    with groups() as group:
        torch.cuda.set_device(group.gpu.number)
        torch.set_grad_enabled(False)
        if comm.size > 1:
            init_nccl(comm)
        rows = Rows(group, arguments.rounds)
        rows.measure_bandwidth()
        found = {"schema": "mpitp.benchmark.gpu/1", "command": f"mpirun -n {comm.size} python {' '.join(sys.argv)}",
                 "ranks": comm.size, "gpu": group.gpu.name, "transport": group.transport.name,
                 "transport_how": group.transport.how, "mpi": launch.library_name(), "torch": torch.__version__,
                 "cupy": cupy.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
                 "python": platform.python_version(), "rounds": arguments.rounds,
                 "copy_bytes_per_second": rows.bandwidth, "rows": rows.found}
        if comm.rank == 0:
            print(f"{found['command']}: {found['gpu']}, transport {found['transport']} ({found['transport_how']}), "
                  f"{found['mpi']}, CuPy {found['cupy']}, torch {found['torch']}, "
                  f"copy {rows.bandwidth / 1e12:.2f} TB/s")
        run = {"ffn": ffn_rows, "tokens": token_rows, "stack": stack_rows, "decoder": gpu_decoder.rows,
               "sums": gpu_sums.rows}
        for name in names:
            run[name](rows, groups)
            if arguments.json and comm.rank == 0:           # after each, should the time run out
                with open(arguments.json, "w", encoding="utf-8") as out:
                    json.dump(found, out, indent=1)
                    out.write("\n")
    if comm.size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(main))
