"""Two versions of mpitp in one process, pair after pair: is this one as fast as that one?

    git worktree add /tmp/before v0.1.0
    mpirun -n 2 python benchmarks/versions.py /tmp/before [--model GEMMA] [--device gpu] [--pairs 25] [--json FILE]

The other checkout's package is copied beside this one under the name `mpitp_before` (its imports are relative). Each
case is timed once a pair with either version, in turns; the ratio is the median of the ratios of the pairs.
"""
import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mpi4py import MPI

from mpitp.comm import launch

launch.set_blas_threads(MPI.COMM_WORLD)                     # before NumPy
launch.keep_freed_memory()

import numpy as np                                          # noqa: E402

import mpitp                                                # noqa: E402

BLOCK = dict(vocab_size=100, num_layers=1, num_attention_heads=8)
GEMMA = dict(vocab_size=262144, hidden_size=640, num_layers=18, num_attention_heads=4, num_query_groups=1,
             kv_channels=256, ffn_hidden_size=2048, gated=True, qk_norm=True, normalization="rmsnorm",
             norm_placement="both", zero_centered_gamma=True, qkv_bias=False, attention_bias=False, mlp_bias=False,
             tie_word_embeddings=True, norm_epsilon=1e-6)   # Gemma 3 270M's sizes, with weights that say nothing
CAPACITY = 64


class Version:
    """One version of the package, with a group and the cases that are timed: {name: (calls a time, function)}."""

    def __init__(self, package, device, dtype, model_folder):
        self.package, self.device, self.dtype, self.model_folder = package, device, dtype, model_folder
        self.group = package.TensorParallelGroup(device=device)
        self.xp = self.group.xp

    def draw(self, *shape):
        values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return self.xp.asarray(values).astype(self.layer.dtype)

    def cases(self):
        for tokens, hidden, calls in ((512, 2048, 1), (1, 2048, 20), (1, 256, 200)):
            self.layer = self.package.ParallelMLP(self.group, hidden, bias=False, dtype=self.dtype)
            yield from self.forward_and_both(f"feed-forward {hidden}, {tokens} tokens", (tokens, hidden), calls)
        for hidden in (512, 1024):
            config = self.package.DecoderConfig(hidden_size=hidden, **BLOCK)
            self.layer = self.package.ParallelBlock(self.group, config, dtype=self.dtype)
            yield from self.forward_and_both(f"decoder block {hidden}, 512 tokens", (1, 512, hidden), 1)
        if self.model_folder:
            yield f"a token of {Path(self.model_folder).name}", 3, self.token(
                self.package.load_model(self.model_folder, self.group, self.dtype))
        else:
            yield "a token of Gemma 3 270M's sizes", 3, self.token(self.made_up_gemma())

    def forward_and_both(self, name, shape, calls):
        layer, x, kept = self.layer, self.draw(*shape), {}

        def both():
            _, saved = layer.forward(x)
            _, kept["gradients"] = layer.backward(x, saved, out=kept.get("gradients"))
        yield f"{name}: forward", calls, lambda: layer.forward(x)
        yield f"{name}: both", calls, both

    def made_up_gemma(self):
        model = self.package.Decoder(self.group, self.package.DecoderConfig(**GEMMA), dtype=self.dtype, seed=None)
        for weight in model.weights.values():
            weight[...] = 0.01                              # zeros that nobody wrote lie in one page of memory
        return model

    def token(self, model):
        try:
            kv = importlib.import_module(f"{self.package.__name__}.inference.kv")
        except ImportError:                                 # where 0.1.0 had it
            kv = importlib.import_module(f"{self.package.__name__}.layers.kv")
        kv, ids = kv.KeyValues(model, 1, CAPACITY), np.array([[5]])

        def next_token():
            if kv.lengths[0] == CAPACITY:
                kv.set_lengths(np.zeros(1, np.int64))
            model.extend(ids, kv)
        return next_token

    def seconds(self, calls, function):
        """Of one call, the slowest rank's."""
        self.synchronise()
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronise()
        return MPI.COMM_WORLD.allreduce(time.perf_counter() - start, MPI.MAX) / calls

    def synchronise(self):
        if self.device == "gpu":
            self.xp.cuda.get_current_stream().synchronize()


def other_package(checkout):
    """The package of another checkout, imported as mpitp_before."""
    folder = MPI.COMM_WORLD.bcast(tempfile.mkdtemp() if MPI.COMM_WORLD.rank == 0 else None)
    if MPI.COMM_WORLD.rank == 0:
        shutil.copytree(Path(checkout) / "mpitp", Path(folder) / "mpitp_before")
    MPI.COMM_WORLD.Barrier()
    sys.path.insert(0, folder)
    package = importlib.import_module("mpitp_before")
    importlib.import_module("mpitp_before.comm.group")
    return package, folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="a checkout of the other version")
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--model", metavar="DIR", help="a checkpoint whose tokens are timed, in place of Gemma's sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="", help="the cases that have this in their names")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    package, folder = other_package(arguments.before)
    now, before = (Version(version, arguments.device, arguments.dtype, arguments.model) for version in (mpitp, package))
    rows = []
    for (name, calls, mine), (_, _, theirs) in zip(now.cases(), before.cases()):
        if arguments.only not in name:
            continue
        times, sides = {now: [], before: []}, [(now, mine), (before, theirs)]
        for version, function in sides * 2:                 # warm up
            version.seconds(calls, function)
        for pair in range(arguments.pairs):
            for version, function in sides if pair % 2 else sides[::-1]:
                times[version].append(version.seconds(calls, function))
        ratio = statistics.median(a / b for a, b in zip(times[now], times[before]))
        row = {"case": name, "now_ms": 1e3 * statistics.median(times[now]),
               "before_ms": 1e3 * statistics.median(times[before]), "ratio": ratio}
        rows.append(row)
        if now.group.rank == 0:
            print(f"{name:44s} {row['now_ms']:9.3f} ms, before {row['before_ms']:9.3f} ms, {ratio:.3f} of it",
                  flush=True)
    if now.group.rank == 0:
        shutil.rmtree(folder)
        if arguments.json:
            found = {"schema": "mpitp.versions/1", "machine": launch.machine(), "mpi": launch.library_name(),
                     "ranks": now.group.size, "device": arguments.device, "dtype": arguments.dtype,
                     "now": mpitp.__version__, "before": package.__version__, "pairs": arguments.pairs, "rows": rows}
            Path(arguments.json).write_text(json.dumps(found, indent=1) + os.linesep)
    for version in (now, before):
        version.group.close()


main()
