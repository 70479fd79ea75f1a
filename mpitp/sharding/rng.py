"""Random numbers with an address: (seed, name, index) names a number, whoever asks for it.

A weight is the same number on any number of ranks, and each rank draws only its own: no per-rank seeds
(another number of ranks would be another model), no drawing of the whole matrix to keep a slice of it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): Philox4x64-10, four 64-bit
words per counter value. Normals: Box and Muller (1958), two words make two normals. NumPy's own
`standard_normal` rejects and redraws, so that its n-th number has no address.
"""
import hashlib
import math

import numpy as np

PIECE = 1 << 15     # numbers made at a time: the temporaries stay in cache and out of the memory figures


def key(seed: int, name: str) -> np.ndarray:
    """Return the 128-bit Philox key of a stream: SHA-256 over seed and name."""
    digest = hashlib.sha256(f"mpitp/philox4x64-10/{int(seed)}/{name}".encode()).digest()
    return np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)


def words(stream_key: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return words start..stop-1 of the stream, uint64.

    Word i is lane i % 4 of Philox at counter i // 4.
    """
    first = start // 4
    # NumPy steps the counter before it encrypts, so the one before is set: -1 wraps to all ones.
    before = (first - 1) % (1 << 256)
    counter = np.array([(before >> (64 * i)) & 0xFFFFFFFFFFFFFFFF for i in range(4)], dtype=np.uint64)
    stream = np.random.Philox(key=stream_key, counter=counter)
    return stream.random_raw(stop - 4 * first)[start - 4 * first:]


def normals(stream_key: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return standard normals start..stop-1 of the stream, float64.

    Words 2j and 2j+1, as u1 in (0, 1] and u2 in [0, 1), make normals 2j and 2j+1:
    sqrt(-2 ln u1) cos(2 pi u2) and sqrt(-2 ln u1) sin(2 pi u2).
    """
    first = start - start % 2
    uniform = words(stream_key, first, stop + stop % 2) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((uniform[0::2] + np.uint64(1)) * 2.0 ** -53))
    angle = uniform[1::2] * (2.0 * math.pi * 2.0 ** -53)
    pairs = np.empty((len(radius), 2))
    np.multiply(radius, np.cos(angle), out=pairs[:, 0])
    np.multiply(radius, np.sin(angle), out=pairs[:, 1])
    return pairs.ravel()[start - first:stop - first]


def fill_normal(out: np.ndarray, seed: int, name: str, shape: tuple[int, ...], window: tuple[slice, ...],
                std: float) -> None:
    """Fill `out` with window of the array N(0, std^2) of `shape` that belongs to (seed, name).

    Parameters
    ----------
    out : array
        Of the window's shape, C-contiguous, one or two axes; written.
    seed, name : int, str
        The address of the stream.
    shape : tuple of int
        Shape of the whole array; number i of the stream is its element i in C order.
    window : tuple of slice
        The part of the whole array that `out` holds.
    std : float
        Standard deviation.
    """
    stream_key = key(seed, name)
    *rows, columns = window
    row_length = shape[-1]
    first_row, row_count = (rows[0].start, out.shape[0]) if rows else (0, 1)
    if columns == slice(0, row_length):     # whole rows follow each other in the stream: one run
        runs = [(first_row * row_length, out.reshape(-1))]
    else:
        runs = [((first_row + i) * row_length + columns.start, run)
                for i, run in enumerate(out.reshape(row_count, columns.stop - columns.start))]
    for first, run in runs:
        for at in range(0, run.size, PIECE):
            end = min(at + PIECE, run.size)
            run[at:end] = normals(stream_key, first + at, first + end) * std
