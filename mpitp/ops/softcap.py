"""Numbers that are kept between -cap and cap by y = cap tanh(x / cap) (Gemma 2, arXiv 2408.00118)."""
import numpy as np

from ..arrays import Array
from ..errors import InputError
from .twin import is_cupy


def refuse_softcap(cap: float | None) -> None:
    """Raise InputError unless there is no cap: the kernels of the GPU have none."""
    if cap is not None:
        raise InputError(f"found a softcap of {cap} on a GPU, expected none: it is not supported there")


def softcap_forward(x: Array, cap: float) -> None:
    """Compute y = cap tanh(x / cap) in the place of x. Raises InputError for an array of a GPU."""
    if is_cupy(x):
        refuse_softcap(cap)
    x /= cap
    np.tanh(x, out=x)
    x *= cap


def softcap_slope(y: Array, cap: float) -> Array:
    """Compute dy/dx = 1 - (y / cap)^2, a new array."""
    slope = y / cap
    np.multiply(slope, slope, out=slope)
    return np.subtract(1, slope, out=slope)
