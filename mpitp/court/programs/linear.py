"""Linear layers on ranks in lockstep: split by rows or by columns, with the sums of f and g.

Roles: "row" (the sum of g), "column_dx" (the sum of f), "row_bias", "row_bias_grad", "dy", "weight_grad".
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ...oracle import linear
from ..case import Case
from ..ranks import Local, Place, Ranks


def joined(prefix: str, name: str) -> str:
    """Return the name of a part's tensor in the whole."""
    return f"{prefix}.{name}" if prefix else name


def linear_backward(dy: Any, saved: Any) -> tuple[Any, dict[str, Any]]:
    """Compute the gradients of a linear layer, of a rank without features too."""
    x, w = saved
    if dy.shape[-1] and x.shape[-1]:
        return linear.backward(dy, saved)
    return dy @ w["weight"], {name: np.zeros(array.shape) for name, array in w.items()}


def column_linear(ranks: Ranks, case: Case) -> None:
    """Split out: y_p = x W_p^T + b_p; dx = sum of dy_p W_p over the ranks."""
    x = ranks.changed([case.inputs["x"]] * ranks.count, "input_x")
    _, place, saved = column_linear_forward(ranks, case, "", x, "y", list(case.weights))
    dy = ranks.keep("backward", "y", [case.inputs["dy"]] * ranks.count, None, "column_dy")
    if place is not None:
        dy = [d[..., part] for d, part in zip(dy, place.parts)]
    column_linear_backward(ranks, case, dy, saved, place, "x", ("bias", "weight"))


def column_linear_forward(ranks: Ranks, case: Case, prefix: str, x: Local, y_name: str,
                          weights: list) -> tuple[Local, Place | None, list]:
    """Compute y of each rank's rows of the weight of `prefix`; `weights` have the bias."""
    place = case.places[joined(prefix, "weight")]
    own = [{"weight": of_rank[joined(prefix, "weight")], **{k: b for k, b in w.items() if k == "bias"}}
           for of_rank, w in zip(case.weights, weights)]
    y, saved = zip(*[linear.forward(x_r, w) for x_r, w in zip(x, own)])
    out = None if place is None else Place(x[0].ndim - 1, place.parts)
    return ranks.keep("forward", y_name, list(y), out, "y"), out, list(saved)


def column_linear_backward(ranks: Ranks, case: Case, dy: Local, saved: list, place: Place | None, x_name: str,
                           keep: tuple[str, ...] = ()) -> tuple[Local, dict[str, Local]]:
    """Return the gradient of x, the sum over the ranks, and those of weight and bias; keep the latter before, if so."""
    dx, gradients = zip(*[linear_backward(d, s) for d, s in zip(dy, saved)])
    found = {key: [g[key] for g in gradients] for key in ("bias", "weight") if key in gradients[0]}
    for key in keep:
        if key in found:
            found[key] = ranks.keep("backward", key, found[key], case.places[key], "weight_grad")
    return column_dx(ranks, x_name, list(dx), "head", place), found


def row_linear(ranks: Ranks, case: Case) -> None:
    """Split in: y = sum of x_p W_p^T over the ranks + b; dx_p = dy W_p."""
    place, x = case.places["weight"], case.inputs["x"]
    inside = None if place is None else Place(x.ndim - 1, place.parts)
    x = [x] * ranks.count if place is None else [x[..., part] for part in place.parts]
    x = ranks.changed(x, "row_x")
    saved = row_forward(ranks, case, "", x, list(case.weights), place)
    dy = ranks.keep("backward", "y", [case.inputs["dy"]] * ranks.count, None, "dy")
    dx = row_backward(ranks, case, "", dy, saved, place)
    ranks.keep("backward", "x", dx, inside, "row_dx")


def row_forward(ranks: Ranks, case: Case, prefix: str, x: Local, w: list, place: Place | None) -> list:
    """Compute y of a row-parallel product, and keep it as the y of this part."""
    part, name = prefix.rsplit(".", 1)[-1], joined(prefix, "y")
    summands, saved = zip(*[linear.forward(x_r, {"weight": w_r["weight"]}) for x_r, w_r in zip(x, w)])
    y = list(summands) if place is None else ranks.total("forward", name, list(summands), "row", part)
    if "bias" in w[0]:
        bias = ranks.changed([w_r["bias"] for w_r in w], "row_bias", part)
        y = [y_r + b_r for y_r, b_r in zip(y, bias)]
    ranks.keep("forward", name, y, None, "y", part)
    return [(s, "bias" in w_r) for s, w_r in zip(saved, w)]


def row_backward(ranks: Ranks, case: Case, prefix: str, dy: Local, saved: list, place: Place | None,
                 inner: str = "") -> Local:
    """Keep the gradients of weight and bias, and return each rank's dx; `inner` is "down" of "mlp", for one."""
    part = prefix.rsplit(".", 1)[-1]
    if saved[0][1]:
        bias_gradient(ranks, case, joined(prefix, joined(inner, "bias")), dy, part)
    of_sum = ranks.changed(dy, "g_dy", part)
    dx, gradients = zip(*[linear_backward(d, s) for d, (s, _) in zip(of_sum, saved)])
    ranks.keep("backward", joined(prefix, joined(inner, "weight")), [g["weight"] for g in gradients], place,
               "weight_grad", part)
    return list(dx)


def bias_gradient(ranks: Ranks, case: Case, name: str, dy: Local, part: str) -> None:
    """Keep the gradient of a bias that all ranks have: with tokens dealt over them, a sum of each rank's tokens."""
    sums = [d.reshape(-1, d.shape[-1]).sum(axis=0) for d in dy]
    if case.tokens is not None and ranks.count > 1:
        mine = [of_tokens(d, case.tokens, rank) for rank, d in enumerate(dy)]
        summands = [d.reshape(-1, d.shape[-1]).sum(axis=0) for d in mine]
        sums = ranks.total("backward", name, summands, "row_bias_grad", part)
    ranks.keep("backward", name, sums, None, "row_bias_value", part)


def of_tokens(x: Any, tokens: Place, rank: int) -> Any:
    """Return the tokens of one rank."""
    return x[(slice(None),) * tokens.axis + (tokens.parts[rank],)]


def keep_column(ranks: Ranks, case: Case, prefix: str, name: str, gradients: list, part: str) -> None:
    """Keep the gradients of a column-parallel weight and its bias."""
    for key in ("bias", "weight"):
        if key in gradients[0]:
            full = joined(prefix, f"{name}.{key}")
            ranks.keep("backward", full, [g[key] for g in gradients], case.places[full], "weight_grad", part)


def column_dx(ranks: Ranks, x_name: str, dx: Local, part: str, place: Place | None) -> Local:
    """Return f's backward: the sum of the ranks' gradients of what they all had."""
    if place is not None:
        dx = ranks.total("backward", x_name, dx, "column_dx", part)
    return ranks.keep("backward", x_name, dx, None, "dx", part)


def sub(w: Any, name: str) -> dict[str, Any]:
    """Return the weights of a part, under their names inside it."""
    return linear.part(w, name)
