"""What is split by vocabulary, on ranks in lockstep: the embedding of tokens, and the cross entropy of logits.

Roles: "embedding", "sum_exp", "target_logit", "smooth" (the sums over the vocabulary), "count", "loss".

Dimension key: V vocabulary, v ids of a rank, D hidden; ... any number of axes of tokens.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Array
from ...oracle import embedding
from ...oracle.magnitude import numbers_of
from ..case import Case
from ..ranks import Local, Place, Ranks
from .linear import joined


# --- embedding ---------------------------------------------------------------------------------------------------

def embedding_forward(ranks: Ranks, case: Case, prefix: str, ids: Array, y_name: str) -> Local:
    """y = sum over the ranks of multiplier * W_p[ids], 0 for ids of other ranks."""
    name = joined(prefix, "weight")
    place, multiplier = case.places[name], case.config.embedding_multiplier
    local = [of_rank[name] for of_rank in case.weights]
    if place is None:
        return ranks.keep("forward", y_name, [embedding.forward(ids, {"weight": w}, multiplier)[0] for w in local])
    if place.axis == 1:
        y = [embedding.forward(ids, {"weight": w}, multiplier)[0] for w in local]
        return ranks.keep("forward", y_name, y, Place(ids.ndim, place.parts))
    rows = ranks.changed([one_of(ids, part, w.dtype) for part, w in zip(place.parts, local)], "embedding_rows")
    summands = [(row @ w) * multiplier for row, w in zip(rows, local)]
    return ranks.keep("forward", y_name, ranks.total("forward", y_name, summands, "embedding"))


def one_of(ids: Array, part: Array, dtype: Any) -> Array:
    """Return (..., v): 1 where an id is that of a rank, 0 elsewhere."""
    return (ids[..., None] == part).astype(dtype)


def embedding_gradient(ranks: Ranks, case: Case, prefix: str, ids: Array, dy: Local) -> tuple[Local, Place | None]:
    """Return each rank's rows of dW, the sum of multiplier * dy over the tokens of each id, and their place."""
    place, multiplier = case.places[joined(prefix, "weight")], case.config.embedding_multiplier
    V = case.whole[joined(prefix, "weight")].shape[0]
    rows: list = [np.arange(V)] * ranks.count
    if place is not None and place.axis == 0:
        rows = list(place.parts)
    elif place is not None:
        dy = [d[..., part] for d, part in zip(dy, place.parts)]
    picked = ranks.changed([one_of(ids, part, dy[0].dtype) for part in rows], "embedding_rows")
    return [one.reshape(-1, one.shape[-1]).T @ (d * multiplier).reshape(-1, d.shape[-1])
            for one, d in zip(picked, dy)], place


def embedding_alone(ranks: Ranks, case: Case) -> None:
    """Run an embedding of tokens alone."""
    ids = case.inputs["ids"]
    embedding_forward(ranks, case, "", ids, "y")
    if "dy" in case.inputs:
        dy = ranks.keep("backward", "y", [case.inputs["dy"]] * ranks.count, None, "dy")
        gradients, place = embedding_gradient(ranks, case, "", ids, dy)
        ranks.keep("backward", "weight", gradients, place, "weight_grad")


# --- cross entropy -----------------------------------------------------------------------------------------------

def loss_forward(ranks: Ranks, case: Case, logits: Local, place: Place | None, targets: Array) -> Any:
    """loss = mean over counted tokens of (1 - s) (lse - z_target) + s (lse - mean z); the sums are over all ranks."""
    counted = targets != case.options["ignore_index"]
    V = sum(z.shape[-1] for z in logits) if place is not None else logits[0].shape[-1]
    parts: tuple[Array, ...] = (np.arange(V),) * ranks.count if place is None else place.parts
    highest = np.max([numbers_of(z).max(axis=-1, initial=-np.inf) for z in logits], axis=0)
    of_ranks = ranks.changed([highest] * ranks.count, "highest")
    shifted = [z - h[..., None] for z, h in zip(logits, of_ranks)]
    exps = [np.exp(z) for z in shifted]
    at_target = ranks.changed([one_of(targets, part, logits[0].dtype) for part in parts], "target_rows")
    at_forward = ranks.changed(at_target, "target_rows_forward")
    sums = {}
    for role, summands in (("sum_exp", [e.sum(axis=-1) for e in exps]),
                           ("target_logit", [(z * at).sum(axis=-1) for z, at in zip(shifted, at_forward)]),
                           ("smooth", [z.sum(axis=-1) for z in shifted])):
        sums[role] = summands if place is None else ranks.total("forward", role, summands, role)
    counts = ranks.changed([max(1, int(counted.sum()))] * ranks.count, "count")
    losses = []
    for rank, s in enumerate(case.smoothing):
        lse = np.log(sums["sum_exp"][rank])
        of_token = (lse - sums["target_logit"][rank]) * (1 - s)
        if s:
            of_token = of_token + (lse - sums["smooth"][rank] / V) * s
        losses.append((of_token * counted.astype(of_token.dtype)).sum() / float(counts[rank]))
    return ranks.keep("forward", "loss", losses, None, "loss"), (exps, sums, at_target, counted, counts, V)


def loss_backward(ranks: Ranks, case: Case, saved: Any) -> Local:
    """d_logits = loss_scale (softmax - (1 - s) [target] - s / V) / counted tokens, of each rank's ids."""
    exps, sums, at_target, counted, counts, V = saved
    sizes = ranks.changed([V] * ranks.count, "smooth_size")
    out = []
    for rank, s in enumerate(ranks.changed(list(case.smoothing), "smoothing_back")):
        share = (counted * (case.options["loss_scale"] / counts[rank])).astype(exps[rank].dtype)[..., None]
        p = exps[rank] / sums["sum_exp"][rank][..., None]
        out.append((p - (at_target[rank] * (1 - s) + float(s / sizes[rank]))) * share)
    return out


def loss_alone(ranks: Ranks, case: Case) -> None:
    """Run a cross entropy alone."""
    place = case.places.get("logits")
    logits = case.inputs["logits"]
    local = [logits] * ranks.count if place is None else [logits[..., part] for part in place.parts]
    _, saved = loss_forward(ranks, case, local, place, case.inputs["targets"])
    ranks.keep("backward", "logits", loss_backward(ranks, case, saved), place, "d_logits")
