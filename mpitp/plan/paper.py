"""A group on paper: its layers are the real ones, and their arrays have shapes but no memory."""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..arrays import COMPUTE_DTYPES, GPU_DTYPES, Array
from ..sharding.parameters import Place
from ..sharding.partition import Partition


class PaperArrays:
    """The array module of a group on paper: NumPy, but zeros() makes an array of one number that has any shape."""
    ndarray = np.ndarray

    def zeros(self, shape: Any, dtype: DTypeLike = float) -> Array:
        """Return an array whose elements are one zero in memory."""
        return np.broadcast_to(np.zeros((), dtype), shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class PaperGroup:
    """A PaperGroup is one rank of a group that is not there: a place among P ranks, and nothing that communicates.

    A layer that is made with it (with seed=None) knows its slices and its collectives, and takes no memory.

    Parameters
    ----------
    place : Place
        The rank, the ranks and the blocks.
    device : str
        "cpu" or "gpu", which decides what dtypes there are.
    reproducible : bool
        Whether sums are trees over blocks.
    """

    def __init__(self, place: Place, device: str = "cpu", reproducible: bool = False):
        self.place, self.device, self.reproducible = place, device, reproducible
        self.rank, self.size, self.blocks = place
        self.xp = PaperArrays()
        self.summed_dtypes = COMPUTE_DTYPES if device == "cpu" else GPU_DTYPES

    def partition(self, size: int, unit: int = 1, share: int = 1) -> Partition:
        """Return how a dimension is split over the group, as TensorParallelGroup's."""
        return self.place.partition(size, unit, share)
