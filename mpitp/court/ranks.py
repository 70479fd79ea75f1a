"""P ranks in lockstep on one process: a tensor is a list of what each rank has of it, a sum is a sum over the list.

What a program computes is kept by phase and name, in order. A mistake changes what happens at a role, such as "row",
the sum over ranks of a row-parallel product; everything behind it then follows from the wrong numbers. With one rank
and without a mistake, a program is the dense computation, on arrays or on Magnitudes.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..arrays import Array

Local = list[Any]                   # an array, or a Magnitude, of each rank
Fault = Callable[[Local], Local]    # what the ranks have, or would add up, to what they have in its place
Key = tuple[str, str]               # phase, name


@dataclass(frozen=True, eq=False)
class Place:
    """A place says along which axis a tensor is split, and which indices each rank has.

    Parameters
    ----------
    axis : int
    parts : tuple of array of int
    """
    axis: int
    parts: tuple[Array, ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """One tensor of a run.

    Parameters
    ----------
    values : list
        Of each rank.
    place : Place or None
        How it is split; None: each rank has all of it.
    """
    values: Local
    place: Place | None


class Ranks:
    """The ranks of one run.

    Parameters
    ----------
    count : int
    faults : dict, optional
        {role: function}. A role is "row", or with the part of a block in front of it "attention.row".
    rounded : function, optional
        What a dtype makes of numbers that are stored in it or sent, to see how much rounding matters.

    Attributes
    ----------
    kept : dict
        {(phase, name): Kept}, in the order of computation.
    summands : dict
        {(phase, name): list} of the sums among them.
    """

    def __init__(self, count: int, faults: Mapping[str, Fault] | None = None,
                 rounded: Callable[[Array], Array] | None = None) -> None:
        self.count, self.faults, self.rounded = count, faults or {}, rounded
        self.kept: dict[Key, Kept] = {}
        self.summands: dict[Key, Local] = {}

    def fault(self, role: str, part: str) -> Fault | None:
        """Return what goes wrong at this role of this part."""
        return self.faults.get(f"{part}.{role}") or self.faults.get(role)

    def changed(self, values: Local, role: str, part: str = "") -> Local:
        """Return what the ranks have at a role: `values`, unless there is a mistake."""
        fault = self.fault(role, part) if role else None
        return values if fault is None else fault(values)

    def keep(self, phase: str, name: str, values: Local, place: Place | None = None, role: str = "",
             part: str = "") -> Local:
        """Keep a tensor under its name, and return what the ranks have of it."""
        values = self.changed(values, role, part)
        if self.rounded is not None:
            values = [self.rounded(value) for value in values]
        self.kept[phase, name] = Kept(values, place)
        return values

    def total(self, phase: str, name: str, summands: Local, role: str, part: str = "") -> Local:
        """Return the sum over the ranks, on each of them; its summands are kept under the name."""
        self.summands[phase, name] = summands
        fault = self.fault(role, part)
        if self.rounded is not None and self.count > 1:
            summands = [self.rounded(value) for value in summands]
        if fault is not None:
            return fault(summands)
        return [add_up(summands)] * self.count


def add_up(summands: Local) -> Any:
    """Return the sum of a list of arrays."""
    total = summands[0]
    for summand in summands[1:]:
        total = total + summand
    return total
