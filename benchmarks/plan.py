"""The plan's times against measured ones: is what `plan` says of this machine true?

    env -u OPENBLAS_CORETYPE mpirun -n 1 python benchmarks/plan.py [--rounds 5] [--seconds S] [--out FOLDER]
    env -u OPENBLAS_CORETYPE mpirun -n 2 python benchmarks/plan.py
    mpirun -n 2 python benchmarks/plan.py --device gpu [--dtype bfloat16]
    mpirun -n 3 -hosts a,b,c python benchmarks/plan.py --few        # a rank on each host

Feed-forward blocks, decoder blocks, tokens and training steps of many sizes are timed, and between every two of them a
part of what `bench --calibrate` measures, so that a machine that slows down slows both. The medians of the rounds are
compared. An error is |planned - measured| / measured. Exits with 1 where the median error is above 10%, or the 90th
percentile above 25%; on GPUs and over several hosts, where the median error is above 15%.
"""
import argparse
import itertools
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
from mpitp.arrays import compute_dtype              # noqa: E402
from mpitp.comm.guard import guarded                # noqa: E402
from mpitp.layers.block import ParallelBlock        # noqa: E402
from mpitp.measure.block import block_config        # noqa: E402
from mpitp.measure.calibrate import Calibration     # noqa: E402
from mpitp.measure.calibrate_python import Tiny     # noqa: E402
from mpitp.measure.decode import Decode             # noqa: E402
from mpitp.measure.feed_forward import LayerCases   # noqa: E402
from mpitp.measure.timed_cases import Sizes         # noqa: E402
from mpitp.measure.timers import timer_of           # noqa: E402
from mpitp.plan.job import Job, Layout              # noqa: E402
from mpitp.plan.layer_work import block_bytes, block_work, mlp_bytes, mlp_work      # noqa: E402
from mpitp.plan.machine_file import write_machine   # noqa: E402
from mpitp.plan.outcome import memory, parts_of_time        # noqa: E402
from mpitp.plan.work import work, working_bytes     # noqa: E402
from mpitp.training.data import Tokens              # noqa: E402
from mpitp.training.loop import Settings, Trainer   # noqa: E402

FFN = ((256, 1), (256, 16), (256, 128), (256, 1024), (512, 1), (512, 128), (512, 1024), (1024, 1), (1024, 16),
       (1024, 512), (2048, 1), (2048, 128), (2048, 512), (4096, 1), (4096, 64))             # hidden size, tokens
BLOCKS = ((256, 1), (256, 64), (256, 1024), (512, 128), (512, 512), (1024, 1), (1024, 256), (2048, 128), (4096, 16))
DECODES = ((256, 128), (512, 128), (512, 1024), (1024, 128), (2048, 128))                   # behind so many tokens
STEPS = ((256, 4, 16, 128), (256, 2, 4, 64), (512, 2, 2, 128), (1024, 1, 1, 128))   # hidden, layers, batch, tokens
ALL = {"ffn": FFN, "block": BLOCKS, "decode": DECODES, "train": STEPS}
# Of several hosts: what a slow network and a processor that ranks share can do in minutes.
FEW = {"ffn": ((256, 1), (256, 128), (512, 1), (512, 128), (1024, 16)), "block": ((256, 1), (256, 64), (512, 128)),
       "decode": ((256, 128), (512, 128)), "train": ((256, 2, 4, 64),)}
CALIBRATED_FOR_FEW = Sizes(rows=(1, 2, 16, 64, 128, 256), tokens=(16, 64, 256), features=(16, 64), keys=(4, 64, 1024),
                           elements=(64, 1 << 12, 1 << 16, 1 << 19), reads=tuple(1 << n for n in range(16, 27, 2)),
                           messages=tuple(8 ** n for n in range(1, 8)))
