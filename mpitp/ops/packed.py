"""Weights that stay in bfloat16, and their products with float32 rows, by NumKong (an extra, imported here alone).

A float32 number has 24 significant bits and a bfloat16 number 8, of the same exponents. So every float32 x is the sum
of three bfloat16 numbers, without rounding, and its product with a bfloat16 matrix W is a sum of three products of
bfloat16 numbers, which are added up in float32:

    x = x_0 + x_1 + x_2            y = (x_2 W^T + x_1 W^T) + x_0 W^T

Each y[n, o] is computed from x[n] and W[o] in an order that depends on neither the other rows of x nor those of W
(NumKong's dots/serial.h, nk_define_cross_packed_: tiles of rows and columns, the whole depth in each). So its bits are
the same in any batch, and for any number of ranks that multiply the same part of the depth.

What differs from NumPy's float32: a number below 1.2e-38 may count as 0, and an infinite x or weight gives NaN.

Dimension key: N rows (tokens), I in features, O out features, K bfloat16 numbers that add up to x.
"""
from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from functools import cache
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ..arrays import Array
from ..errors import InputError, require
from . import linear
from .bfloat16 import Numbers, Product, Products, RoundedNumbers, room, rounded, upper_halves, widened

HEADER = 64             # bytes in front of NumKong's packed rows; the third 4 of them are the numbers from row to row
ALIGNED = 64            # bytes of a cache line, which is also what a vector register holds
BUFFER = 1 << 22        # bytes of weights that are packed together, about
WIDENED = 1 << 18       # weights that are widened at a time, on their way to BLAS: 1 MiB of float32
EVERY_BATCH = 1 << 60   # rows: more than there are
# Rows of x up to which NumKong is faster than BLAS, for which W must be widened: as they are, and rounded. Measured on
# an AMD EPYC with AVX512_BF16, time of float32 BLAS over this, 1,024 x 640: 1 row 1.4 and 2.1, 4 rows 1.9 and 2.4, 12
# rows 1.4 and 2.5, 16 rows 1.0 and 2.1, 128 rows 0.7 and 1.5; with W widened 0.8 to 1.0.
FASTER_ROWS = {"float32": 12, "bfloat16": EVERY_BATCH}
# Instructions that multiply tiles of a matrix: their weights lie in tiles, of which no row can be looked up.
OF_TILES = ("sapphireamx", "graniteamx", "sme", "sme2", "sme2p1", "smebf16")


class Buffer(NamedTuple):
    """Some rows of W, packed.

    start, stop : which rows
    rows : (stop - start, I) uint16, a view of the packed ones: bfloat16 as in the file
    address : of the packed rows, for NumKong
    nbytes : of memory
    """
    start: int
    stop: int
    rows: Array
    address: int
    nbytes: int


