"""float32 numbers as sums of bfloat16 ones, and room for their products: what ops/packed.py gives to NumKong.

A bfloat16 number is the upper half of a float32 one; arrays of it are uint16, as NumPy has no such dtype.

Dimension key: N rows (tokens), I in features, O out features, K bfloat16 numbers that add up to x.
"""
import sys
import threading
from typing import Any

import numpy as np

from ..arrays import Array

ROOM_KEPT = 4           # rows of x up to which room for them and their products is kept
# The bits of a float32 that its first number, its first two and all three have.
FIRST_BITS = np.array([0xFFFF0000, 0xFFFFFF00, 0xFFFFFFFF], np.uint32).reshape(3, 1, 1)
UPPER_HALF = slice(1 if sys.byteorder == "little" else 0, None, 2)      # of each float32, as pairs of 16 bits


class Numbers:
    """Room for the three bfloat16 numbers (3, N, I), the largest first, that add up to each number of x (N, I)."""

    count = 3

    def __init__(self, rows: int, depth: int):
        self.bits_KNI = np.empty((3, rows, depth), np.uint32)       # of the upper 8, 16 and 24 significant bits of x
        self.upto_KNI = self.bits_KNI.view(np.float32)
        self.beyond = np.empty((2, rows, depth), np.float32)        # what the second and the third add
        self.numbers_KNI = np.empty((3, rows, depth), np.uint16)
        self.address = self.numbers_KNI.ctypes.data
        self.moves = ((self.numbers_KNI[:1], self.bits_KNI[:1].view(np.uint16)[..., UPPER_HALF]),
                      (self.numbers_KNI[1:], self.beyond.view(np.uint16)[..., UPPER_HALF]))
        self.minuends, self.subtrahends = self.upto_KNI[1:], self.upto_KNI[:-1]

    def put(self, x_NI: Array) -> None:
        """Put those of x there."""
        np.bitwise_and(x_NI.view(np.uint32), FIRST_BITS, out=self.bits_KNI)
        np.subtract(self.minuends, self.subtrahends, out=self.beyond)
        for out, upper_half in self.moves:
            out[...] = upper_half


class RoundedNumbers:
    """Room for the bfloat16 number nearest to each number of x (N, I)."""

    count = 1

    def __init__(self, rows: int, depth: int):
        self.swollen_NI, self.x_NI = np.empty((2, rows, depth), np.float32)
        self.upper_half = self.x_NI.view(np.uint16)[:, UPPER_HALF]
        self.numbers_NI = np.empty((rows, depth), np.uint16)
        self.address = self.numbers_NI.ctypes.data

    def put(self, x_NI: Array) -> None:
        """Put those of x there. Dekker's split: 2^16 x + x swallows the lower bits of x."""
        np.multiply(x_NI, 65537, out=self.swollen_NI)
        np.subtract(self.swollen_NI, x_NI, out=self.x_NI)
        np.subtract(self.swollen_NI, self.x_NI, out=self.x_NI)
        self.numbers_NI[...] = self.upper_half


class Products:
    """Room for the products (3, N, O) of three numbers."""

    def __init__(self, rows: int, outputs: int):
        self.y_KNO = np.empty((3, rows, outputs), np.float32)
        self.first, self.second, self.third = self.y_KNO
        self.address = self.y_KNO.ctypes.data

    def add_up(self, y_NO: Array) -> None:
        """Write their sum to y, the small ones first."""
        np.add(self.third, self.second, out=self.third)
        np.add(self.third, self.first, out=y_NO)


class Product:
    """Room for the product (N, O) of one number, which may be part of a larger array in the end."""

    def __init__(self, rows: int, outputs: int):
        self.y_NO = np.empty((rows, outputs), np.float32)
        self.address = self.y_NO.ctypes.data

    def add_up(self, y_NO: Array) -> None:
        """Write it to y."""
        y_NO[...] = self.y_NO


of_thread = threading.local()       # blocks of reproducible mode may be computed by several


def room(kind: type, rows: int, columns: int) -> Any:
    """Return room of a size, made once in a thread for few rows: half the time of a small product otherwise."""
    if rows > ROOM_KEPT:
        return kind(rows, columns)
    kept: dict[Any, Any] = of_thread.__dict__
    found = kept.get((kind, rows, columns))
    if found is None:
        found = kept[kind, rows, columns] = kind(rows, columns)
    return found


def rounded(x_NI: Array) -> Array:
    """Return x rounded to the nearest bfloat16, in float32."""
    numbers = RoundedNumbers(*x_NI.shape)
    numbers.put(x_NI)
    return numbers.x_NI


def upper_halves(x: Array) -> Array:
    """Return the upper 16 bits of float32 numbers, as uint16: bfloat16, exact where the lower ones are 0."""
    return np.ascontiguousarray(x.view(np.uint16)[..., UPPER_HALF])


def widened(bits: Array) -> Array:
    """Return bfloat16 numbers, given as uint16, as float32."""
    return np.left_shift(bits, 16, dtype=np.uint32, casting="unsafe").view(np.float32)
