"""Which array module an array belongs to, and the dtypes that are computed in."""
import sys

import numpy as np

COMPUTE_DTYPES = ("float32", "float64")     # CPU; 16-bit types are storage there (no fast 16-bit BLAS)


def module_of(array):
    """numpy for a NumPy array, cupy for a CuPy array, None for anything else."""
    if isinstance(array, np.ndarray):
        return np
    cupy = sys.modules.get("cupy")      # an array of a module that nobody imported does not exist
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return None
