"""Dropout from numbers with an address: which elements drop does not depend on who holds them.

Element i of an array, in C order of its global shape, drops where word i of the stream of (seed, name, step) says
so. Every rank draws the part that it holds: the same mask on any number of ranks, and another at every position.
"""
import math

import numpy as np

from ..sharding.rng import key, words
from .twin import cuda_twin

PIECE = 1 << 15     # words at a time: the temporaries stay in cache
NEAR = 1 << 11      # to draw so many words and not use them is as fast as to start a stream anew (measured)


@cuda_twin(by="xp")
def dropout_scale(seed, name, step, probability, shape, window, dtype, xp=np):
    """0 where an element drops, 1 / (1 - probability) elsewhere; multiply by it in forward and in backward.

    Element i drops where (word i of the Philox stream of key(seed, f"{name}/{step}")) >> 11 < probability * 2^53.

    Parameters
    ----------
    seed, name, step : address of the stream, such as (0, "layers.3.mlp.dropout", 17)
    probability : from 0 to below 1
    shape : of the whole array
    window : tuple of a slice or an int for each axis of `shape`: the part that is asked for. As in indexing, an int
        drops its axis.

    Returns
    -------
    scale : array of the window's shape and `dtype`, of the module `xp`
    """
    shape = tuple(map(int, shape))              # NumPy's integers would overflow
    ends = [at.indices(n)[:2] if isinstance(at, slice) else (int(at), int(at) + 1) for at, n in zip(window, shape)]
    lengths = [max(0, stop - start) for start, stop in ends]
    out = np.empty([n for n, at in zip(lengths, window) if isinstance(at, slice)], dtype)
    if out.size:
        limit = np.uint64(math.ceil(probability * 2 ** 53) << 11)       # word >> 11 < p 2^53, in one comparison
        keep = np.asarray(1 / (1 - probability), dtype)
        stream = key(seed, f"{name}/{step}")
        for first, pitch, runs in runs_of(shape, ends, lengths, out.reshape(-1)):
            drawn = words(stream, first, first + pitch * len(runs)).reshape(len(runs), pitch)[:, :runs.shape[1]]
            np.multiply(drawn >= limit, keep, out=runs)
    return out


def runs_of(shape, ends, lengths, flat):
    """Where the window lies in the stream: yield (first word, pitch, runs), runs (count, length) a part of `flat`.

    A run is a stretch of the window that follows itself in the global array: the axes at the end that are whole,
    and the one before them. Runs that lie near each other, `pitch` words apart, are drawn together with what lies
    between; long runs are cut.
    """
    split = len(shape)
    while split > 1 and lengths[split - 1] == shape[split - 1]:
        split -= 1
    split = max(split - 1, 0)                   # axes split.. make one run
    strides = [math.prod(shape[axis + 1:]) for axis in range(len(shape))]
    run = math.prod(lengths[split:])
    near = split > 0 and strides[split - 1] - run <= NEAR
    outer = split - 1 if near else split        # axes before it are walked one by one
    pitch, count = (strides[split - 1], lengths[split - 1]) if near else (run, 1)
    base = sum(start * stride for (start, _), stride in zip(ends, strides))
    for number, index in enumerate(np.ndindex(*lengths[:outer])):
        first = base + sum(i * stride for i, stride in zip(index, strides))
        runs = flat[number * count * run:(number + 1) * count * run].reshape(count, run)
        step = max(1, PIECE // pitch)
        for row in range(0, count, step):
            for at in range(0, run, PIECE):
                part = runs[row:row + step, at:at + PIECE]
                yield first + row * pitch + at, pitch if len(part) > 1 else part.shape[1], part
