"""The plan's times against measured ones: is what `plan` says of this machine true?

    env -u OPENBLAS_CORETYPE mpirun -n 1 python benchmarks/plan.py [--rounds 3] [--out FOLDER]
    env -u OPENBLAS_CORETYPE mpirun -n 2 python benchmarks/plan.py

Each round calibrates the machine, as `bench --calibrate` does, and then times feed-forward blocks, decoder blocks,
tokens and training steps of many sizes, so that a machine that slows down slows both. The medians of the rounds are
compared. An error is |planned - measured| / measured. Exits with 1 where the median error is above 10%, or the 90th
percentile above 25%.
"""
import argparse
import json
import os
import statistics
import sys
import time

from mpi4py import MPI

from mpitp.comm import launch

launch.set_blas_threads(MPI.COMM_WORLD)             # before NumPy
launch.keep_freed_memory()                          # as python -m mpitp does

import numpy as np                                  # noqa: E402

import mpitp                                        # noqa: E402
from mpitp import tables                            # noqa: E402
from mpitp.comm.guard import guarded                # noqa: E402
from mpitp.layers.block import ParallelBlock        # noqa: E402
from mpitp.measure.block import block_config        # noqa: E402
from mpitp.measure.calibrate import Calibration     # noqa: E402
from mpitp.measure.calibrate_python import Tiny     # noqa: E402
from mpitp.measure.decode import Decode             # noqa: E402
from mpitp.measure.feed_forward import LayerCases   # noqa: E402
from mpitp.plan.job import Job, Layout              # noqa: E402
from mpitp.plan.layer_work import block_bytes, block_work, mlp_bytes, mlp_work      # noqa: E402
from mpitp.plan.work import work, working_bytes        # noqa: E402
from mpitp.training.data import Tokens              # noqa: E402
from mpitp.training.loop import Settings, Trainer   # noqa: E402

FFN = ((256, 1), (256, 16), (256, 128), (256, 1024), (512, 1), (512, 128), (512, 1024), (1024, 1), (1024, 16),
       (1024, 512), (2048, 1), (2048, 128), (2048, 512), (4096, 1), (4096, 64))             # hidden size, tokens
BLOCKS = ((256, 1), (256, 64), (256, 1024), (512, 128), (512, 512), (1024, 1), (1024, 256), (2048, 128), (4096, 16))
DECODES = ((256, 128), (512, 128), (512, 1024), (1024, 128), (2048, 128))                   # behind so many tokens
STEPS = ((256, 4, 16, 128), (256, 2, 4, 64), (512, 2, 2, 128), (1024, 1, 1, 128))   # hidden, layers, batch, tokens
# The second of these again, with less kept.
MODES = {"block recomputed": dict(recompute="block"), "rows": dict(sequence_parallel=True)}
LEAST_SECONDS = 0.02        # that a case is repeated for in a round
MEDIAN, PERCENTILE_90 = 0.10, 0.25


def filled(layer):
    """A layer whose weights lie in memory; those of zeros may be one page of it."""
    for w in layer.weights.values():
        w[...] = 0.01
    return layer


def layer_cases(layer, tokens, hidden, shape):
    generator = np.random.default_rng(1)
    x, dy = (generator.standard_normal(shape(tokens, hidden)).astype("f") for _ in range(2))
    return LayerCases(filled(layer), x, dy)


def feed_forward(group, hidden, tokens):
    """Yield (name, case, items, bytes that the case works on)."""
    layer = mpitp.ParallelMLP(group, hidden, 4 * hidden, bias=False, seed=None)
    cases = layer_cases(layer, tokens, hidden, lambda tokens, hidden: (tokens, hidden))
    for name, case in (("forward", cases.forward), ("forward+backward", cases.forward_backward)):
        sizes = tokens, hidden, 4 * hidden, group.size, name != "forward"
        yield name, case, mlp_work(*sizes), mlp_bytes(*sizes)


def block(group, hidden, tokens):
    layer = ParallelBlock(group, block_config(hidden), seed=None)
    cases = layer_cases(layer, tokens, hidden, lambda tokens, hidden: (1, tokens, hidden))
    for name, case in (("forward", cases.forward), ("forward+backward", cases.forward_backward)):
        sizes = block_config(hidden), tokens, group.size, name != "forward"
        yield name, case, block_work(*sizes), block_bytes(*sizes)


def llama(hidden, layers, vocabulary):
    return mpitp.DecoderConfig(vocabulary, hidden, layers, 8, normalization="rmsnorm", activation="silu", gated=True,
                               qkv_bias=False, attention_bias=False, mlp_bias=False, tie_word_embeddings=True)


