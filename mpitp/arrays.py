"""Which array module an array or a device has, and the dtypes that are computed in."""
import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .errors import InputError

# What annotations call an array: NumPy's, or on a GPU CuPy's, which has the same methods.
Array = np.ndarray
# What they call an array that must be CuPy's, whose methods get and set, and data.ptr, no type describes.
DeviceArray = Any

COMPUTE_DTYPES = ("float32", "float64")     # CPU; 16-bit types are storage there (no fast 16-bit BLAS)
HALF_DTYPES = ("float16", "bfloat16")       # the GPU multiplies them too, and adds up in float32
GPU_DTYPES = COMPUTE_DTYPES + HALF_DTYPES


def module_of(array: Any) -> ModuleType | None:
    """Find the array module of an array: numpy or cupy, None for anything else, and for a masked array."""
    cupy = sys.modules.get("cupy")      # an array of a module that was never imported does not exist
    if cupy is not None and isinstance(array, cupy.ndarray):
        return cupy
    if type(array) is np.ndarray:
        return np
    return np if isinstance(array, np.ndarray) and not hasattr(array, "mask") else None


def array_module(device: str) -> ModuleType:
    """Import the array module of a device, numpy or cupy. Raises InputError for an unknown device, a missing CuPy."""
    if device == "cpu":
        return np
    if device != "gpu":
        raise InputError(f"found device {device!r}, expected 'cpu' or 'gpu'")
    try:
        import cupy
    except ImportError as error:
        raise InputError(f"found no CuPy ({error}), expected one for device 'gpu': "
                         "pip install 'mpitp[cuda12]' or 'mpitp[cuda13]'") from None
    return cupy


def compute_dtype(dtype: DTypeLike | None, device: str = "cpu") -> np.dtype:
    """Find the NumPy dtype that `dtype` names.

    Raises InputError unless it is one that layers compute in on this device, in the byte order of the machine.
    """
    known = COMPUTE_DTYPES if device == "cpu" else GPU_DTYPES
    try:
        if device != "cpu" and isinstance(dtype, str) and dtype == "bfloat16":
            import ml_dtypes
            dtype = ml_dtypes.bfloat16
        found = None if dtype is None else np.dtype(dtype)      # NumPy takes None for float64
    except ImportError:
        raise InputError("found no ml_dtypes, expected it, for dtype 'bfloat16': pip install ml_dtypes") from None
    except (TypeError, ValueError):
        found = None
    if found is None or found.name not in known or not found.isnative:
        where = f" on device {device!r}" if dtype in HALF_DTYPES else ""
        raise InputError(f"found dtype {dtype!r}{where}, expected one of {', '.join(known)}")
    return found


@cache
def sum_dtype(dtype: DTypeLike) -> np.dtype:
    """Find what sums of `dtype` are computed in, and gradients, norms and losses: float32 for 16 bits, else itself."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.name in HALF_DTYPES else dtype


def is_writable(array: Array) -> bool:
    """Tell whether results may be put into an array as it lies: C-contiguous, and on the host aligned and writable."""
    return array.flags.c_contiguous and getattr(array.flags, "carray", True)


def scaled(x: Array, scale: float | Array | None, out: Array | None = None) -> Array:
    """Compute x * scale in the dtype of x, to `out` or a new array; return x itself where scale is None."""
    if scale is None:
        return x
    xp = module_of(x) or np
    return xp.multiply(x, scale, out=xp.empty_like(x) if out is None else out)


def on_host(array: Array) -> Array:
    """Return the array as a NumPy array: itself, or a copy from the device."""
    return array.get() if hasattr(array, "get") else array