class PackedWeight:
    """A weight [out, in] in bfloat16, which layers hold in the place of a float32 array: it goes forward only.

    Parameters
    ----------
    shape : tuple
        Of the whole weight of this rank.
    buffers : list of Buffer
        Its rows. Empty where the weight is cut along its columns: then its parts have them.
    activations : str
        "float32": rows of x are multiplied as they are. "bfloat16": they are rounded first.
    faster_rows : int
        Rows of x up to which NumKong multiplies; more are multiplied by BLAS, with W widened piece by piece.
    """

    operations = sys.modules[__name__]          # whose functions cuda_twin calls for it
    ndim, dtype = 2, np.dtype(np.float32)       # as its layer sees it

    def __init__(self, shape: tuple[int, int], buffers: list[Buffer], activations: str, faster_rows: int):
        self.shape, self.buffers = shape, buffers
        self.activations, self.faster_rows = activations, faster_rows
        self.parts: dict[tuple[int, int, int], PackedWeight] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, window: slice | tuple[slice, slice]) -> PackedWeight:
        """Return a block's rows w[rows], or its columns w[:, columns], as they were packed."""
        axis, part = (1, window[1]) if isinstance(window, tuple) else (0, window)
        found = self.parts.get((axis, part.start, part.stop)) if isinstance(part, slice) else None
        if found is None:
            self.refuse()
        return found

    def add_rows(self, start: int, stop: int) -> None:
        """Make rows start..stop - 1 a part. Buffers must begin and end there."""
        buffers = [buffer._replace(start=buffer.start - start, stop=buffer.stop - start) for buffer in self.buffers
                   if start <= buffer.start and buffer.stop <= stop]
        assert sum(len(buffer.rows) for buffer in buffers) == stop - start or self.shape[1] == 0
        self.parts[0, start, stop] = PackedWeight((stop - start, self.shape[1]), buffers, self.activations,
                                                  self.faster_rows)

    def add_columns(self, start: int, stop: int, buffers: list[Buffer]) -> None:
        """Make columns start..stop - 1, which have buffers of their own, a part."""
        self.parts[1, start, stop] = PackedWeight((self.shape[0], stop - start), buffers, self.activations,
                                                  self.faster_rows)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        parts = self.parts.values() if not self.buffers else ()
        return sum(buffer.nbytes for buffer in self.buffers) + sum(part.nbytes for part in parts)

    @property
    def flags(self) -> NoReturn:
        """Refuse to be taken for an array, as backward, gathering and saving do."""
        self.refuse()

    def __array__(self, *arguments: Any, **named: Any) -> NoReturn:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise InputError: this weight is no array."""
        raise InputError("found weights that are kept in bfloat16, which are only multiplied (forward), expected "
                         "float32 ones: load_model without weights='bfloat16'")


# --- the twins of mpitp.ops.linear and mpitp.ops.embedding --------------------------------------------------------

def linear_forward(x_NI: Array, w_OI: PackedWeight, out: Array | None = None,
                   dtype: Any = None) -> tuple[Array, tuple[Array, PackedWeight]]:
    """Compute as mpitp.ops.linear.linear_forward: y = x w^T (N, O), float32."""
    y_NO = np.empty((len(x_NI), len(w_OI)), np.float32) if out is None else out
    write = packed_product if len(x_NI) <= w_OI.faster_rows else widened_product
    write(x_NI, w_OI, y_NO)
    return y_NO, (x_NI, w_OI)


def two_linears_forward(x_NI: Array, v_OI: PackedWeight, w_OI: PackedWeight) -> tuple[Array, Array]:
    """Compute as mpitp.ops.linear.two_linears_forward: x v^T and x w^T (N, O), with the numbers of x made once."""
    if len(x_NI) > w_OI.faster_rows:
        return linear_forward(x_NI, v_OI)[0], linear_forward(x_NI, w_OI)[0]
    first_NO, second_NO = (np.empty((len(x_NI), len(weight)), np.float32) for weight in (v_OI, w_OI))
    numbers = numbers_of(x_NI, v_OI)
    multiply(numbers, v_OI, first_NO)
    multiply(numbers, w_OI, second_NO)
    return first_NO, second_NO


def packed_product(x_NI: Array, w_OI: PackedWeight, y_NO: Array) -> None:
    """Write y = x w^T by NumKong."""
    multiply(numbers_of(x_NI, w_OI), w_OI, y_NO)


def numbers_of(x_NI: Array, w_OI: PackedWeight) -> Numbers | RoundedNumbers:
    """Return the bfloat16 numbers of x that the weight is multiplied with."""
    numbers = room(Numbers if w_OI.activations == "float32" else RoundedNumbers, *x_NI.shape)
    numbers.put(x_NI)
    return numbers


def multiply(numbers: Numbers | RoundedNumbers, w_OI: PackedWeight, y_NO: Array) -> None:
    """Write the sum of the products of the numbers and the weight."""
    N, (outputs, depth) = len(y_NO), w_OI.shape
    products = room(Products if numbers.count == 3 else Product, N, outputs)
    dots, x_address, y_address = library().nk_dots_packed_bf16, numbers.address, products.address
    rows, x_pitch, y_pitch = numbers.count * N, 2 * depth, 4 * outputs
    for start, stop, _, address, _ in w_OI.buffers:
        dots(x_address, address, y_address + 4 * start, rows, stop - start, depth, x_pitch, y_pitch)
    products.add_up(y_NO)


def widened_product(x_NI: Array, w_OI: PackedWeight, y_NO: Array) -> None:
    """Write y = x w^T by BLAS, with w widened piece by piece."""
    x_NI = x_NI if w_OI.activations == "float32" else rounded(x_NI)
    step = max(1, WIDENED // max(1, w_OI.shape[1]))
    for buffer in w_OI.buffers:
        for first in range(0, len(buffer.rows), step):
            piece = widened(buffer.rows[first:first + step])
            first += buffer.start
            linear.linear_forward(x_NI, piece, out=y_NO[:, first:first + len(piece)])


def embedding_forward(w_RH: PackedWeight, ids_N: Array) -> Array:
    """Compute as mpitp.ops.embedding.embedding_forward: y[n] = W[ids[n]], exactly, 0 where another rank has the id."""
    y_NH, starts = np.zeros((len(ids_N), w_RH.shape[1]), np.float32), [buffer.start for buffer in w_RH.buffers]
    bits_NH = y_NH.view(np.uint32)
    for n, row in enumerate(ids_N.tolist()):
        if 0 <= row < len(w_RH):
            buffer = w_RH.buffers[bisect_right(starts, row) - 1]
            bits_NH[n] = buffer.rows[row - buffer.start]
    np.left_shift(bits_NH, 16, out=bits_NH)
    return y_NH


# --- NumKong --------------------------------------------------------------------------------------------------------

@cache
def library() -> Any:
    """Return NumKong's functions. Raises InputError where it is missing, or has others than these."""
    try:
        import numkong
        from numkong import _numkong
    except ImportError:
        raise InputError("found no NumKong, expected it for bfloat16 weights: pip install 'mpitp[numkong]'") from None
    for name in OF_TILES:
        if numkong.get_capabilities().get(name):
            numkong.disable_capability(name)
    found, size, address = ctypes.CDLL(_numkong.__file__), ctypes.c_size_t, ctypes.c_void_p
    try:
        found.nk_dots_packed_size_bf16.argtypes, found.nk_dots_packed_size_bf16.restype = [size] * 2, size
        found.nk_dots_pack_bf16.argtypes = [address, size, size, size, address]
        found.nk_dots_packed_bf16.argtypes = [address] * 3 + [size] * 5
        found.nk_dots_pack_bf16.restype = found.nk_dots_packed_bf16.restype = None
    except AttributeError as error:
        raise InputError(f"found NumKong {numkong.__version__} ({error}), expected one that has it, as 7.8") from None
    return found


