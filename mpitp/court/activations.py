"""Activations for dumps of any dtype: the bound of relu's derivative knows how far a 16-bit number may be off."""
from __future__ import annotations

from typing import Any

import numpy as np

from ..oracle import activation
from ..oracle.magnitude import Magnitude


def activation_forward(h: Any, name: str, eps: float) -> tuple[Any, Any]:
    """Compute act(h) and act'(h) as mpitp.oracle does.

    Parameters
    ----------
    h : array or Magnitude
    name : str
    eps : float
        Of the dtype of the dump. relu may flip its slope where h is 0 but for rounding in it.
    """
    a, slope = activation.forward(h, name)      # type: Any, Any
    if isinstance(h, Magnitude) and name == "relu" and eps > 0:
        near = np.abs(h.value) <= 4 * eps * h.size
        slope = Magnitude(slope.value, slope.size + near / eps)
    return a, slope
