"""A rank that is slowed on purpose: does the timeline name it, its layer and its operation?

    mpirun -n 2 python tests/support/slow_ranks.py [--cases 10] [--seconds 0.05]
    mpirun -n 3 python tests/support/slow_ranks.py

Each case is a real run: training steps of a decoder of 3 layers, in which one rank sleeps in one operation of one
layer. The ranks take turns, and so do layers and operations. Prints what was named, and how many of the cases were
right; exits with 1 where one was not.
"""
import argparse
import sys
import time
from contextlib import contextmanager
from functools import wraps

import numpy as np

import mpitp
from mpitp.comm.guard import guarded
from mpitp.layers import attention, norm, products

LAYERS, STEPS = 3, 3
# Where an operation is called from, its name, the layer and the direction that it belongs to, and an array it is given.
PLACES = ((products, "linear_forward", "mlp", "forward", "down.weight"),
          (products, "two_linears_forward", "attention", "forward", "key.weight"),
          (norm, "norm_forward", "mlp_norm", "forward", "weight"),
          (products, "linear_backward", "mlp", "backward", "down.weight"),
          (attention, "rotary_forward", "attention", "forward", "cos"),
          (norm, "norm_backward", "attention_norm", "backward", "weight"))


def decoder(group):
    return mpitp.Decoder(group, mpitp.DecoderConfig(27, 24, LAYERS, 6))


def step(model, ids):
    logits, saved = model.forward(ids)
    loss, of_loss = model.loss(logits, ids)
    gradients = model.backward(model.loss_backward(of_loss), saved)
    return logits, loss, gradients


def case(number, ranks):
    """The rank, the layer, and the entry of PLACES of a case."""
    return number % ranks, number // ranks % LAYERS, PLACES[(number + number // len(PLACES)) % len(PLACES)]


def arrays_in(arguments):
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            yield argument
        elif isinstance(argument, tuple):
            yield from arrays_in(argument)


@contextmanager
def slowed(block, place, seconds):
    """Sleep in one operation of this block, wherever it is given the array that only this block has."""
    module, name, part, _, array = place
    layer = getattr(block, part, None) or block.norms[part]
    original = getattr(module, name)

    @wraps(original)                        # an operation still, to a timeline
    def slow(*args, **kwargs):
        own = layer.tables[0] if array == "cos" else layer.own[array]
        if any(np.shares_memory(own, found) for found in arrays_in(args)):
            time.sleep(seconds)
        return original(*args, **kwargs)

    setattr(module, name, slow)
    try:
        yield
    finally:
        setattr(module, name, original)


def run(group, model, number, seconds, steps=STEPS):
    """(the rank and the place that were slowed, the answer), on rank 0; run it on every rank."""
    rank, layer, place = case(number, group.size)
    ids = np.arange(24).reshape(2, 12) % 27
    step(model, ids)
    with slowed(model.blocks[layer], place, seconds if group.rank == rank else 0), mpitp.Timeline(group) as timeline:
        for _ in range(steps):
            step(model, ids)
    return (f"rank {rank} arrives last in ", f"layers.{layer}.{place[2]} {place[3]}: {place[1]};"), timeline.answer


def is_named(expected, answer):
    return answer.startswith(expected[0]) and f" in {expected[1]}" in answer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.05)
    arguments, right = parser.parse_args(), 0
    with mpitp.TensorParallelGroup() as group:
        model = decoder(group)
        for number in range(arguments.cases):
            expected, answer = run(group, model, number, arguments.seconds)
            right += is_named(expected, answer)
            if group.rank == 0:
                print(f"{'right' if is_named(expected, answer) else 'WRONG'}: {expected[1]} {answer}", flush=True)
        if group.rank == 0:
            print(f"{group.size} ranks: {right} of {arguments.cases} named, rank, layer and operation; "
                  f"{arguments.seconds} s of sleep", flush=True)
        return group.comm.bcast(0 if right == arguments.cases else 1)


if __name__ == "__main__":
    sys.exit(guarded(main))
