"""What a parameter is: its name, global shape, and how it is split. The hub that everything else reads.

Initialisation, loading, checkpoints, norms, memory figures and error messages all ask a ParameterSpec, and
it answers by arithmetic on (ranks, rank, blocks) alone.
"""
from dataclasses import dataclass
from math import prod

import numpy as np

from . import rng
from ..errors import InputError
from .partition import Partition


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the model.

    name : dotted name, unique in the model, e.g. "layers.3.mlp.up.weight"
    shape : global shape; weights are [out, in]
    axis : the axis that is split over the ranks, None for a replicated parameter
    init_std : standard deviation of the normal that it starts from; 0: it starts from init_value everywhere
    decay : whether weight decay applies (weights yes, biases and norms no)
    gradient : "complete" where backward leaves the same (or the rank's own) gradient,
        "partial" where it must still be summed over the ranks
    unit, share : of the split axis, as Partition's: a head's features stay together, and the rows of a key/value head
        are held by every rank with one of its `share` query heads, equal gradients included; one of them owns it
    """
    name: str
    shape: tuple
    axis: int | None
    init_std: float = 0.0
    decay: bool = True
    gradient: str = "complete"
    init_value: float = 0.0
    unit: int = 1
    share: int = 1

    def partition(self, ranks, blocks):
        """The partition of the split axis."""
        return Partition(self.shape[self.axis], ranks, blocks, self.unit, self.share)

    def window(self, rank, ranks, blocks):
        """The part of the global array that the rank holds, as a tuple of slices."""
        whole = [slice(0, n) for n in self.shape]
        if self.axis is not None:
            whole[self.axis] = self.partition(ranks, blocks).held(rank)
        return tuple(whole)

    def owned(self, rank, ranks, blocks):
        """The part of what the rank holds that it alone counts, writes and sends, as a tuple of slices.

        All of it, but for a key/value head that an earlier rank owns. Replicated parameters: all of it, see owner().
        """
        whole = [slice(None)] * len(self.shape)
        if self.axis is not None:
            whole[self.axis] = self.partition(ranks, blocks).owned_of_held(rank)
        return tuple(whole)

    def local_shape(self, rank, ranks, blocks):
        return tuple(part.stop - part.start for part in self.window(rank, ranks, blocks))

    def owner(self, ranks):
        """The one rank that counts a replicated parameter; None where every rank owns its part."""
        return 0 if self.axis is None else None

    def local_bytes(self, rank, ranks, blocks, dtype):
        return prod(self.local_shape(rank, ranks, blocks)) * np.dtype(dtype).itemsize


def initialise(spec, seed, dtype, rank, ranks, blocks):
    """This rank's part of the parameter, the same numbers on any number of ranks. C-contiguous."""
    window = spec.window(rank, ranks, blocks)
    out = np.full([part.stop - part.start for part in window], spec.init_value, dtype)
    if spec.init_std:
        rng.fill_normal(out, seed, spec.name, spec.shape, window, spec.init_std)
    return out


def check_dense(spec, dense):
    """Raise InputError unless `dense` slices, has the parameter's global shape, and holds floating-point numbers."""
    shape, dtype = getattr(dense, "shape", None), getattr(dense, "dtype", None)
    if shape is None or not hasattr(dense, "__getitem__"):
        raise InputError(f"{spec.name}: found {type(dense).__name__}, expected an array of shape {spec.shape}")
    if tuple(shape) != spec.shape:
        raise InputError(f"{spec.name}: found shape {tuple(shape)}, expected {spec.shape}")
    if isinstance(dtype, np.dtype) and not (dtype.kind in "fV" and np.can_cast(dtype, np.float64, "same_kind")):
        raise InputError(f"{spec.name}: found dtype {dtype}, expected a floating-point one")


def by_name(specs):
    """{name: spec}, refusing a name that two parameters share."""
    named = {}
    for spec in specs:
        if spec.name in named:
            raise InputError(f"found two parameters named {spec.name!r}, expected every name once")
        named[spec.name] = spec
    return named
