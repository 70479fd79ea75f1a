"""Dropout from addressed random numbers: which elements drop does not depend on who holds them.

Whether element i of an array drops, in C order of its global shape, depends on word i of the stream of (seed, name,
step). Every rank draws the part that it holds: together they have the same mask on any number of ranks.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import Array
from ..sharding.rng import key, words
from .twin import cuda_twin

PIECE = 1 << 15     # words at a time: the temporaries stay in cache
NEAR = 1 << 11      # to draw so many words in vain takes as long as to start a stream anew (measured)


@dataclass(frozen=True)
class PartOfStep:
    """Some sequences of a step's micro-batch, which drop what they drop in the whole of it.

    Parameters
    ----------
    number : int
        Of the step.
    first, own : int
        The sequences first..first + own - 1 of the micro-batch.
    sequences : int
        How many the whole micro-batch has.
    """
    number: int
    first: int
    own: int
    sequences: int


def in_step(step: int | PartOfStep, shape: Sequence[int], window: Sequence[slice | int]
            ) -> tuple[int, tuple[int, ...], tuple[slice | int, ...]]:
    """Return the number of a step, and shape and window in the whole micro-batch, whose sequences are along axis 0."""
    shape = tuple(map(int, shape))              # NumPy's integers would overflow
    if not isinstance(step, PartOfStep):
        return step, shape, tuple(window)
    rows, at = shape[0] // step.own, window[0]
    first = rows * step.first
    start, stop = at.indices(shape[0])[:2] if isinstance(at, slice) else (int(at), 0)
    moved = slice(first + start, first + stop) if isinstance(at, slice) else first + start
    return step.number, (rows * step.sequences, *shape[1:]), (moved, *window[1:])


@cuda_twin(by="xp")
def dropout_scale(seed: int, name: str, step: int | PartOfStep, probability: float, shape: Sequence[int],
                  window: Sequence[slice | int], dtype: DTypeLike, xp: ModuleType = np) -> Array:
    """Draw what dropout multiplies by, forward and backward: 0 where an element drops, else 1 / (1 - probability).

    Element i drops where (word i of the Philox stream of key(seed, f"{name}/{step}")) >> 11 < probability * 2^53.

    Parameters
    ----------
    seed, name, step : int, str, int
        The address of the stream, such as 0, "layers.3.mlp.dropout", 17; or a PartOfStep.
    probability : float
        From 0 to below 1.
    shape : sequence of int
        Of the whole array.
    window : sequence of slice or int
        The part of it to draw, an entry for each axis of `shape`; an int drops its axis, as in indexing.
    dtype : dtype
        Of the result.
    xp : module
        numpy or cupy, whose array the result is.

    Returns
    -------
    scale : array
        Of the window's shape.
    """
    step, shape, window = in_step(step, shape, window)
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


def runs_of(shape: Sequence[int], ends: Sequence[tuple[int, int]], lengths: Sequence[int], flat: Array
            ) -> Iterator[tuple[int, int, Array]]:
    """Yield where the runs of a window lie in the stream, and where they go in `flat`, the window's array.

    A run is a stretch of the window without gaps in the global array: the axes at the end that are whole, and the one
    before them. Runs that lie near each other are drawn together with the words between them; long runs are cut.

    Parameters
    ----------
    shape : sequence of int
        Of the whole array.
    ends : sequence of pairs
        The first index of the window along each axis and the one after its last.
    lengths : sequence of int
        Of the window along each axis.
    flat : (n,) array
        Of the window.

    Yields
    ------
    first : int
        The first word.
    pitch : int
        The words from one run to the next.
    runs : (count, length) array
        A part of `flat`.
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
