"""Write safetensors files in place: one rank makes the file, all ranks write their windows of its tensors."""
from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from .safetensors import PIECE, STORED, bounds_of


def create(path: str, tensors: Mapping[str, tuple[str, tuple]], metadata: Mapping[str, str] | None = None) -> int:
    """Make the file with its header, in its full size.

    Parameters
    ----------
    path : str
    tensors : {name: (dtype by its name in the file, shape)}
    metadata : {text: text}, optional

    Returns
    -------
    int
        The file's size in bytes.

    Notes
    -----
    The header ends at a multiple of 8 bytes, as the format asks for.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * np.dtype(STORED[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


class TensorWriter:
    """Write windows of the tensors of a file that create() made. Several ranks may, each its own windows.

    tensors : {name: (dtype, shape, begin, end)}, as SafetensorsFile.tensors
    """

    def __init__(self, path: str, tensors: Mapping[str, tuple]):
        self.tensors = tensors
        self.descriptor = os.open(path, os.O_WRONLY)
        self.close_once = weakref.finalize(self, os.close, self.descriptor)

    def write(self, name: str, window: tuple, array: Array) -> None:
        """Write an array into a window (a tuple of slices) of a tensor, rounded to its dtype."""
        dtype, shape, begin, _ = self.tensors[name]
        bounds, item = bounds_of(window, shape)[0], np.dtype(STORED[dtype]).itemsize
        while len(shape) < 2:
            shape, bounds, array = (1, *shape), [(0, 1), *bounds], array[None]
        (top, bottom), (left, right) = bounds
        if left == right:
            return
        for row in range(top, bottom, max(1, PIECE // ((right - left) * item))):
            piece = narrowed(array[row - top:row - top + max(1, PIECE // ((right - left) * item))], dtype)
            start = begin + (row * shape[1] + left) * item
            if right - left == shape[1]:
                self.write_all(piece, start)
            else:
                for i, values in enumerate(piece):
                    self.write_all(values, start + i * shape[1] * item)

    def write_all(self, array: Array, offset: int) -> None:
        """Write all bytes of a C-contiguous array there."""
        left = array.reshape(-1).view(np.uint8).data
        while left:
            count = os.pwrite(self.descriptor, left, offset)
            left, offset = left[count:], offset + count

    def close(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self.descriptor)
        self.close_once()


def narrowed(array: Array, dtype: str) -> Array:
    """Round to a C-contiguous array of the stored dtype: to the nearest, ties to even; a NaN stays one."""
    if dtype != "BF16":
        return np.ascontiguousarray(array, STORED[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(array)
    if nan.any():
        rounded[nan] = bits[nan] >> 16 | 0x40
    return rounded.astype(STORED[dtype])
