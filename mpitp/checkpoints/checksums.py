"""Checksums of tensors that are split over ranks: each rank sums what it owns, and the sums add up.

    C = sum over i of (2 i + 1) w_i  modulo 2^64,  w_i the i-th 32-bit word of the tensor as it is stored

A sum has no order, so C is the same for any number of ranks. Every multiplier is odd and no two are equal, so one word
that changes, and two words that change places, always change C.

Dimension key: R rows, C words of a row.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays import Array
from ..comm.group import TensorParallelGroup

Checksums = dict[str, dict[str, str]]       # {file name: {tensor name: 16 hexadecimal digits}}

# Words whose sums float64 holds exactly: 2^32 times the sum of 0 to WIDTH - 1 is below 2^53. So BLAS may add them up in
# any order (measured: 3.4 GB/s, against 1.7 of integer arithmetic and 1.5 of zlib.crc32).
WIDTH = 1 << 10
ROWS = 1 << 6                               # of a piece that stays in cache
WEIGHTS_C2 = np.stack([np.ones(WIDTH), np.arange(WIDTH)], axis=1)


def checksums_of(group: TensorParallelGroup, files: Mapping[str, Iterable[Any]]) -> Checksums:
    """Return the checksums of tensors of 32-bit or 64-bit numbers, of which each rank has its slices.

    Parameters
    ----------
    group : TensorParallelGroup
    files : {file name: StoredSlices}
        The same tensors in the same order on every rank.

    Returns
    -------
    {file name: {tensor name: text}}
        Each 16 hexadecimal digits, equal on every rank.

    Notes
    -----
    Collective: one allgather of 8 bytes a tensor, no data.
    """
    names = [(file, part.layout.name) for file, slices in files.items() for part in slices]
    mine = np.zeros(len(names), np.uint64)
    for i, part in enumerate(part for slices in files.values() for part in slices):
        for _, window, values in part.owned(group):
            mine[i:i + 1] += window_sum(values, window, part.layout.stored_shape)
    sums = np.add.reduce(group.comm.allgather(mine), axis=0, dtype=np.uint64).tolist()
    found: Checksums = {file: {} for file in files}
    for (file, name), total in zip(names, sums):
        found[file][name] = f"{total:016x}"
    return found


def window_sum(values: Array, window: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Return what a window (slices with both ends) of a tensor of one or two axes adds to its checksum: (1,) uint64."""
    while len(shape) < 2:
        values, window, shape = values[None], (slice(0, 1), *window), (1, *shape)
    words_RC = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).view("<u4")
    width = shape[1] * (values.itemsize // 4)
    first = window[0].start * width + window[1].start * (values.itemsize // 4)
    if words_RC.shape[1] != width:
        return rows_sum(words_RC, first, width)
    words = words_RC.reshape(-1)                # without gaps: rows of WIDTH words, and the rest
    whole = words.size - words.size % WIDTH
    total = rows_sum(words[:whole].reshape(-1, WIDTH), first, WIDTH)
    return total + rows_sum(words[None, whole:], first + whole, WIDTH)


def rows_sum(words_RC: np.ndarray, first: int, stride: int) -> np.ndarray:
    """Return the sum of (2 (first + stride r + c) + 1) words[r, c], (1,) uint64."""
    total = np.zeros(1, np.uint64)
    for left in range(0, words_RC.shape[1], WIDTH):
        for top in range(0, len(words_RC), ROWS):
            piece_RC = words_RC[top:top + ROWS, left:left + WIDTH].astype(np.float64)
            plain_R, weighted_R = (piece_RC @ WEIGHTS_C2[:piece_RC.shape[1]]).T.astype(np.uint64)
            start_R = np.arange(top, top + len(piece_RC), dtype=np.uint64) * np.uint64(stride) + np.uint64(first + left)
            total += np.sum((2 * start_R + 1) * plain_R + 2 * weighted_R, dtype=np.uint64)
    return total
