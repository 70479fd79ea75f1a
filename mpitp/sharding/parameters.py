"""What a parameter is: its name, global shape, and how it is split. The hub that everything else reads.

Initialisation, loading, checkpoints, norms, memory figures and error messages all ask a ParameterSpec, and it answers
by arithmetic on a Place (rank, ranks, blocks) alone.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .partition import Partition


class Place(NamedTuple):
    """A Place is a rank's place in its group: everything that decides which part of a parameter it holds.

    Parameters
    ----------
    rank : int
        Number of the rank.
    ranks : int
        Number of ranks in the group.
    blocks : int
        Number of blocks that a split dimension is cut into: `ranks` in ordinary mode, fixed in reproducible mode.
    """
    rank: int
    ranks: int
    blocks: int

    def partition(self, size: int, multiple: int = 1, share: int = 1) -> Partition:
        """Return how a dimension of `size` is split over the group; `multiple` and `share` are Partition's."""
        return Partition(size, self.ranks, self.blocks, multiple, share)


@dataclass(frozen=True)
class ParameterSpec:
    """A ParameterSpec says what one parameter of the model is.

    Parameters
    ----------
    name : str
        Dotted name, unique in the model, e.g. "layers.3.mlp.up.weight".
    shape : tuple of int
        Global shape; weights are [out, in].
    axis : int or None
        The axis that is split over the ranks; None for a replicated parameter.
    init_std : float
        Standard deviation of the normal that it starts from; 0: it starts from `init_value` everywhere.
    decay : bool
        Whether weight decay applies (weights yes, biases and norms no).
    init_value : float
        What it starts from where `init_std` is 0.
    multiple, share : int
        Of the split axis, as Partition's: a head's features stay together, and the rows of a key/value head are held
        by every rank with one of its `share` query heads, equal gradients included; one of them owns it.
    """
    name: str
    shape: tuple[int, ...]
    axis: int | None
    init_std: float = 0.0
    decay: bool = True
    init_value: float = 0.0
    multiple: int = 1
    share: int = 1

    def partition(self, place: Place) -> Partition:
        """Return the partition of the split axis."""
        assert self.axis is not None, f"{self.name} is replicated"
        return place.partition(self.shape[self.axis], self.multiple, self.share)

    def window(self, place: Place) -> tuple[slice, ...]:
        """Return the part of the global array that the rank holds."""
        whole = [slice(0, n) for n in self.shape]
        if self.axis is not None:
            whole[self.axis] = self.partition(place).held(place.rank)
        return tuple(whole)

    def owned(self, place: Place) -> tuple[slice, ...]:
        """Return the part of what the rank holds that it alone counts, writes and sends.

        All of it, but for a key/value head that an earlier rank owns. Replicated parameters: all of it, see owner().
        """
        whole = [slice(None)] * len(self.shape)
        if self.axis is not None:
            whole[self.axis] = self.partition(place).owned_of_held(place.rank)
        return tuple(whole)

    def local_shape(self, place: Place) -> tuple[int, ...]:
        """Return the shape of the part that the rank holds."""
        return tuple(part.stop - part.start for part in self.window(place))

    def owner(self) -> int | None:
        """Return the one rank that counts a replicated parameter; None where every rank owns its part."""
        return 0 if self.axis is None else None

    def local_bytes(self, place: Place, dtype: str | np.dtype) -> int:
        """Return the bytes of the part that the rank holds."""
        return prod(self.local_shape(place)) * np.dtype(dtype).itemsize


def initialise(spec: ParameterSpec, seed: int, dtype: str | np.dtype, place: Place) -> Array:
    """Return this rank's part of the parameter, the same numbers on any number of ranks. C-contiguous."""
    window = spec.window(place)
    out = np.full([part.stop - part.start for part in window], spec.init_value, dtype)
    if spec.init_std:
        from . import rng                           # where numbers are drawn, not where specs are read
        rng.fill_normal(out, seed, spec.name, spec.shape, window, spec.init_std)
    return out


def check_dense(spec: ParameterSpec, dense: object) -> None:
    """Raise InputError unless `dense` slices, has the parameter's global shape, and holds floating-point numbers."""
    shape, dtype = getattr(dense, "shape", None), getattr(dense, "dtype", None)
    if shape is None or not hasattr(dense, "__getitem__"):
        raise InputError(f"{spec.name}: found {type(dense).__name__}, expected an array of shape {spec.shape}")
    if hasattr(dense, "mask"):
        raise InputError(f"{spec.name}: found a masked array, expected one without a mask")
    if tuple(shape) != spec.shape:
        raise InputError(f"{spec.name}: found shape {tuple(shape)}, expected {spec.shape}")
    if isinstance(dtype, np.dtype) and not (dtype.kind in "fV" and np.can_cast(dtype, np.float64, "same_kind")):
        raise InputError(f"{spec.name}: found dtype {dtype}, expected a floating-point one")


def by_name(specs: Iterable[ParameterSpec]) -> dict[str, ParameterSpec]:
    """Return {name: spec}. Raises InputError for a name that two parameters share."""
    named: dict[str, ParameterSpec] = {}
    for spec in specs:
        if spec.name in named:
            raise InputError(f"found two parameters named {spec.name!r}, expected every name once")
        named[spec.name] = spec
    return named