LARGE = {"ffn": ((1024, 1), (1024, 128), (1024, 1024), (4096, 1), (4096, 16), (4096, 512), (8192, 1), (8192, 128)),
         "block": ((1024, 64), (1024, 1024), (2048, 256), (4096, 16), (4096, 512)),
         "decode": ((512, 128), (1024, 128), (2048, 1024), (4096, 128)),
         "train": ((512, 2, 8, 128), (1024, 4, 8, 256), (2048, 2, 4, 512), (4096, 1, 1, 512))}      # of GPUs
# The second of the training steps again, with less kept.
MODES = {"block recomputed": dict(recompute="block"), "rows": dict(sequence_parallel=True)}
LEAST_SECONDS = 0.02        # that a case is repeated for in a round
MEDIAN, PERCENTILE_90, MEDIAN_ELSEWHERE = 0.10, 0.25, 0.15


def filled(layer):
    """A layer whose weights lie in memory; those of zeros may be one page of it, and take less power."""
    numbers = 0.02 * np.random.default_rng(2).standard_normal(1 << 20).astype("f")
    for w in layer.weights.values():
        if layer.group.device == "cpu":
            w[...] = 0.01
        else:
            w.set(np.resize(numbers, w.shape).astype(w.dtype))
    return layer


class Cases:
    """What is timed on a group: each method yields (name, case, items, bytes that the case works on)."""

    def __init__(self, group, dtype):
        self.group, self.dtype = group, dtype
        self.itemsize = compute_dtype(dtype, group.device).itemsize

    def layer_cases(self, layer, *shape):
        generator, dtype = np.random.default_rng(1), compute_dtype(self.dtype, self.group.device)
        x, dy = (self.group.xp.asarray(generator.standard_normal(shape).astype(dtype)) for _ in range(2))
        return LayerCases(filled(layer), x, dy)

    def ffn(self, hidden, tokens):
        layer = mpitp.ParallelMLP(self.group, hidden, 4 * hidden, bias=False, seed=None, dtype=self.dtype)
        cases = self.layer_cases(layer, tokens, hidden)
        for name, case in (("forward", cases.forward), ("forward+backward", cases.forward_backward)):
            sizes = tokens, hidden, 4 * hidden, self.group.size, name != "forward"
            yield name, case, mlp_work(*sizes, self.dtype), mlp_bytes(*sizes, self.itemsize)

    def block(self, hidden, tokens):
        layer = ParallelBlock(self.group, block_config(hidden), seed=None, dtype=self.dtype)
        cases = self.layer_cases(layer, 1, tokens, hidden)
        for name, case in (("forward", cases.forward), ("forward+backward", cases.forward_backward)):
            sizes = block_config(hidden), tokens, self.group.size, name != "forward"
            yield name, case, block_work(*sizes, self.dtype), block_bytes(*sizes, self.itemsize)

    def decode(self, hidden, tokens):
        config = llama(hidden, 2, 8192)
        job, layout = Job(config, "decode", 1, tokens, 2, dtype=self.dtype, device=self.group.device), \
            Layout(self.group.size)
        items = [item for item in work(job, layout, "token") if item.what not in ("greatest", "all_gather")]
        model = filled(mpitp.Decoder(self.group, config, seed=None, dtype=self.dtype))
        yield "token", Decode(model, tokens).run, items, working_bytes(job, layout, "token")      # extend() alone

    def train(self, hidden, layers, batch, tokens):
        config = llama(hidden, layers, 256)
        again = MODES if (hidden, layers, batch, tokens) == STEPS[1] else {}
        for name, mode in {"": {}, **again}.items():
            job, layout = Job(config, "train", batch, tokens, dtype=self.dtype, device=self.group.device, **mode), \
                Layout(self.group.size)
            trainer = Trainer(self.group, config, Tokens(None, 256, tokens, 0), Settings(
                micro_batch_size=batch, train_iters=1 << 30, **mode), dtype=self.dtype)
            yield ", ".join(filter(None, ("training step", name))), trainer.train_step, \
                work(job, layout, "step"), working_bytes(job, layout, "step")


