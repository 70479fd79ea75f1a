"""The verdict on a dump: what is right, what is wrong first, and which mistake explains it."""
from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from ..errors import InputError
from . import inputs
from .build import make_case
from .case import Case
from .diagnosis import Explanation, explain
from .dump import Dump, Tensor, title
from .ranks import Key
from .yardstick import Reading, Yardstick


@dataclass
class Row:
    """A Row is one tensor of the dump, judged.

    Parameters
    ----------
    phase, name, title : str
    layout, dtype : str
    verdict : str
        "right", "wrong", or "not judged".
    reading : Reading or None
        Of the rank that is farthest off; None for what is compared bit by bit.
    wrong_ranks : list of int
    why : str
        What is wrong, where no number says it.
    """
    phase: str
    name: str
    title: str
    layout: str
    dtype: str
    verdict: str
    reading: Reading | None = None
    wrong_ranks: list[int] = field(default_factory=list)
    why: str = ""


@dataclass
class Verdict:
    """What the court says.

    Parameters
    ----------
    kind : str
    ranks : int
    good : bool
    rows : list of Row
        In the order of computation.
    explanations : list of Explanation
        The likeliest first.
    notes : list of str
    unreadable : str
        Where a tensor is not made of finite numbers: which one; what comes before it is judged.
    """
    kind: str
    ranks: int
    good: bool
    rows: list[Row]
    explanations: list[Explanation]
    notes: list[str]
    unreadable: str = ""

    @property
    def first(self) -> Row | None:
        """Return the first wrong tensor in the order of computation."""
        return next((row for row in self.rows if row.verdict == "wrong"), None)


def judge(dump: Dump) -> Verdict:
    """Judge a dump.

    Parameters
    ----------
    dump : Dump

    Returns
    -------
    Verdict

    Raises
    ------
    InputError
        A dump that cannot be judged, in one line.
    """
    inputs.require_finite(dump)
    dense, on_ranks = make_case(dump)
    try:
        yard = Yardstick(dump, dense, on_ranks)
    except (ValueError, ArithmeticError, IndexError, MemoryError) as error:
        raise InputError(f"found sizes or a config that the dense side cannot compute ({error}), expected those of a "
                         f"{dump.kind}") from None
    rows = [*input_rows(dump), *weight_rows(dump)]
    require_known(dump, yard)
    notes: list[str] = []
    for key in yard.exact:
        tensor = dump.tensors.get(key)
        if tensor is None or inputs.is_input(dump, key):
            continue
        require_shape(tensor, yard)
        if any(not np.isfinite(array).all() for array in tensor.local):
            right = sum(row.verdict == "right" for row in rows)
            line = f"{inputs.located(tensor)}; of the {len(rows)} tensors before it {right} are right"
            return Verdict(dump.kind, dump.ranks, all(row.verdict == "right" for row in rows), rows, [], notes, line)
        if holds_summands(tensor):
            rows.append(row_of(tensor, "not judged", None, []))
            continue
        rows.append(judged(tensor, yard))
        notes += replicas_note(tensor, rows[-1])
    first = next((row for row in rows if row.verdict == "wrong"), None)
    explanations = explanations_of(first, rows, dump, on_ranks, yard) if first is not None else []
    return Verdict(dump.kind, dump.ranks, first is None, rows, explanations, notes)


def require_known(dump: Dump, yard: Yardstick) -> None:
    """Raise InputError for a tensor that the dense side does not compute, and for a dump without results."""
    results = 0
    for (phase, name), tensor in dump.tensors.items():
        if inputs.is_input(dump, (phase, name)):
            continue
        if (phase, name) not in yard.exact:
            known = ", ".join(title(*key) for key in yard.exact if not inputs.is_input(dump, key))
            raise InputError(f"{phase} {name}: found a tensor that a {dump.kind} does not have, expected one of "
                             f"{known[:600]}")
        results += tensor.phase in ("forward", "backward")
    if not results:
        raise InputError("found no results in the dump, expected at least one, such as y in the forward phase")


def require_shape(tensor: Tensor, yard: Yardstick) -> None:
    """Raise InputError for a tensor whose whole shape is not that of the dense side."""
    shape = yard.value((tensor.phase, tensor.name)).shape
    if tensor.layout.shape != shape:
        raise InputError(f"{tensor.phase} {tensor.name}: found whole shape {tensor.layout.shape} by its layout, "
                         f"expected {shape}")


