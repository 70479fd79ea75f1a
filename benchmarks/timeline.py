"""What recording a timeline costs: steps with it and without it, in turn, in one process a rank.

    OMP_NUM_THREADS=1 mpirun -n 2 python benchmarks/timeline.py [--rounds 15] [--out benchmarks/results]

Rows: a training step of a decoder of 4 layers of 512, 256 tokens; and a token of generation of the same decoder. The
ratio is that of a round with to the round without beside it, the median of all; time of the slowest rank. The ratio of
processor time is that of a busy machine, where other programs take the rest.
"""
import argparse
import json
import time

import numpy as np

import mpitp
from mpitp.comm import launch
from mpitp.inference.kv import KeyValues

CONFIG = mpitp.DecoderConfig(4096, 512, 4, 8, max_position_embeddings=512)
STEPS, TOKENS = 2, 40           # of a round


def train(model, ids, kept):
    for _ in range(STEPS):
        logits, saved = model.forward(ids)
        _, of_loss = model.loss(logits, ids)
        kept[0] = model.backward(model.loss_backward(of_loss), saved, out=kept[0])


def decode(model, kv):
    kv.set_lengths([16])
    for token in range(TOKENS):
        model.extend(np.full((1, 1), token), kv)


def seconds(comm, function):
    """(seconds, seconds of the processor) of the slowest rank."""
    comm.Barrier()
    start, of_processor = time.perf_counter(), time.process_time()
    function()
    found = comm.allgather((time.perf_counter() - start, time.process_time() - of_processor))
    return tuple(map(max, zip(*found)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("training step", "token"))
    parser.add_argument("--out", metavar="DIR")
    arguments = parser.parse_args()
    launch.keep_freed_memory()                          # as python -m mpitp does
    with mpitp.TensorParallelGroup() as group:
        model, kept = mpitp.Decoder(group, CONFIG), [None]
        ids, kv = np.arange(256).reshape(1, 256), KeyValues(model, 1, 128)
        rows = {"training step": lambda: train(model, ids, kept), "token": lambda: decode(model, kv)}
        found = {"cores a rank": launch.cores(), "machine": launch.machine(), "mpi": launch.library_name()}
        for name, function in rows.items():
            if arguments.only not in (None, name):
                continue
            function()
            without, recorded, spans = [], [], 0
            for number in range(arguments.rounds):
                for with_it in (number % 2, 1 - number % 2):
                    if with_it:
                        with mpitp.Timeline(group) as timeline:
                            recorded.append(seconds(group.comm, function))
                        spans = len(timeline.spans.found)
                    else:
                        without.append(seconds(group.comm, function))
            each = STEPS if name == "training step" else TOKENS
            ratio, of_processor = np.median(np.array(recorded) / np.array(without), axis=0)
            found[name] = {"seconds": float(np.median(without, axis=0)[0]) / each, "spans": spans / each,
                           "ratio": float(ratio), "processor_ratio": float(of_processor)}
            if group.rank == 0:
                row = found[name]
                print(f"{name:14} {row['seconds'] * 1e3:8.2f} ms, {row['spans']:.0f} spans: with a timeline "
                      f"{row['ratio']:.3f} of that, {row['processor_ratio']:.3f} of the processor's time", flush=True)
        if group.rank == 0 and arguments.out:
            with open(f"{arguments.out}/timeline-n{group.size}.json", "w") as file:
                json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
