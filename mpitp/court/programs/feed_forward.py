"""The feed-forward block on ranks in lockstep."""
from __future__ import annotations

from typing import Any

from ...oracle import linear
from ..activations import activation_forward
from ..case import Case, part_of
from ..ranks import Local, Place, Ranks
from .linear import column_dx, joined, keep_column, linear_backward, row_backward, row_forward, sub


def mlp_forward(ranks: Ranks, case: Case, prefix: str, x: Local) -> Any:
    """y = sum of hidden_p V_p^T over the ranks + b, hidden_p = act(x U_p^T) or act(x G_p^T) * (x U_p^T)."""
    weights = part_of(case.weights, prefix)
    place = case.places[joined(prefix, "up.weight")]
    wide = None if place is None else Place(x[0].ndim - 1, place.parts)
    gated = "gate.weight" in weights[0]
    eps = case.options.get("eps", 0.0)
    saved: list = []
    kept: dict[str, Local] = {"gate": [], "up": [], "hidden": []}
    for x_r, w in zip(x, weights):
        up, saved_up = linear.forward(x_r, sub(w, "up"))
        kept["up"].append(up)
        saved.append([saved_up, None])
        if gated:
            gate, saved[-1][1] = linear.forward(x_r, sub(w, "gate"))
            kept["gate"].append(gate)
    part = prefix.rsplit(".", 1)[-1]
    if gated:
        kept["gate"] = ranks.keep("forward", joined(prefix, "gate"), kept["gate"], wide, "gate", part)
    kept["up"] = ranks.keep("forward", joined(prefix, "up"), kept["up"], wide, "up", part)
    acts = []
    for rank, up in enumerate(kept["up"]):
        act, slope = activation_forward(kept["gate"][rank] if gated else up, case.configs[rank].activation, eps)
        acts.append((act, slope, up))
        kept["hidden"].append(act * up if gated else act)
    hidden = ranks.keep("forward", joined(prefix, "hidden"), kept["hidden"], wide, "hidden", part)
    down = None if place is None else Place(1, place.parts)
    saved_down = row_forward(ranks, case, prefix, hidden, [sub(w, "down") for w in weights], down)
    return saved, acts, saved_down, wide, down, gated


def mlp_backward(ranks: Ranks, case: Case, prefix: str, dy: Local, saved: Any, x_name: str) -> Local:
    """Compute the gradient of x, under the name of x, and of every weight."""
    inner, acts, saved_down, wide, down, gated = saved
    part = prefix.rsplit(".", 1)[-1]
    dy = ranks.keep("backward", joined(prefix, "y"), dy, None, "dy", part)
    d_hidden = row_backward(ranks, case, prefix, dy, saved_down, down, "down")
    d_hidden = ranks.keep("backward", joined(prefix, "hidden"), d_hidden, wide, "d_hidden", part)
    if gated:
        d_up = [d * act for d, (act, _, _) in zip(d_hidden, acts)]
        d_gate = [d * up * slope for d, (_, slope, up) in zip(d_hidden, acts)]
    else:
        d_up, d_gate = [d * slope for d, (_, slope, _) in zip(d_hidden, acts)], []
    dx: Local = []
    for name, d, index in (("up", d_up, 0), ("gate", d_gate, 1)):
        if not d:
            continue
        d = ranks.keep("backward", joined(prefix, name), d, wide, f"d_{name}", part)
        dx_r, gradients = zip(*[linear_backward(d_r, s[index]) for d_r, s in zip(d, inner)])
        own = ranks.changed(list(dx_r), f"dx_{name}", part)
        dx = [a + b for a, b in zip(dx, own)] if dx else own
        keep_column(ranks, case, prefix, name, list(gradients), part)
    return column_dx(ranks, x_name, dx, part, wide)
