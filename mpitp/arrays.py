"""Which array module an array belongs to, and the dtypes that are computed in."""
import sys

import numpy as np

from .errors import require

COMPUTE_DTYPES = ("float32", "float64")     # CPU; 16-bit types are storage there (no fast 16-bit BLAS)


def module_of(array):
    """numpy for a NumPy array, cupy for a CuPy array, None for anything else."""
    if isinstance(array, np.ndarray):
        return np
    cupy = sys.modules.get("cupy")      # an array of a module that nobody imported does not exist
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return None


def compute_dtype(dtype):
    """The NumPy dtype that `dtype` names. Raises InputError unless it is one that layers compute in."""
    try:
        found = None if dtype is None else np.dtype(dtype)      # NumPy takes None for float64
    except (TypeError, ValueError):
        found = None
    known = found is not None and found.name in COMPUTE_DTYPES and found.isnative
    require(known, f"dtype {dtype!r}", f"one of {', '.join(COMPUTE_DTYPES)}")
    return found