def decode(group, hidden, tokens):
    config = llama(hidden, 2, 8192)
    job = Job(config, "decode", 1, tokens, 2)
    items = [item for item in work(job, Layout(group.size), "token")
             if item.what not in ("greatest", "all_gather")]        # extend() alone
    yield "token", Decode(filled(mpitp.Decoder(group, config, seed=None)), tokens).run, items, \
        working_bytes(job, Layout(group.size), "token")


def step(group, hidden, layers, batch, tokens):
    config = llama(hidden, layers, 256)
    for name, mode in {"": {}, **(MODES if (hidden, layers, batch, tokens) == STEPS[1] else {})}.items():
        job = Job(config, "train", batch, tokens, **mode)
        trainer = Trainer(group, config, Tokens(None, 256, tokens, 0),
                          Settings(micro_batch_size=batch, train_iters=1 << 30, **mode))
        yield ", ".join(filter(None, ("training step", name))), trainer.train_step, \
            work(job, Layout(group.size), "step"), working_bytes(job, Layout(group.size), "step")


def cases(group):
    """Yield (kind, sizes, what makes the cases); the arrays of one lie in memory at a time."""
    for kind, make, sizes in (("ffn", feed_forward, FFN), ("block", block, BLOCKS), ("decode", decode, DECODES),
                              ("train", step, STEPS)):
        for size in sizes:
            yield kind, size, lambda make=make, size=size: make(group, *size)


def seconds_of(group, case):
    """The time of one call on the slowest rank."""
    case()
    start = time.perf_counter()
    case()
    repeats = group.comm.bcast(max(1, int(LEAST_SECONDS / (time.perf_counter() - start))))
    group.comm.Barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        case()
    return max(group.comm.allgather((time.perf_counter() - start) / repeats))


def measure(group, rounds):
    """The machine, and {(kind, size, name): ([seconds of each round], items, bytes worked on)}."""
    calibration, found = Calibration(group), {}
    tiny = Tiny(calibration)
    for number in range(rounds):
        calibration.run_pass()
        tiny.run_pass()
        for kind, size, make in cases(group):
            for name, case, items, working in make():
                row = found.setdefault((kind, size, name), ([], items, working))
                row[0].append(seconds_of(group, case))
        if group.rank == 0:
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return calibration.machine(tiny.seconds()), found


def compare(machine, found):
    """[{kind, size, case, measured, planned, error}]."""
    rows = []
    for (kind, size, name), (times, items, working) in found.items():
        measured = statistics.median(times)
        planned = sum(machine.seconds(item, "float32", 4, working) for item in items)
        rows.append({"kind": kind, "size": list(size), "case": name, "measured_seconds": measured,
                     "planned_seconds": planned, "error": abs(planned - measured) / measured,
                     "spread": max(times) / min(times)})
    return rows


def show(rows, group):
    errors = sorted(row["error"] for row in rows)
    median, ninety = statistics.median(errors), errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    print("\n".join(tables.table(
        ("", "sizes", "case", "measured", "planned", "planned / measured", "slowest / fastest round"),
        [(row["kind"], "x".join(map(str, row["size"])), row["case"], tables.seconds(row["measured_seconds"]),
          tables.seconds(row["planned_seconds"]), f"{row['planned_seconds'] / row['measured_seconds']:.2f}",
          f"{row['spread']:.2f}") for row in rows])))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        print(f"  {kind}: median error {statistics.median(row['error'] for row in rows if row['kind'] == kind):.1%}")
    print(f"{tables.count(group.size, 'rank')}, {launch.machine()}, {launch.library_name()}")
    print(f"{len(rows)} configurations: median error {median:.1%}, 90th percentile {ninety:.1%}, largest "
          f"{errors[-1]:.1%}", flush=True)
    return median <= MEDIAN and ninety <= PERCENTILE_90


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    with mpitp.TensorParallelGroup() as group:
        machine, found = measure(group, arguments.rounds)
        good = True
        if group.rank == 0:
            rows = compare(machine, found)
            good = show(rows, group)
            if arguments.out:
                os.makedirs(arguments.out, exist_ok=True)
                with open(os.path.join(arguments.out, f"plan-n{group.size}.json"), "w", encoding="utf-8") as out:
                    json.dump({"schema": "mpitp.benchmark.plan/1", "ranks": group.size, "machine": launch.machine(),
                               "mpi": launch.library_name(), "rounds": arguments.rounds, "rows": rows}, out, indent=1)
                    out.write("\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
