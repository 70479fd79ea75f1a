"""What a known mistake is: a name, a sentence, and the cases in which it is made."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..case import Case
from ..ranks import Local, add_up

Planted = Iterator[tuple[str, Case]]


@dataclass(frozen=True)
class Mistake:
    """A mistake that has been made before.

    Parameters
    ----------
    name : str
        Short, for programs and tables.
    plant : function of a Case
        Yields (a sentence that says what was done, the Case with the mistake); none where it cannot be made.
    """
    name: str
    plant: Callable[[Case], Planted]


# --- what happens to a list of what each rank has ------------------------------------------------------------------

def missing(summands: Local) -> Local:
    """Leave out the sum: each rank keeps its own summand."""
    return summands


def doubled(summands: Local) -> Local:
    """Sum over the ranks what was summed before."""
    return [add_up(summands) * float(len(summands))] * len(summands)


def mean(summands: Local) -> Local:
    """Divide the sum by the number of ranks."""
    return [add_up(summands) * (1.0 / len(summands))] * len(summands)


def largest(summands: Local) -> Local:
    """Take the maximum over the ranks."""
    return [np.max(summands, axis=0)] * len(summands)


def first_alone(summands: Local) -> Local:
    """Give every rank the summand of rank 0."""
    return [summands[0]] * len(summands)


def times_ranks(values: Local) -> Local:
    """Multiply by the number of ranks."""
    return [value * float(len(values)) for value in values]


def over_ranks(values: Local) -> Local:
    """Divide by the number of ranks."""
    return [value * (1.0 / len(values)) for value in values]


def left_out(values: Local) -> Local:
    """Replace by nothing."""
    return [value * 0.0 for value in values]


def on_first(values: Local) -> Local:
    """Keep it on rank 0 alone."""
    return [value * float(rank == 0) for rank, value in enumerate(values)]
