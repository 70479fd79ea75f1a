"""Integers that lie in a file and are read when they are used.

By pread and not by a memory map: where a disk fails or another program shortens the file, a map ends the process by
SIGBUS, without a word; a read ends in one line that names the file.
"""
from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import InputError

PIECE = 1 << 22             # tokens that pieces() reads at a time


class TokenFile:
    """A run of integers in a file, of which slices are runs, too, and np.asarray reads all.

    Parameters
    ----------
    path : str
    dtype : numpy dtype
    start : int
        The byte at which they begin.
    length : int
        How many there are.

    Raises
    ------
    InputError
        By whatever reads, for a file that cannot be read or has become shorter.
    """

    def __init__(self, path: str, dtype: Any, start: int, length: int):
        self.path, self.dtype, self.start, self.length = path, np.dtype(dtype), start, length
        self.descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self.descriptor)
        self.whole = self           # a run of it keeps the file open

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> TokenFile:
        first, stop, step = part.indices(self.length)
        if step != 1:
            raise IndexError(f"found a step of {step}, expected 1")
        run = object.__new__(TokenFile)
        run.path, run.dtype, run.descriptor, run.whole = self.path, self.dtype, self.descriptor, self.whole
        run.start, run.length = self.start + first * self.dtype.itemsize, max(0, stop - first)
        return run

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read(0, self.length).astype(dtype or self.dtype, copy=False)

    def read(self, first: int, length: int) -> np.ndarray:
        """Return tokens first .. first + length - 1, a new array. Raises InputError where they cannot be read."""
        found = np.empty(length, self.dtype)
        content, at = found.view(np.uint8), 0
        begin = self.start + first * self.dtype.itemsize
        while at < found.nbytes:
            try:
                count = os.preadv(self.descriptor, [content[at:].data], begin + at)
            except OSError as error:
                raise InputError(f"{self.path}: found {error.strerror} at byte {begin + at}, expected tokens to train "
                                 f"on") from None
            if count == 0:
                raise InputError(f"{self.path}: found {os.fstat(self.descriptor).st_size} bytes, expected more than "
                                 f"{begin + at}, as there were when it was opened")
            at += count
        return found


def pieces(tokens: np.ndarray | TokenFile) -> Iterator[np.ndarray]:
    """Yield the tokens as arrays, one after the other, none of them large."""
    for at in range(0, len(tokens), PIECE):
        yield np.asarray(tokens[at:at + PIECE])


def windows(tokens: np.ndarray | TokenFile, starts: np.ndarray, length: int) -> np.ndarray:
    """Return the windows (windows, length) that begin at `starts`, as int64."""
    found = np.empty((len(starts), length), np.int64)
    for row, start in zip(found, starts.tolist()):
        row[...] = tokens.read(start, length) if isinstance(tokens, TokenFile) else tokens[start:start + length]
    return found
