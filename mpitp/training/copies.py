"""Copies of a weight on several ranks, which must be equal: replicated ones, shared heads, copies of the model."""
from __future__ import annotations

import hashlib

from ..arrays import Array, on_host
from ..comm.group import TensorParallelGroup
from ..layers.base import ParallelLayer


def different_copies(model: ParallelLayer, world: TensorParallelGroup, is_copied: bool) -> list[str]:
    """Return of which weights the ranks hold copies that differ, sorted; equal on every rank. Collective, control.

    Parameters
    ----------
    model : ParallelLayer
    world : TensorParallelGroup
        All ranks that hold a part of it.
    is_copied : bool
        Whether there are several copies of the whole model, one a data rank.
    """
    of_ranks = world.comm.allgather(copies(model, is_copied))
    return sorted(label for label in set().union(*of_ranks)
                  if len({found[label] for found in of_ranks if label in found}) > 1)


def copies(model: ParallelLayer, is_copied: bool) -> dict[str, str]:
    """Return {parameter, key/value head or slice: SHA-256} of everything of which other ranks have a copy."""
    found, place = {}, model.group.place
    for name, spec in model.specs.items():
        w = model.weights[name]
        if spec.axis is None:
            found[name] = digest(w)
            continue
        if spec.share > 1:
            first = spec.window(place)[0].start // spec.multiple
            for head in range(len(w) // spec.multiple):
                found[f"{name}, head {first + head}"] = digest(w[head * spec.multiple:(head + 1) * spec.multiple])
        elif is_copied:
            found[f"{name}, slice of tensor rank {place.rank}"] = digest(w)
    return found


def digest(w: Array) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(on_host(w).tobytes()).hexdigest()