def description() -> str:
    """Return what the bits of its products depend on: NumKong's version and the instructions that it uses."""
    library()
    import numkong
    used = [name for name, has in numkong.get_capabilities().items() if has]
    return f"NumKong {numkong.__version__} ({', '.join(used)})"


def pack(bits_OI: Array, start: int) -> Buffer:
    """Return rows of a weight, bfloat16 as uint16, as the Buffer that begins at row `start`.

    Raises InputError where NumKong packs rows in a way that they cannot be read again as they were.
    """
    functions, (outputs, depth) = library(), bits_OI.shape
    size = functions.nk_dots_packed_size_bf16(outputs, depth)
    memory = np.zeros(size + ALIGNED, np.uint8)
    memory = memory[-memory.ctypes.data % ALIGNED:][:size]
    functions.nk_dots_pack_bf16(bits_OI.ctypes.data, outputs, depth, bits_OI.strides[0], memory.ctypes.data)
    pitch = int(memory[8:12].view(np.uint32)[0])
    rows = memory[HEADER:HEADER + 2 * outputs * pitch].view(np.uint16)
    as_they_were = len(rows) == outputs * pitch and depth <= pitch and \
        np.array_equal(rows.reshape(outputs, pitch)[:, :depth], bits_OI)
    require(as_they_were, f"{description()}, which packs bfloat16 in another order", "one row after the other")
    return Buffer(start, start + outputs, rows.reshape(outputs, pitch)[:, :depth], memory.ctypes.data, memory.nbytes)


def rows_together(columns: int) -> int:
    """Return how many rows of so many columns are packed together: a multiple of 8, which NumKong prefers."""
    return max(8, BUFFER // max(1, 2 * columns) // 8 * 8)


def require_fixed_bits() -> None:
    """Raise InputError unless bits depend neither on the batch nor on other rows of the weight, on this machine."""
    draw = np.random.default_rng(0).standard_normal
    x_NI, w_OI = draw((13, 200), np.float32), draw((24, 200), np.float32)
    for depth in (192, 200):
        x, bits = x_NI[:, :depth], upper_halves(w_OI)[:, :depth]
        expected = product_of(x, bits)
        for rows in (1, 2, 3, 4, 8):
            for columns in (1, 4, 8, 9, 23):
                same = product_of(x[:rows], bits[-columns:]).tobytes() == expected[:rows, -columns:].tobytes()
                require(same, f"{description()}, whose bits depend on the batch", "reproducible products")


def product_of(x_NI: Array, bits_OI: Array) -> Array:
    """Return x w^T of a weight that is given as bfloat16 bits."""
    w = PackedWeight(bits_OI.shape, [pack(bits_OI, 0)], "float32", len(x_NI))
    return linear_forward(np.ascontiguousarray(x_NI), w)[0]
