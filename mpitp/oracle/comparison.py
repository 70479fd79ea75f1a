"""How far a result is from the exact one, in units of rounding, and how far it may be.

Two ratios, since each is blind where the other sees:

    elementwise   |found - exact| / (eps * magnitude), the largest of all elements, as ScaLAPACK's testers judge
                  (PBLAS/TESTING/pdblastst.f); sharp in one layer, and a bound that grows with every layer
    normwise      |found - exact| / (eps * |exact|), Euclidean norms; sharp in whole decoders

eps is that of the dtype of what was found. Neither is a tolerance that happens to pass: a limit is a small number, or a
small multiple of the ratio that a dense run has itself.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from .magnitude import Magnitude

DenseRun = Callable[..., Mapping[str, Any]]         # (weights, *inputs) -> {name: result}
PIECE = 1 << 18                     # elements; temporaries of a whole matrix cost more than the arithmetic
LEAST_LIMIT, TIMES_DENSE = 4.0, 2
LEAST_NORMWISE_LIMIT, TIMES_DENSE_NORMWISE = 128.0, 32
NOTHING = 1e-12                     # of the largest result: what is below is 0 but for rounding


@dataclass(frozen=True)
class Comparison:
    """A Comparison is one result beside the exact one.

    Parameters
    ----------
    name : str
        Which result it is.
    shape : tuple of int
        Its shape.
    error, dense_error : float
        The elementwise ratio of the result, and of the dense run (NaN without one).
    normwise, dense_normwise : float
        The normwise ratio of the result, and of the dense run (NaN without one).
    worst : tuple of int or None
        The index of the first element with the largest elementwise ratio; None where every element is exact, and where
        the shapes differ.
    found, exact : float
        The two numbers at `worst`; NaN without one.
    """
    name: str
    shape: tuple[int, ...]
    error: float
    dense_error: float
    normwise: float
    dense_normwise: float
    worst: tuple[int, ...] | None
    found: float
    exact: float

    @property
    def limit(self) -> float:
        """How large `error` may be: 4, or twice that of the dense run."""
        return limit(self.dense_error)

    @property
    def normwise_limit(self) -> float:
        """How large `normwise` may be: 128, or 32 times that of the dense run."""
        return normwise_limit(self.dense_normwise)

    @property
    def good(self) -> bool:
        """Whether `error` is within its limit."""
        return self.error <= self.limit

    @property
    def near(self) -> bool:
        """Whether `normwise` is within its limit."""
        return self.normwise <= self.normwise_limit

    def __str__(self) -> str:
        verdict = "ok" if self.good and self.near else "FAILED"
        text = f"{self.name} {self.shape}: error {self.error:.3g} (limit {self.limit:.3g}), normwise " \
               f"{self.normwise:.3g} (limit {self.normwise_limit:.3g})  {verdict}"
        if verdict == "ok" or self.worst is None:
            return text
        return f"{text}; worst at {list(self.worst)}: found {self.found!r}, expected {self.exact!r}"


def limit(dense_error: float = math.nan) -> float:
    """Return what an elementwise ratio may be: as good as the dense run within a factor of two, and 4 in any case.

    A dense run that overflows excuses nothing.
    """
    return max(LEAST_LIMIT, TIMES_DENSE * dense_error) if math.isfinite(dense_error) else LEAST_LIMIT


def normwise_limit(dense_normwise: float = math.nan) -> float:
    """Return what a normwise ratio may be: 32 times the dense run's, and 128 in any case."""
    if not math.isfinite(dense_normwise):
        return LEAST_NORMWISE_LIMIT
    return max(LEAST_NORMWISE_LIMIT, TIMES_DENSE_NORMWISE * dense_normwise)


# --- the two ratios ----------------------------------------------------------------------------------------------

def error_ratio(found: Array, exact: Array, magnitude: Array) -> float:
    """Return max |found - exact| / (eps * magnitude), eps of the dtype of `found`.

    0 / 0 counts as 0: exact where there is nothing to round. Another shape, and a result that is no finite number, is
    infinitely wrong.

    Parameters
    ----------
    found : array of a floating-point dtype
    exact, magnitude : array of float64, of the same shape

    Examples
    --------
    >>> one = np.ones(3)
    >>> error_ratio(one + np.finfo(float).eps, one, magnitude=2 * one)
    0.5
    """
    return worst_element(found, exact, magnitude)[0]


def worst_element(found: Array, exact: Array, magnitude: Array) -> tuple[float, tuple[int, ...] | None]:
    """Return the largest elementwise ratio, and the index of the first element that has it (None where it is 0)."""
    if found.shape != exact.shape:              # before NumPy stretches one over the other
        return math.inf, None
    largest, place = 0.0, None
    flat = found.reshape(-1), exact.reshape(-1), magnitude.reshape(-1)
    for start in range(0, found.size, PIECE):
        some, right, size = (array[start:start + PIECE] for array in flat)
        error = np.abs(some.astype(np.float64) - right)
        allowed = np.finfo(found.dtype).eps * size
        ratio = np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=allowed > 0)
        ratio[~np.isfinite(ratio)] = np.inf
        at = int(ratio.argmax())
        if ratio[at] > largest:
            largest, place = float(ratio[at]), start + at
    return largest, None if place is None else tuple(int(i) for i in np.unravel_index(place, found.shape))


