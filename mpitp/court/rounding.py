"""What storing numbers in a dtype does to them, and where it hurts: the same computation with other roundings."""
from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..arrays import Array
from ..oracle.magnitude import Magnitude
from .dump import EPS

HALF = ("F16", "BF16")


def stored(array: Any, dtype: str) -> Any:
    """Return float numbers as they come back out of a dtype, rounded to nearest, in the dtype that they had."""
    if isinstance(array, Magnitude) or dtype == "F64":
        return array
    narrow = np.asarray(array, np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            narrow = narrow.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = np.ascontiguousarray(narrow).view(np.uint32)
        bits = (bits + 0x7fff + ((bits >> 16) & 1)) & np.uint32(0xffff0000)
        narrow = bits.view(np.float32).reshape(narrow.shape)
    return narrow.astype(np.asarray(array).dtype)


def shaken(array: Any, dtype: str, draw: np.random.Generator) -> Any:
    """Return the numbers rounded up or down at random, once."""
    factor = 1 + EPS[dtype] * (draw.random(np.shape(array)) - 0.5)
    return stored(np.asarray(array * factor).astype(np.asarray(array).dtype), dtype)


def roundings(dtype: str) -> list:
    """Return functions for `Ranks`, each another way to round to this dtype."""
    draws = [np.random.default_rng(seed) for seed in (1, 2)]
    return [partial(stored, dtype=dtype), *(partial(shaken, dtype=dtype, draw=draw) for draw in draws)]


def as_dtype(arrays: dict[str, Array], dtype: Any) -> dict[str, Array]:
    """Return a dict with its floating-point arrays in another dtype."""
    return {name: a.astype(dtype) if a.dtype.kind == "f" else a for name, a in arrays.items()}
