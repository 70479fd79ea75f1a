"""Times of things that all ranks do together: interleaved rounds, so that a machine that slows down slows all alike."""
import gc
import statistics
import time
from dataclasses import dataclass

import numpy as np

from ..layers.mlp import ParallelMLP
from ..ops.linear import linear_backward, linear_forward


@dataclass
class Timing:
    """Seconds of one call, the slowest rank's: median, least and most over the rounds."""
    median: float
    least: float
    most: float
    rounds: int


def interleave(group, cases, rounds, least_seconds=0.0):
    """Time each of {name: function} once a round, A B C A B C ...; {name: [seconds of the slowest rank]} on every rank.

    least_seconds : a faster function is called several times a round, and the mean counts
    """
    repeats = {}
    for name, function in cases.items():            # warm up, and find out how often to call
        function()
        start = time.perf_counter()
        function()
        repeats[name] = max(1, round(least_seconds / max(1e-9, time.perf_counter() - start)))
    repeats = group.comm.bcast(repeats)
    seconds = {name: [] for name in cases}
    gc.disable()
    for _ in range(rounds):
        for name, function in cases.items():
            group.comm.Barrier()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    gc.enable()
    of_ranks = group.comm.allgather(seconds)
    return {name: [max(times) for times in zip(*(rank[name] for rank in of_ranks))] for name in cases}


def timing(seconds):
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def ratio(seconds, base):
    """Median over the rounds of one case's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, base))


def mlp_cases(group, tokens, hidden, ffn, activation="gelu_tanh", dtype="float32", prefix=""):
    """{"forward", "forward+backward"} of a ParallelMLP without bias; gradients go into the same buffers again."""
    layer = ParallelMLP(group, hidden, ffn, activation, bias=False, dtype=dtype)
    x, dy = (np.random.default_rng(seed).standard_normal((tokens, hidden)).astype(dtype) for seed in (1, 2))
    gradients = layer.backward(dy, layer.forward(x)[1])[1]

    def both():
        _, saved = layer.forward(x)
        layer.backward(dy, saved, out=gradients)

    return {f"{prefix}forward": lambda: layer.forward(x, saved=False), f"{prefix}forward+backward": both}, layer


def product_cases(group, tokens, hidden, ffn, dtype="float32"):
    """The bare matrix products of one rank's share, nothing else: the limit of what the block can reach.

    Operands are distinct buffers: one buffer as both operands would take the slower syrk kernel.
    """
    part = group.partition(ffn).lengths[group.rank]
    draw = np.random.default_rng(3).standard_normal
    x, dy = draw((tokens, hidden)).astype(dtype), draw((tokens, hidden)).astype(dtype)
    h, dh = draw((tokens, part)).astype(dtype), draw((tokens, part)).astype(dtype)
    up, down = draw((part, hidden)).astype(dtype), draw((hidden, part)).astype(dtype)
    dup, ddown = np.empty_like(up), np.empty_like(down)

    def forward():
        linear_forward(x, up)
        linear_forward(h, down)

    def both():
        forward()
        linear_backward(dy, (h, down), ddown)
        linear_backward(dh, (x, up), dup)

    return {"products forward": forward, "products forward+backward": both}


def read_case(group, hidden, ffn, dtype="float32"):
    """A plain read of one rank's two weights by BLAS dot products of 1 MiB, the fastest reader that NumPy has."""
    part = group.partition(ffn).lengths[group.rank]
    data = np.ones(2 * part * hidden, dtype)
    other = np.ones(1 << 12, dtype)                 # stays in the first-level cache
    rows = data[:data.size // other.size * other.size].reshape(-1, other.size)
    return {"read": lambda: rows @ other}


def flops(tokens, hidden, ffn, backward):
    """Of the products of all ranks: 2 a multiply-add, two products forward, four more backward."""
    return 2 * tokens * hidden * ffn * (6 if backward else 2)
