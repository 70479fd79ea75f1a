"""How far what was found is from something else, in units of rounding: the ratios of mpitp.oracle, for any dtype.

A result may be off by what rounding explains: elementwise by its magnitude, in norm by a multiple of what a dense run
in its dtype is off. Magnitudes are worst cases; where numbers of 16 bits are stored between, they would let mistakes of
a tenth pass. There the norm is measured against the same computation with other roundings, too.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from ..arrays import Array
from ..oracle.comparison import error_ratio, limit, normwise_limit, normwise_ratio, worst_element
from ..oracle.magnitude import Magnitude
from .case import Case
from .dump import DTYPES, EPS, Dump, Tensor
from .inputs import is_input
from .layouts import Layout, take
from .ranks import Key, Kept
from .rounding import HALF, as_dtype, roundings
from .run import run

NOISE_TIMES = 3.0               # what one run may be off, in the largest error of a few
OF_SOFTMAX = 10.0               # the same where a softmax is inside, whose gradient may nearly cancel
LEAST_OF_ONE_LAYER = 8.0        # normwise, beside a quarter of what whole decoders may be off
DEEP = ("block", "decoder")
IN_FLOAT64 = 16.0               # as much more there: a mistake is a million times larger, and a gradient that nearly
EPS64 = EPS["F64"]              # cancels, as a saturated softmax's, is off by hundreds of eps


@dataclass(frozen=True)
class Reading:
    """One rank's part of a result beside what it should be.

    Parameters
    ----------
    rank : int
    error, limit : float
        Elementwise, in eps of the dtype times the magnitude.
    normwise, normwise_limit : float
        In eps of the dtype.
    dense_error : float
        What a dense run in the dtype has.
    worst : tuple of int or None
    found, expected : float
        At `worst`.
    """
    rank: int
    error: float
    limit: float
    normwise: float
    normwise_limit: float
    dense_error: float
    worst: tuple[int, ...] | None
    found: float
    expected: float

    @property
    def good(self) -> bool:
        """Return whether rounding explains it."""
        return self.error <= self.limit and self.normwise <= self.normwise_limit

    @property
    def excess(self) -> float:
        """How many times above its limit it is."""
        return max(self.error / self.limit, self.normwise / self.normwise_limit)


class Yardstick:
    """The exact results of a dump, and how far others may be from them.

    Parameters
    ----------
    dump : Dump
    dense, on_ranks : Case
        From `make_case`.
    """

    def __init__(self, dump: Dump, dense: Case, on_ranks: Case) -> None:
        self.dump, self.working = dump, working_dtype(dump)
        self.eps = EPS[self.working]
        options = {**dense.options, "eps": self.eps}
        magnitudes = {name: Magnitude(w) for name, w in dense.whole.items()}
        exact = dataclasses.replace(dense, options=options, whole=magnitudes, weights=(magnitudes,),
                                    inputs=on_magnitudes(dense.inputs))
        self.exact = run(exact).kept
        self.right = run(on_ranks)
        self.single: dict[Key, Kept] = {}
        self.noise: list[dict[Key, Kept]] = []
        if self.working != "F64":
            whole = as_dtype(dict(dense.whole), np.float32)
            narrow = dataclasses.replace(dense, whole=whole, weights=(whole,), inputs=as_dtype(dict(dense.inputs),
                                                                                               np.float32))
            ways = roundings(self.working) if self.working in HALF else [None]
            self.single = run(narrow, ways[0]).kept
            if self.working in HALF:
                self.noise = [self.single, *(run(narrow, way).kept for way in ways[1:]),
                              *(assembled(run(on_ranks, way).kept) for way in ways)]
        self.scale = max((float(np.abs(kept.values[0].value).max(initial=0)) for kept in self.exact.values()),
                         default=0.0)

    def value(self, key: Key) -> Magnitude:
        """Return the exact tensor, whole."""
        return self.exact[key].values[0]

    def eps_of(self, tensor: Tensor) -> float:
        """Return the eps that a tensor is judged by: that of its dtype, or of the coarser one that it was made from."""
        return max(EPS[tensor.dtype], self.eps)

    def read(self, tensor: Tensor, rank: int) -> Reading:
        """Compare what a rank found with the exact tensor, by the layout; of summands, their sum."""
        key, layout, eps = (tensor.phase, tensor.name), tensor.layout, self.eps_of(tensor)
        exact, size = self.value(key).value, self.value(key).size
        found = tensor.whole() if layout.how == "partial" else tensor.local[rank].astype(np.float64)
        exact, size = layout.of_rank(exact, rank), layout.of_rank(size, rank)
        times = eps / EPS64
        terms = size + np.abs(exact) if layout.how == "partial" or EPS[tensor.dtype] >= self.eps else size
        error, worst = worst_element(found, exact, terms * times)
        normwise = normwise_ratio(found, exact, self.scale) / times
        dense_error = dense_normwise = np.nan
        if self.single:
            single = layout.of_rank(self.single[key].values[0], rank).astype(np.float64)
            dense_error = error_ratio(single, exact, terms * times)
            dense_normwise = normwise_ratio(single, exact, self.scale) / times
        allowed = self.normwise_allowed(key, layout, rank, exact, eps, normwise_limit(dense_normwise))
        at = (np.nan, np.nan) if worst is None else (float(found[worst]), float(exact[worst]))
        return Reading(rank, error, limit(dense_error), normwise, allowed, dense_error, worst, *at)

    def normwise_allowed(self, key: Key, layout: Layout, rank: int, exact: Array, eps: float, loose: float) -> float:
        """Return what the normwise ratio may be; where 16-bit numbers are stored, what other roundings make of it."""
        if self.dump.accumulate in ("float16", "bfloat16"):
            return loose
        if eps == EPS64:
            return IN_FLOAT64 * loose
        if not self.noise:
            return loose if self.dump.kind in DEEP else min(loose, loose / 4 + LEAST_OF_ONE_LAYER)
        return min(loose, 1.0 + self.noise_of(key, layout, rank, exact) / eps)

    def noise_of(self, key: Key, layout: Layout, rank: int, exact: Array) -> float:
        """Return how far the computation with other roundings may be off, relative to the norm of what is exact."""
        size = np.linalg.norm(exact) if np.abs(exact).max(initial=0) > 1e-12 * self.scale else self.scale
        errors = [np.linalg.norm(layout.of_rank(one[key].values[0], rank) - exact) for one in self.noise]
        times = OF_SOFTMAX if self.dump.kind in ("attention", *DEEP) else NOISE_TIMES
        return float(times * max(errors) / size) if size > 0 else 0.0

    def fits(self, tensor: Tensor, rank: int, other: Array) -> float:
        """Return how far a rank's found numbers are from `other`, in what rounding explains: at most 1 is a match."""
        key, eps = (tensor.phase, tensor.name), self.eps_of(tensor)
        found = tensor.local[rank].astype(np.float64)
        if found.shape != np.shape(other):
            return inf
        if found.size == 0:
            return 0.0
        exact = tensor.layout.of_rank(self.value(key).value, rank)
        size = tensor.layout.of_rank(self.value(key).size, rank)
        growth = max(1.0, np.abs(other).max() / max(np.abs(exact).max(), 1e-300))
        growth = min(growth, 1e6) if np.abs(exact).max() > 1e-12 * self.scale else 1.0
        times = eps / EPS64
        size = size + size.mean()               # numbers in other places have the magnitudes of other places
        error = error_ratio(found, other, (size * growth + np.abs(other)) * times) / 4.0
        scale = max(self.scale if np.abs(other).max() <= 1e-12 * self.scale else 0.0, 0.0)
        normwise = normwise_ratio(found, other, scale) / times
        most = 64.0
        if self.noise:
            most = 2.0 + growth * self.noise_of(key, tensor.layout, rank, exact) / eps * \
                np.linalg.norm(exact) / max(np.linalg.norm(other), 1e-300)
        elif self.single:
            single = tensor.layout.of_rank(self.single[key].values[0], rank).astype(np.float64)
            most = max(most, 16 * normwise_ratio(single, exact, self.scale) / times)
        return max(error, normwise / most)


