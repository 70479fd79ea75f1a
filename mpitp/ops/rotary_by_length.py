"""Rotary frequencies that depend on how long the sequence is: dynamic scaling and LongRoPE."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import Array

if TYPE_CHECKING:
    from ..attention_config import Rotary


def frequencies_by_length(rotary: Rotary, dim: int, length: int) -> tuple[Array, float]:
    """Compute the radians per position of each of the dim / 2 pairs, and the attention factor.

    With s = max(length, L) / L, L the positions that the model was trained on:

    - dynamic: the base is multiplied by (factor s - (factor - 1))^(dim / (dim - 2)), so that it stays for s = 1.
    - longrope: pair i is divided by its long factor where length > L, else by its short one (Ding et al., arXiv
      2402.13753).

    Parameters
    ----------
    rotary : Rotary
        With "dynamic" or "longrope" scaling.
    dim : int
        Rotary features.
    length : int
        Positions of the sequence.
    """
    original = rotary.longest
    assert original is not None
    steps = -np.arange(0, dim, 2, dtype=np.float64) / dim
    if rotary.scaling == "dynamic":
        stretch = max(length, original) / original
        base = rotary.base * (rotary.factor * stretch - (rotary.factor - 1)) ** (dim / (dim - 2))
        return base ** steps, 1.0
    factors = rotary.long_factors if length > original else rotary.short_factors
    attention_factor = rotary.attention_factor
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(rotary.factor) / math.log(original)) if rotary.factor > 1 else 1.0
    return rotary.base ** steps / np.array(factors), attention_factor
