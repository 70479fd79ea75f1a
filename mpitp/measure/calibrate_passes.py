"""The operations that pass over arrays, as a Calibration times them: by their numbers of elements."""
from collections.abc import Callable, Iterator
from functools import partial
from operator import matmul
from typing import Any

import numpy as np

from ..arrays import Array
from ..ops.activation import ACTIVATIONS, activation_backward, activation_forward, add_to, gated_backward, gated_forward
from ..ops.adamw import adamw_step
from ..ops.cross_entropy import row_gradient, row_maximum, row_sums
from ..ops.embedding import embedding_backward, embedding_forward
from ..ops.greatest import greatest_of_rank
from ..ops.keys_values import append
from ..ops.linear import add_bias, bias_backward
from ..ops.norm import norm_backward, norm_forward
from ..ops.rotary import rotary_forward
from .timed_cases import Case, TimedCases



def passes(of: TimedCases) -> Iterator[Case]:
    """Yield the operations of a calibration's sizes."""
    for elements in of.sizes.elements:
        D = min(elements, 1024)
        arrays = [of.view(number, elements // D, D) for number in range(4)]
        cases = {**activations(*arrays), **others(of, *arrays), **norms(of, *arrays[:2]), **losses(of, arrays[0])}
        if D >= 64:
            cases |= of_heads(of, arrays[0])
        for what, function in cases.items():
            yield ("passes", what, (elements,)), function


def activations(x: Array, y: Array, z: Array, w: Array) -> dict[str, Callable[[], Any]]:
    """Return the activations; what overwrites its input is given a fresh one, whose copy is timed, too."""
    cases: dict[str, Callable[[], Any]] = {"copy": partial(copy, z, x)}
    for name in ACTIVATIONS:
        cases |= {name: partial(activation_forward, name, x, z), f"{name} kept": partial(activation_forward, name, x,
                                                                                         None, z),
                  f"{name} gated": partial(gated, name, x, y, z, False),
                  f"{name} gated kept": partial(gated, name, x, y, z, True)}
    return {**cases, "activation backward": partial(activation_backward, x, y, z),
            "gated backward": partial(gated_backward_of_copy, x, y, z, w)}


def copy(to: Array, x: Array) -> None:
    """Copy x."""
    to[...] = x


def gated(name: str, x: Array, y: Array, z: Array, kept: bool) -> None:
    """Run a gated activation on a copy of x."""
    copy(z, x)
    gated_forward(name, z, y, saved=kept)


def gated_backward_of_copy(x: Array, y: Array, z: Array, w: Array) -> None:
    """Run a gated activation's backward on a copy of x."""
    copy(z, x)
    gated_backward(z, (y, w, y))


def others(of: TimedCases, x: Array, y: Array, z: Array, w: Array) -> dict[str, Callable[[], Any]]:
    """Return sums, embeddings, biases, and the optimizer's step."""
    xp, D = of.xp, x.shape[1]
    ids, rows = xp.asarray(np.arange(len(x)) % 64), of.view(1, 64, D)
    moved, gradient, mean, square = (xp.ones(x.size, of.sums) for _ in range(4))
    return {"add": partial(add_to, z, x), "bias": partial(add_bias, z, of.ones(D)),
            "bias backward": partial(bias_backward, x, xp.zeros(D, of.sums)), "zero": partial(moved.fill, 0),
            "embedding": partial(embedding_forward, rows, ids),
            "embedding backward": partial(embedding_backward, x, ids, 64, xp.zeros((64, D), of.sums)),
            "sum of squares": partial(matmul, gradient, gradient),
            "adamw": partial(adamw_step, moved, gradient, mean, square, beta1=0.9, beta2=0.95, rate=1e-3,
                             root=1.0, eps=1e-8, decay=0.999, scale=0.5),
            "greatest": partial(greatest_of_rank, x.reshape(1, -1), 0)}


def norms(of: TimedCases, x: Array, y: Array) -> dict[str, Callable[[], Any]]:
    """Return both kinds of norm."""
    cases: dict[str, Callable[[], Any]] = {}
    D, xp = x.shape[1], of.xp
    for kind in ("layernorm", "rmsnorm"):
        w = of.ones(D)
        b = of.ones(D) if kind == "layernorm" else None
        cases[f"{kind} forward"] = partial(norm_forward, x, w, b, kind, 1e-5)
        saved = norm_forward(y, w, b, kind, 1e-5)[1]
        cases[f"{kind} backward"] = partial(norm_backward, x, saved, xp.zeros(D, of.sums), xp.zeros(D, of.sums))
    return cases


def losses(of: TimedCases, x: Array) -> dict[str, Callable[[], Any]]:
    """Return the loss, and its backward."""
    targets = of.xp.zeros(len(x), np.int64)
    ones = of.xp.ones(len(x), of.sums)
    return {"loss": partial(loss, x, targets),
            "loss backward": partial(row_gradient, x, 4 * ones, targets, ones, ones, None, of.xp.empty_like(x))}


def loss(x: Array, targets: Array) -> None:
    """Compute what a rank's columns add to a loss."""
    row_sums(x, row_maximum(x), targets, False)


def of_heads(of: TimedCases, x: Array) -> dict[str, Callable[[], Any]]:
    """Return rotary embedding, and what appends keys and values."""
    heads = x.reshape(1, len(x), x.shape[1] // 64, 64)
    cos, sin = (of.xp.ones((len(x), 32), of.sums) for _ in range(2))
    kept = of.view(2, 1, 2 * len(x), x.shape[1] // 64, 64)
    return {"rotary": partial(rotary_forward, heads, cos, sin, False),
            "append": partial(append, (kept, kept), (heads[:, :(len(x) + 1) // 2],) * 2,
                              of.xp.asarray(np.array([0])))}