def llama(hidden, layers, vocabulary):
    return mpitp.DecoderConfig(vocabulary, hidden, layers, 8, normalization="rmsnorm", activation="silu", gated=True,
                               qkv_bias=False, attention_bias=False, mlp_bias=False, tie_word_embeddings=True)


def seconds_of(group, timer, case):
    """The time of one call on the slowest rank."""
    case()
    repeats = max(1, int(LEAST_SECONDS / group.comm.bcast(timer.walls(case, 1))))
    group.comm.Barrier()
    return max(group.comm.allgather(timer.walls(case, repeats)))


class Interleaved:
    """A calibration, of which a part is measured between every two cases.

    Parameters
    ----------
    group, dtype
    cases : int
        Of a round.
    calibrated : Sizes or None
        As Calibration has them.
    """

    def __init__(self, group, dtype, cases, calibrated):
        self.calibration = Calibration(group, dtype, calibrated)
        self.tiny = Tiny(self.calibration)
        self.points = sum(1 for _ in self.calibration.cases()) + len(self.tiny.cases)
        self.part, self.waiting = -(-self.points // cases), iter(())

    def begin_round(self):
        self.finish_round()
        self.waiting = itertools.chain(self.calibration.cases(), self.tiny.points())

    def next_part(self):
        for point, case in itertools.islice(self.waiting, self.part):
            self.calibration.time(point, case, walls=point[0] == "python")

    def finish_round(self):
        for point, case in self.waiting:
            self.calibration.time(point, case, walls=point[0] == "python")

    def machine(self):
        return self.calibration.machine(self.tiny.seconds())


def measure(group, dtype, sizes, rounds, seconds):
    """The machine, {(kind, size, name): ([seconds of each round], items, bytes worked on)}, and the rounds."""
    start, found, made = time.perf_counter(), {}, Cases(group, dtype)
    timer = timer_of(group)
    interleaved = Interleaved(group, dtype, sum(map(len, sizes.values())), CALIBRATED_FOR_FEW if sizes is FEW else None)
    for number in range(rounds):
        before = time.perf_counter()
        interleaved.begin_round()
        for kind, size in ((kind, size) for kind, of_kind in sizes.items() for size in of_kind):
            interleaved.next_part()
            for name, case, items, working in getattr(made, kind)(*size):
                row = found.setdefault((kind, size, name), ([], items, working))
                row[0].append(seconds_of(group, timer, case))
        interleaved.finish_round()
        now = time.perf_counter()
        if group.rank == 0:
            print(f"round {number + 1} of {rounds}, {now - start:.0f} s", file=sys.stderr, flush=True)
        if group.comm.bcast(seconds and now - start + now - before > seconds):
            break
    return interleaved.machine(), found, number + 1


def compare(machine, found, dtype):
    """[{kind, size, case, measured, planned, error}]."""
    rows, itemsize = [], compute_dtype(dtype, machine.device).itemsize
    for (kind, size, name), (times, items, working) in found.items():
        measured = statistics.median(times)
        parts = parts_of_time(machine, items, dtype, itemsize, working, name == "token")
        planned = sum(parts.values())
        rows.append({"kind": kind, "size": list(size), "case": name, "measured_seconds": measured,
                     "planned_seconds": planned, "error": abs(planned - measured) / measured,
                     "spread": max(times) / min(times),
                     "planned_seconds_of": {part: seconds for part, seconds in parts.items() if seconds}})
    return rows


def show(rows, group, machine, rounds):
    """Print the rows; return (median error, 90th percentile, whether they are as they should be)."""
    errors = sorted(row["error"] for row in rows)
    median, ninety = statistics.median(errors), errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    print("\n".join(tables.table(
        ("", "sizes", "case", "measured", "planned", "planned / measured", "slowest / fastest round"),
        [(row["kind"], "x".join(map(str, row["size"])), row["case"], tables.seconds(row["measured_seconds"]),
          tables.seconds(row["planned_seconds"]), f"{row['planned_seconds'] / row['measured_seconds']:.2f}",
          f"{row['spread']:.2f}") for row in rows])))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        print(f"  {kind}: median error {statistics.median(row['error'] for row in rows if row['kind'] == kind):.1%}")
    hosts = machine.hosts(group.size)
    print(f"{tables.count(group.size, 'rank')} on {tables.count(hosts, 'host')}, {machine.source}, "
          f"{launch.library_name()}; {tables.count(rounds, 'round')}")
    print(f"{len(rows)} configurations: median error {median:.1%}, 90th percentile {ninety:.1%}, largest "
          f"{errors[-1]:.1%}", flush=True)
    return median, ninety, median <= MEDIAN_ELSEWHERE if hosts > 1 or group.device == "gpu" else \
        median <= MEDIAN and ninety <= PERCENTILE_90


def write(folder, group, machine, rows, rounds, dtype, errors):
    """Write what was found, and the machine as it was calibrated."""
    os.makedirs(folder, exist_ok=True)
    hosts = machine.hosts(group.size)
    name = f"{'gpu-' if group.device == 'gpu' else ''}n{group.size}{f'-hosts{hosts}' if hosts > 1 else ''}" \
           f"{'' if dtype == 'float32' else f'-{dtype}'}"
    write_machine(os.path.join(folder, f"machine-{name}.json"), machine, dtype)
    with open(os.path.join(folder, f"plan-{name}.json"), "w", encoding="utf-8") as out:
        json.dump({"schema": "mpitp.benchmark.plan/1", "ranks": group.size, "hosts": hosts, "device": group.device,
                   "dtype": dtype, "transport": group.transport.name, "machine": machine.source,
                   "mpi": launch.library_name(), "rounds": rounds, "median_error": errors[0],
                   "percentile_90": errors[1], "rows": rows}, out, indent=1)
        out.write("\n")


def peaks_of_gpu(group, dtype, sizes):
    """Print what a training step has at most of the GPU's memory, by the pool's own record, beside the plan."""
    class Record(group.xp.cuda.MemoryHook):
        name, used, most = "record", 0, 0

        def malloc_postprocess(self, **of):
            self.used += of["mem_size"]
            self.most = max(self.most, self.used)

        def free_postprocess(self, **of):
            self.used -= of["mem_size"]

    for hidden, layers, batch, tokens in sizes:
        config = llama(hidden, layers, 256)
        job = Job(config, "train", batch, tokens, dtype=dtype, device="gpu")
        planned = memory(job, Layout(group.size))[1][group.rank]
        with Record() as record:
            trainer = Trainer(group, config, Tokens(None, 256, tokens, 0),
                              Settings(micro_batch_size=batch, train_iters=1 << 30), dtype=dtype)
            for _ in range(2):
                trainer.train_step()
            del trainer
        if group.rank == 0:
            print(f"memory of a training step, {hidden}x{layers}x{batch}x{tokens}: {tables.size(record.most)} "
                  f"measured, {tables.size(planned)} planned, {planned / record.most:.3f} of it", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0, help="no round begins that would end later (no limit)")
    parser.add_argument("--device", default="cpu", help="cpu or gpu")
    parser.add_argument("--transport", default="auto", help="between GPUs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--few", action="store_true", help="the smaller configurations alone, as on a slow network")
    parser.add_argument("--out", metavar="FOLDER")
    arguments = parser.parse_args()
    sizes = FEW if arguments.few else LARGE if arguments.device == "gpu" else ALL
    with mpitp.TensorParallelGroup(device=arguments.device, transport=arguments.transport) as group:
        machine, found, rounds = measure(group, arguments.dtype, sizes, arguments.rounds, arguments.seconds)
        good = True
        if group.rank == 0:
            rows = compare(machine, found, arguments.dtype)
            *errors, good = show(rows, group, machine, rounds)
            if arguments.out:
                write(arguments.out, group, machine, rows, rounds, arguments.dtype, errors)
        if hasattr(group.xp, "cuda") and hasattr(group.xp.cuda, "MemoryHook"):
            peaks_of_gpu(group, arguments.dtype, sizes["train"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