# --- rows --------------------------------------------------------------------------------------------------------

def input_rows(dump: Dump) -> list[Row]:
    """Judge inputs: what is replicated is the same on every rank, dropout masks are as they must be."""
    rows = []
    for key, tensor in dump.tensors.items():
        if key[0] not in ("forward", "backward") or not inputs.is_input(dump, key) or dump.kind == "gradient_norm":
            continue
        why, ranks = inputs.problem(tensor)
        rows.append(row_of(tensor, "wrong" if why else "right", None, ranks, why))
    return rows


def weight_rows(dump: Dump) -> list[Row]:
    """Judge the ranks' slices of weights against the whole ones, bit by bit."""
    rows, whole = [], {name: tensor.whole() for name, tensor in dump.of_phase("reference").items()}
    for tensor in dump.of_phase("weights").values():
        why, ranks = inputs.slice_problem(tensor, whole)
        rows.append(row_of(tensor, "wrong" if why else "right", None, ranks, why))
    return rows


def row_of(tensor: Tensor, verdict: str, reading: Reading | None, ranks: list[int], why: str = "") -> Row:
    """Return the row of a tensor."""
    return Row(tensor.phase, tensor.name, tensor.title, tensor.layout.how, tensor.dtype, verdict, reading, ranks, why)


def holds_summands(tensor: Tensor) -> bool:
    """Return whether ranks that share a key/value head have their own heads' part of its gradient alone."""
    last, layout = tensor.name.rsplit(".", 1)[-1], tensor.layout
    return tensor.phase == "backward" and last in ("key", "value", "key_rotated") and layout.how == "split" and \
        sum(map(len, layout.parts)) > layout.shape[layout.axis]


def judged(tensor: Tensor, yard: Yardstick) -> Row:
    """Judge a result on every rank."""
    ranks = range(1 if tensor.layout.how == "partial" else yard.dump.ranks)
    readings = [yard.read(tensor, rank) for rank in ranks]
    worst = max(readings, key=lambda one: one.excess if np.isfinite(one.excess) else inf)
    wrong = [one.rank for one in readings if not one.good]
    return row_of(tensor, "wrong" if wrong else "right", worst, wrong)


def replicas_note(tensor: Tensor, row: Row) -> list[str]:
    """Return a note where copies of one tensor have other bits, though all are right to rounding."""
    if row.verdict != "right" or tensor.layout.how != "replicated":
        return []
    other = [rank for rank, array in enumerate(tensor.local) if not np.array_equal(array, tensor.local[0])]
    if not other:
        return []
    return [f"{tensor.title} has other bits on {inputs.listed(other)} than on rank 0: rounding, but replicas drift "
            f"apart by it"]


# --- the mistake -------------------------------------------------------------------------------------------------

def explanations_of(first: Row, rows: list[Row], dump: Dump, on_ranks: Case, yard: Yardstick) -> list[Explanation]:
    """Return what explains the first wrong tensor."""
    if first.why:
        return [Explanation(inputs.short_name(first.why), first.why, [first.title], [], True, 0.0)]
    wrong: dict[Key, bool] = {(row.phase, row.name): row.verdict == "wrong" for row in rows if row.reading is not None}
    return explain((first.phase, first.name), wrong, on_ranks, yard)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Return the verdict by the keys of the JSON."""
    first = verdict.first
    named = [one for one in verdict.explanations if one.is_named]
    return {"kind": verdict.kind, "ranks": verdict.ranks, "good": verdict.good and not verdict.unreadable,
            "unreadable": verdict.unreadable or None,
            "first_wrong": None if first is None else json_row(first),
            "mistake": named[0] if named else None, "others": named[1:],
            "facts": [one for one in verdict.explanations if not one.is_named], "notes": verdict.notes,
            "tensors": [json_row(row) for row in verdict.rows]}


def json_row(row: Row) -> dict[str, Any]:
    """Return a row by the keys of the JSON."""
    fields = {"phase": row.phase, "name": row.name, "layout": row.layout, "dtype": row.dtype, "verdict": row.verdict,
              "wrong_ranks": row.wrong_ranks, "why": row.why or None}
    return {**fields, **(vars(row.reading) if row.reading is not None else {})}
