"""Norms on ranks in lockstep: each rank normalises all tokens, or its own."""
from __future__ import annotations

from typing import Any

from ...oracle import norm
from ..case import Case, part_of
from ..ranks import Local, Ranks
from .linear import joined, of_tokens


def norm_forward(ranks: Ranks, case: Case, prefix: str, x: Local, y_name: str) -> Any:
    """Normalise on every rank."""
    weights = part_of(case.weights, prefix)
    y, saved = zip(*[norm.forward(x_r, w, **norm.options(config))
                     for x_r, w, config in zip(x, weights, case.configs)])
    return ranks.keep("forward", y_name, list(y), None, "norm_y"), saved


def norm_backward(ranks: Ranks, case: Case, prefix: str, dy: Local, saved: Any, x_name: str) -> Local:
    """Compute the gradients; with tokens dealt over the ranks, those of the weights are sums of each rank's tokens."""
    dx, gradients = zip(*[norm.backward(d, s) for d, s in zip(dy, saved)])
    for key in ("bias", "weight"):
        if key not in gradients[0]:
            continue
        name, found = joined(prefix, key), [g[key] for g in gradients]
        if case.tokens is not None and ranks.count > 1:
            summands = [norm_gradient(key, of_tokens(dy[r], case.tokens, r), of_tokens(saved[r][0], case.tokens, r))
                        for r in range(ranks.count)]
            found = ranks.total("backward", name, summands, "norm_grad")
        ranks.keep("backward", name, found, None, f"norm_{key}_value")
    return ranks.keep("backward", x_name, list(dx))


def norm_gradient(key: str, dy: Any, xhat: Any) -> Any:
    """Return the gradient of a norm's weight or bias over some tokens."""
    d = dy if key == "bias" else dy * xhat
    return d.reshape(-1, d.shape[-1]).sum(axis=0)
