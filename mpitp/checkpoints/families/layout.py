"""Where a parameter lies in a stored tensor: transposed, or some of the rows of a fused one.

Ours are [out, in]. GPT-2 stores [in, out]. Query, key and value may lie in one tensor, each `inner` rows at a time:

    GPT-2      outer 1, parts 3                 all of q, all of k, all of v
    GPT-NeoX   outer heads, parts 3             q, k, v of head 0, then those of head 1, ...
    Falcon     outer key/value heads            the q of all heads that share one, its k, its v, then the next

Or each row of ours is a tensor of its own, as StableLM 2 stores the norms of its heads.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...arrays import Array

if TYPE_CHECKING:
    from ..safetensors import StoredTensor


@dataclass(frozen=True)
class Fused:
    """A parameter's rows are parts first..last - 1 of each of `outer` groups of `parts`, `inner` rows a part."""
    outer: int
    parts: int
    inner: int
    first: int
    last: int

    @property
    def stored_rows(self) -> int:
        """Return the rows of the whole fused tensor."""
        return self.outer * self.parts * self.inner

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first row, first row in the tensor, count) for the unbroken runs of rows start..stop - 1."""
        length = (self.last - self.first) * self.inner
        while start < stop:
            group, within = divmod(start, length)
            count = min(length - within, stop - start)
            yield start, (group * self.parts + self.first) * self.inner + within, count
            start += count


@dataclass(frozen=True)
class Layout:
    """The stored tensor that a parameter of this shape lies in, and how.

    name : of the tensor; with {} in it, those of the tensors that have a row each, by their numbers
    shape : of the parameter, [out, in]
    transposed : whether the tensor is [in, out]
    fused : which of the tensor's rows are the parameter's, None: all
    """
    name: str
    shape: tuple
    transposed: bool = False
    fused: Fused | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors that the parameter lies in."""
        return [self.name.format(row) for row in range(self.shape[0])] if "{}" in self.name else [self.name]

    @property
    def stored_shape(self) -> tuple:
        """Return the shape of the whole stored tensor, or of each of them."""
        if "{}" in self.name:
            return self.shape[1:]
        shape = self.shape if self.fused is None else (self.fused.stored_rows, *self.shape[1:])
        return shape[::-1] if self.transposed else shape

    def runs(self, window: tuple) -> Iterator[tuple[slice, tuple]]:
        """Yield (rows of the window, window of the stored tensor), both slices, for a window of the parameter."""
        rows, rest = window[0], tuple(window[1:])
        runs = [(rows.start, rows.start, rows.stop - rows.start)] if self.fused is None else \
            self.fused.runs(rows.start, rows.stop)
        for start, stored, count in runs:
            theirs = (slice(stored, stored + count), *rest)
            yield slice(start - rows.start, start - rows.start + count), theirs[::-1] if self.transposed else theirs


    def pieces(self, window: tuple) -> Iterator[tuple[slice | int, str, tuple]]:
        """Yield (rows of the window, name of a tensor, window of it) for a window of the parameter."""
        if "{}" in self.name:
            for row in range(window[0].start, window[0].stop):
                yield row - window[0].start, self.name.format(row), tuple(window[1:])
        else:
            for rows, stored in self.runs(window):
                yield rows, self.name, stored


class View:
    """A parameter in a checkpoint, with a shape and slices: only what is sliced is read. Rank-local.

    shape : of the parameter
    dtype : as stored, by its name in the file ("BF16")
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], layout: Layout):
        self.tensors, self.layout = tensors, layout
        self.shape, self.dtype = layout.shape, tensors[layout.names[0]].dtype

    def read(self, window: tuple, out: Array) -> None:
        """Read a window (a tuple of slices with both ends) into an array of its shape."""
        for rows, name, stored in self.layout.pieces(window):
            part = out[rows]
            self.tensors[name].read(stored, part.T if self.layout.transposed else part)

    def __getitem__(self, window: tuple) -> Array:
        window = tuple(slice(*part.indices(n)) for part, n in zip(window, self.shape))
        out = np.empty([part.stop - part.start for part in window], "float64" if self.dtype == "F64" else "float32")
        self.read(window, out)
        return out