def normwise_ratio(found: Array, exact: Array, scale: float = 0.0) -> float:
    """Return |found - exact| / (eps * |exact|), Euclidean norms, eps of the dtype of `found`.

    Parameters
    ----------
    found : array of a floating-point dtype
    exact : array of float64
    scale : float
        The largest number of all results that belong together. A result that is 0 but for rounding beside it is
        measured by it: softmax does not see a bias of the keys, for one, so that its gradient is 0.
    """
    if found.shape != exact.shape:
        return math.inf
    if found.size == 0:
        return 0.0
    size = np.linalg.norm(exact) if np.abs(exact).max() > NOTHING * scale else scale
    error = np.linalg.norm(found.astype(np.float64) - exact)
    if error == 0:
        return 0.0
    return float(error / (np.finfo(found.dtype).eps * size)) if size > 0 and math.isfinite(error) else math.inf


# --- both, of one result and of all ------------------------------------------------------------------------------

def compare(found: Array, exact: Array | Magnitude, magnitude: Array | None = None, *, dense: Array | None = None,
            name: str = "", scale: float = 0.0) -> Comparison:
    """Judge one result.

    Parameters
    ----------
    found : array
        The result, in the dtype that it was computed in.
    exact : Magnitude or array of float64
        The exact result: what the functions of this package make of Magnitudes, or an array with `magnitude` beside it.
    magnitude : array of float64, optional
        How large the error is if every operation errs by a relative 1. None: that of `exact`.
    dense : array, optional
        The same result of a dense run in float32, whose own errors widen the limits.
    name : str
        Which result it is.
    scale : float
        As that of `normwise_ratio`.

    Returns
    -------
    Comparison

    Examples
    --------
    >>> x = np.float32([0.1, 0.2, 0.3, 0.4])
    >>> exact = Magnitude(x).sum()
    >>> compare(x.sum(), exact, name="sum").good
    True
    >>> compare(x.sum() + np.float32(1e-5), exact, name="sum").good
    False
    """
    if isinstance(exact, Magnitude):
        right, size = exact.value, exact.size if magnitude is None else magnitude
    elif magnitude is None:
        raise ValueError("found no magnitude, expected one, or exact as a Magnitude")
    else:
        right, size = np.asarray(exact, np.float64), np.asarray(magnitude, np.float64)
    found = np.asarray(found)
    error, worst = worst_element(found, right, size)
    dense_error = dense_normwise = math.nan
    if dense is not None:
        dense_error = error_ratio(np.asarray(dense), right, size)
        dense_normwise = normwise_ratio(np.asarray(dense), right, scale)
    at_worst = (math.nan, math.nan) if worst is None else (float(found[worst]), float(right[worst]))
    normwise = normwise_ratio(found, right, scale)
    return Comparison(name, found.shape, error, dense_error, normwise, dense_normwise, worst, *at_worst)


def compare_all(found: Mapping[str, Array], dense: DenseRun, weights: Mapping[str, Array],
                *inputs: Array) -> list[Comparison]:
    """Judge every result of a computation that `dense` does on one process.

    Parameters
    ----------
    found : dict
        The results by name, on the host.
    dense : function of (weights, *inputs)
        Returns all of them by name, by the functions of this package. It is run on Magnitudes and in float32.
    weights : dict
        The dense weights.
    *inputs : array
        What else the computation depends on.

    Returns
    -------
    list of Comparison

    Raises
    ------
    ValueError
        `dense` returns other results than `found` has.
    """
    return compare_results(found, on_magnitudes(dense, weights, *inputs), in_float32(dense, weights, *inputs))


def on_magnitudes(dense: DenseRun, weights: Mapping[str, Array], *inputs: Array) -> Mapping[str, Magnitude]:
    """Run `dense` on Magnitudes: the exact results, in float64, and how large the errors of others may be."""
    return dense({name: Magnitude(w) for name, w in weights.items()}, *map(Magnitude, inputs))


def in_float32(dense: DenseRun, weights: Mapping[str, Array], *inputs: Array) -> Mapping[str, Array]:
    """Run `dense` in float32: the errors that one process has itself."""
    return dense({name: as_float32(w) for name, w in weights.items()}, *map(as_float32, inputs))


def as_float32(array: Array) -> Array:
    """Return the array in float32, itself if it is."""
    return array.astype(np.float32, copy=False)


def compare_results(found: Mapping[str, Array], exact: Mapping[str, Magnitude],
                    single: Mapping[str, Array]) -> list[Comparison]:
    """Judge every result by what `on_magnitudes` and `in_float32` returned."""
    if exact.keys() != found.keys():
        raise ValueError(f"found results {sorted(found)}, expected {sorted(exact)}")
    scale = max(float(np.abs(result.value).max(initial=0)) for result in exact.values())
    return [compare(array, exact[name], dense=single[name], name=name, scale=scale) for name, array in found.items()]