def on_magnitudes(inputs: dict[str, Any] | Any) -> dict[str, Any]:
    """Return inputs with the floating-point ones as exact Magnitudes."""
    return {name: Magnitude(a) if a.dtype.kind == "f" else a for name, a in inputs.items()}


def working_dtype(dump: Dump) -> str:
    """Return the coarsest dtype in which results are stored: errors of all that is made from them are its."""
    given = dump.options["compute_dtype"]
    found = [t.dtype for key, t in dump.tensors.items() if not is_input(dump, key) and t.dtype in EPS]
    found += [DTYPES[given]] if given is not None else []
    return max(found or ["F64"], key=lambda dtype: EPS[dtype])


def assembled(kept: dict[Key, Kept]) -> dict[Key, Kept]:
    """Return the tensors of a run on ranks as whole ones of rank 0."""
    return {key: Kept([whole_of(one)], None) for key, one in kept.items()}


def whole_of(kept: Kept) -> Array:
    """Return the whole tensor of which the ranks have parts, or rank 0's."""
    if kept.place is None:
        return np.asarray(kept.values[0])
    axis, parts = kept.place.axis, kept.place.parts
    order = np.concatenate(parts)
    joined = np.concatenate(kept.values, axis=axis)
    _, first = np.unique(order, return_index=True)
    return take(joined, first, axis)


def by_layout(kept: Kept, layout: Layout) -> list[Array] | None:
    """Return what each rank would have recorded of a tensor in this layout; None where it cannot be told."""
    if layout.how == "partial":
        return None
    if kept.place is None:
        values = [np.asarray(value) for value in kept.values]
    else:
        same = layout.how == "split" and kept.place.axis == layout.axis and \
            all(np.array_equal(a, b) for a, b in zip(kept.place.parts, layout.parts))
        if same:
            return [np.asarray(value) for value in kept.values]
        values = [whole_of(kept)] * len(kept.values)
    if values[0].shape != layout.shape:
        return None
    return [layout.of_rank(value, rank) for rank, value in enumerate(values)]
