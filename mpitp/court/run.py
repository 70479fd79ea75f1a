"""Run a case: on ranks that share every token, or on ranks that have tokens of their own and whole weights."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..arrays import Array
from .case import Case
from .programs import PROGRAMS
from .programs.linear import of_tokens
from .ranks import Local, Place, Ranks


def run(case: Case, rounded: Callable[[Array], Array] | None = None) -> Ranks:
    """Compute a case.

    Parameters
    ----------
    case : Case
    rounded : function, optional
        As that of `Ranks`.

    Returns
    -------
    Ranks
        With all that was kept.
    """
    ranks = Ranks(case.ranks, case.faults, rounded)
    with np.errstate(all="ignore"):
        if case.by_tokens and case.ranks > 1:
            run_by_tokens(ranks, case)
        else:
            PROGRAMS[case.kind](ranks, case)
    return ranks


def run_by_tokens(ranks: Ranks, case: Case) -> None:
    """Compute each rank's tokens, then add up over the ranks what depends on all of them."""
    assert case.tokens is not None
    counted: Local = [np.float64(0)] * case.ranks
    if case.kind == "loss":
        own = [of_tokens(case.inputs["targets"], case.tokens, rank) for rank in range(case.ranks)]
        counted = [np.float64((targets != case.options["ignore_index"]).sum()) for targets in own]
    total = ranks.changed([max(1.0, float(sum(counted)))] * case.ranks, "count_tokens")
    runs = [run_one(case, rank, total[rank], ranks.rounded) for rank in range(case.ranks)]
    place = Place(case.tokens.axis, case.tokens.parts)
    for key, kept in runs[0].kept.items():
        values = [one.kept[key].values[0] for one in runs]
        phase, name = key
        if key == ("forward", "loss"):
            ranks.keep(phase, name, ranks.total(phase, name, values, "loss_tokens"))
        elif phase == "backward" and name.endswith(("weight", "bias")):
            role = "norm_grad" if case.kind == "norm" else "token_grad"
            ranks.keep(phase, name, ranks.total(phase, name, values, role, name))
        else:
            ranks.keep(phase, name, values, place if kept.values[0].ndim else None)


def run_one(case: Case, rank: int, count: float, rounded: Callable[[Array], Array] | None) -> Ranks:
    """Compute the tokens of one rank alone; `count` is what a loss is divided by."""
    assert case.tokens is not None
    cut = partial(of_tokens, tokens=case.tokens, rank=rank)
    inputs = {name: cut(array) if array.ndim > case.tokens.axis else array for name, array in case.inputs.items()}
    faults: dict[str, Any] = {**case.faults, "count": partial(constant, count)} if case.kind == "loss" else \
        dict(case.faults)
    own = dataclasses.replace(case, configs=(case.configs[rank],), weights=(case.weights[rank],), inputs=inputs,
                              tokens=None, by_tokens=False, heads=case.heads[rank:rank + 1],
                              kv_heads=case.kv_heads[rank:rank + 1], smoothing=case.smoothing[rank:rank + 1],
                              faults=faults)
    alone = Ranks(1, own.faults, rounded)
    PROGRAMS[case.kind](alone, own)
    return alone


def constant(value: Any, values: Local) -> Local:
    """Return the same value for every rank."""
    return [value] * len(values)
