"""Read slices out of safetensors files, BF16 included, which NumPy has no dtype for.

A file is 8 bytes of header length (little endian), the header as JSON {name: {dtype, shape, data_offsets}}, then
the tensors without gap or overlap. All of that is checked before a byte of data is read, as the format's own library
does (huggingface/safetensors, tensor.rs).
"""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .json_files import BYTES_OF_ONE, CONTAINERS, read_json, require_file, require_no_pointer
from .open_files import OpenFile

HEADER_LIMIT = 100_000_000      # bytes, as in the reference library
MOST_AXES = 32                  # of NumPy 1; NumPy 2 has 64
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
          "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}
PIECE = 1 << 17                 # bytes that are read at a time on their way to another dtype or memory order
WIDENED = {"F16": "float32", "BF16": "float32"}     # 16-bit types are storage, computed with in float32


class StoredTensor:
    """A tensor on disk that slices: only the bytes of the slice are read, 16-bit floats come as float32.

    shape, dtype : as stored, dtype by its name in the file ("BF16")

    It reads and maps no memory: touching pages for the first time costs more than copying them (measured, 18 column
    slices of 640 x 2048 on two ranks: 24 ms against 159), and a file that is cut short meanwhile is an error, not a bus
    error.
    """

    def __init__(self, file: SafetensorsFile, name: str, dtype: str, shape: tuple, begin: int, end: int):
        self.file, self.name, self.dtype, self.shape, self.begin = file, name, dtype, shape, begin
        self.stored = np.dtype(STORED[dtype])

    def __getitem__(self, window: tuple | slice | int) -> Array:
        bounds, shape = bounds_of(window, self.shape)
        out = np.empty([stop - start for start, stop in bounds], WIDENED.get(self.dtype, self.stored.newbyteorder("=")))
        self.fill(self.begin, self.shape, bounds, out)
        return out.reshape(shape)

    def read(self, window: tuple | slice | int, out: Array) -> None:
        """Read a slice into an array of its shape, of any dtype and memory order, widened or rounded to its dtype."""
        self.fill(self.begin, self.shape, bounds_of(window, self.shape)[0], out)

    def fill(self, offset: int, shape: tuple, bounds: list[tuple[int, int]], out: Array) -> None:
        """Read bounds [(start, stop)] of an array of this shape that begins at the offset."""
        while len(shape) < 2:
            shape, bounds, out = (1, *shape), [(0, 1), *bounds], out[None]
        width = prod(shape[1:]) * self.stored.itemsize
        (top, bottom), columns = bounds[0], bounds[1]
        if len(shape) > 2:
            for i in range(top, bottom):
                self.fill(offset + i * width, shape[1:], bounds[1:], out[i - top])
            return
        if out.dtype == self.stored and out.flags.c_contiguous:
            return self.read_rows(out, offset, width, (top, bottom), columns)
        most = PIECE // self.stored.itemsize                    # a piece of the columns, and as many rows as fit
        for left in range(*columns, most):
            right = min(left + most, columns[1])
            rows = max(1, min(most // (right - left), bottom - top))
            buffer = np.empty((rows, right - left), self.stored)
            for row in range(top, bottom, rows):
                part = out[row - top:row - top + rows, left - columns[0]:right - columns[0]]
                piece = buffer[:len(part)]
                self.read_rows(piece, offset, width, (row, row + len(part)), (left, right))
                if self.dtype != "BF16" or part.dtype == self.stored:       # the latter takes its bits
                    part[...] = piece
                elif part.dtype == np.float32:      # BF16 is the upper half of the float32 that it stands for
                    np.left_shift(piece, 16, out=part.view(np.uint32), dtype=np.uint32, casting="unsafe")
                else:
                    part[...] = np.left_shift(piece, 16, dtype=np.uint32).view(np.float32)

    def read_rows(self, out: Array, offset: int, width: int, rows: tuple, columns: tuple) -> None:
        """Read the bytes of a part of a matrix whose rows are `width` bytes, into a C-contiguous array."""
        first = offset + rows[0] * width + columns[0] * self.stored.itemsize
        if out.shape[1] * self.stored.itemsize == width:
            self.file.read_into(out, first)
        else:
            for i, row in enumerate(out):
                self.file.read_into(row, first + i * width)


def bounds_of(window: tuple | slice | int, shape: tuple) -> tuple[list[tuple[int, int]], tuple]:
    """Return [(start, stop)] of each axis of a window made of slices and integers, and the window's shape."""
    window = window if isinstance(window, tuple) else (window,)
    bounds, kept = [], []
    for part, n in zip(window + (slice(None),) * (len(shape) - len(window)), shape):
        if isinstance(part, slice):
            start, stop, step = part.indices(n)
            if step != 1:
                raise IndexError(f"found a step of {step}, expected unbroken slices of a stored tensor")
            kept.append(max(0, stop - start))
        else:
            start = range(n)[part]                              # an IndexError outside of it
            stop = start + 1
        bounds.append((start, max(start, stop)))
    if len(window) > len(shape):
        raise IndexError(f"found {len(window)} indices, expected at most {len(shape)}")
    return bounds, tuple(kept)


class SafetensorsFile:
    """A SafetensorsFile has the tensors of one file by name.

    Raises InputError, a line with file, found and expected, for a damaged one.

    tensors : {name: (dtype by its name in the file, shape, begin, end)}, offsets from the start of the file
    bytes_read : of tensors, so far
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.bytes_read = os.fspath(path), 0
        require_file(self.path, "a safetensors file")
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self.file, size = OpenFile(self.path, (status.st_dev, status.st_ino)), status.st_size
                self.require(size >= 8, f"a file of {size} bytes", "at least the 8 of the header's length")
                start = file.read(8)
                require_no_pointer(self.path, start)
                length = int.from_bytes(start, "little")
                self.require(length <= min(HEADER_LIMIT, size - 8), f"a header of {length} bytes",
                             f"at most {min(HEADER_LIMIT, size - 8)} in a file of {size}")
                text = file.read(length)
                containers = text.count(b"[") + text.count(b"{")
                self.require(containers <= CONTAINERS + length // BYTES_OF_ONE,
                             f"a header that is not JSON of tensors ({containers} lists and objects in {length} "
                             f"bytes)", "a safetensors file")
                header = json.loads(text.decode("utf-8"), object_pairs_hook=self.unique)
        except OSError as error:
            raise InputError(f"{self.path}: found {error.strerror}, expected a safetensors file") from None
        except InputError:
            raise
        except (ValueError, RecursionError):    # not UTF-8, not JSON, a number of more digits than Python takes
            raise InputError(f"{self.path}: found a header that is not JSON, expected a safetensors file") from None
        self.require(isinstance(header, dict), f"a header that is a JSON {type(header).__name__}", "an object")
        metadata = header.pop("__metadata__", {})
        self.require(isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()),
                     "a __metadata__ of something else", "an object of strings")
        self.tensors, end = {}, 0
        entries = [(name, *self.entry(name, entry)) for name, entry in header.items()]
        for name, dtype, shape, begin, stop in sorted(entries, key=lambda entry: entry[3:]):
            self.require(begin == end, f"{name!r} at offset {begin}", f"{end}, without gap or overlap")
            bytes_of_shape = prod(shape) * np.dtype(STORED[dtype]).itemsize
            self.require(stop - begin == bytes_of_shape, f"{stop - begin} bytes of {name!r}",
                         f"{bytes_of_shape} for {dtype} {tuple(shape)}")
            self.tensors[name], end = (dtype, tuple(shape), 8 + length + begin, 8 + length + stop), stop
        self.require(8 + length + end == size, f"a file of {size} bytes",
                     f"{8 + length + end}, where its last tensor ends")

    def entry(self, name: str, entry: Any) -> tuple:
        """Check a header entry: (dtype, shape, begin, end)."""
        self.require(isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"},
                     f"{name!r}: {entry!r}", "dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        self.require(isinstance(dtype, str) and dtype in STORED, f"dtype {dtype!r} of {name!r}",
                     f"one of {', '.join(STORED)}")
        self.require(are_sizes(shape) and len(shape) <= MOST_AXES and addressable(shape),
                     f"shape {shape!r} of {name!r}", f"a list of at most {MOST_AXES} sizes, their product below 2**60")
        self.require(are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1],
                     f"data_offsets {offsets!r} of {name!r}", "[begin, end]")
        return dtype, shape, *offsets

    def unique(self, pairs: Sequence[tuple]) -> dict:
        """Make a dict of a JSON object whose keys all differ; json.load would take the last of two equal ones."""
        values = {}
        for name, value in pairs:
            self.require(name not in values, f"{name!r} twice in the header", "every key once")
            values[name] = value
        return values

    def read_into(self, array: Array, offset: int) -> None:
        """Fill a C-contiguous array with the bytes from there."""
        left = array.reshape(-1).view(np.uint8).data
        self.bytes_read += len(left)
        while left:
            try:
                count = os.preadv(self.file.descriptor(), [left], offset)
            except OSError as error:
                raise InputError(f"{self.path}: found {error.strerror}, expected to read it") from None
            self.require(count, f"its end at byte {offset}", "the bytes that its header describes: it was cut short")
            left, offset = left[count:], offset + count

    def require(self, condition: object, found: str, expected: str) -> None:
        """Raise InputError with the file's name unless condition holds."""
        if not condition:
            raise InputError(f"{self.path}: found {found[:200]}, expected {expected}")

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise InputError(f"{self.path}: found no tensor {name!r}, expected it there")
        return StoredTensor(self, name, *self.tensors[name])


def are_sizes(value: object) -> bool:
    """Return whether value is a list of integers that are sizes or offsets."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2 ** 63 for n in value)


def addressable(shape: list[int]) -> bool:
    """Return whether NumPy can describe the shape; it counts axes of size 0 as 1."""
    elements = 1
    for n in shape:
        elements *= n or 1
        if elements >= 2 ** 60:
            return False
    return True


class Checkpoint:
    """A Checkpoint is a folder saved from the hub: config.json and model.safetensors, or shards with their index.

    Opening reads headers only. Raises InputError for a folder, a file or a tensor that is missing or damaged, and
    for an index that points outside of its folder.

    document : the file of the folder that describes the model
    """
    document = "config.json"

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        if not os.path.isdir(self.folder):
            raise InputError(f"{self.folder}: found no such folder, expected a checkpoint saved from the hub")
        self.config = read_json(os.path.join(self.folder, "config.json"))
        index = os.path.join(self.folder, "model.safetensors.index.json")
        if os.path.exists(index) and not os.path.exists(os.path.join(self.folder, "model.safetensors")):
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
                raise InputError(f"{index}: found no weight_map of file names, expected one")
            for name in set(where.values()):
                if os.path.basename(name) != name or name in ("", ".", "..") or \
                        not name.isprintable():
                    raise InputError(f"{index}: found a shard named {name!r}, expected a file of the same folder")
            self.files = {name: SafetensorsFile(os.path.join(self.folder, name))
                          for name in sorted(set(where.values()))}
            self.where = where
            for tensor, name in where.items():
                if tensor not in self.files[name].tensors:
                    raise InputError(f"{index}: found no {tensor!r} in {name}, expected it there")
        else:
            path = os.path.join(self.folder, "model.safetensors")
            if not os.path.exists(path) and any(name.endswith(".bin") for name in os.listdir(self.folder)):
                raise InputError(f"{self.folder}: found pickled weights (.bin), expected model.safetensors or its "
                                 f"index")
            file = SafetensorsFile(path)
            self.files, self.where = {"model.safetensors": file}, dict.fromkeys(file.tensors, "model.safetensors")

    @property
    def kind(self) -> str:
        """What the checkpoint is, for people: its model_type."""
        return str(self.config.get("model_type", "nameless"))

    def names(self) -> list[str]:
        """Return the names of all stored tensors."""
        return list(self.where)

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.where:
            raise InputError(f"{self.folder}: found no tensor {name!r}, expected it there")
        return self.files[self.where[name]][name]

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors that were read so far, by this process."""
        return sum(file.bytes_read for file in self.files.values())
