"""Which array module an array belongs to, the dtypes that are computed in, and where an operation's CuPy twin is."""
import importlib
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from .errors import InputError, require

# What annotations call an array: NumPy's, or on a GPU CuPy's, which has the same methods.
Array = np.ndarray

COMPUTE_DTYPES = ("float32", "float64")     # CPU; 16-bit types are storage there (no fast 16-bit BLAS)
HALF_DTYPES = ("float16", "bfloat16")       # the GPU multiplies them too, and adds up in float32
GPU_DTYPES = COMPUTE_DTYPES + HALF_DTYPES


def module_of(array):
    """numpy for a NumPy array, cupy for a CuPy array, None for anything else."""
    cupy = sys.modules.get("cupy")      # an array of a module that nobody imported does not exist
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    return np if isinstance(array, np.ndarray) else None


def compute_dtype(dtype, device="cpu"):
    """The NumPy dtype that `dtype` names. Raises InputError unless it is one that layers compute in on this device."""
    known = COMPUTE_DTYPES if device == "cpu" else GPU_DTYPES
    try:
        if device != "cpu" and isinstance(dtype, str) and dtype == "bfloat16":
            import ml_dtypes
            dtype = ml_dtypes.bfloat16
        found = None if dtype is None else np.dtype(dtype)      # NumPy takes None for float64
    except ImportError:
        require(False, "no ml_dtypes", "it, for dtype 'bfloat16': pip install ml_dtypes")
    except (TypeError, ValueError):
        found = None
    good = found is not None and found.name in known and found.isnative
    require(good, f"dtype {dtype!r} on device {device!r}" if dtype in HALF_DTYPES else f"dtype {dtype!r}",
            f"one of {', '.join(known)}")
    return found


@lru_cache(maxsize=None)
def sum_dtype(dtype):
    """The dtype that products of `dtype` are added up in, and gradients, norms and losses of it are computed in."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.name in HALF_DTYPES else dtype


def scaled(x, scale, out=None):
    """x * scale in the dtype of x, to `out` or a new array; x itself where scale is None."""
    if scale is None:
        return x
    xp = module_of(x)
    return xp.multiply(x, scale, out=xp.empty_like(x) if out is None else out)


def array_module(device: str) -> Any:
    """Return numpy for "cpu", cupy for "gpu". Raises InputError for another device, and where there is no CuPy."""
    if device == "cpu":
        return np
    require(device == "gpu", f"device {device!r}", "'cpu' or 'gpu'")
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"found no CuPy ({error}), expected one for device 'gpu': "
                         "pip install 'mpitp[cuda12]' or 'mpitp[cuda13]'") from None
    return cupy


def on_host(array):
    """As a NumPy array: the array itself, or a copy from the device."""
    return array.get() if hasattr(array, "get") else array


@lru_cache(maxsize=None)
def twin(name):
    """The CuPy twin of mpitp.ops.<name>: the same functions, with the same arguments, as kernels of the GPU.

    Imported when a CuPy array asks for it first, as CuPy is not everywhere.
    """
    return importlib.import_module(f".ops.cuda.{name}", __package__)
