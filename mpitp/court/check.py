"""Judge results that are at hand, in a test for one: what check_layer of mpitp.oracle does."""
from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from ..oracle.recorder import Recorder
from .dump import read_dump
from .report import head
from .verdict import Verdict, judge

Given = Mapping[str, Any]


def check_layer(kind: str, config: Any, weights: Given, inputs: Given, outputs: Given, gradients: Given, *,
                layouts: Given | None = None, options: Given | None = None) -> Verdict:
    """Judge arrays, or lists of what each rank has; raises AssertionError with three lines unless they are right."""
    others = dict(options or {})
    accumulate = others.pop("accumulate", "float32")
    folder = tempfile.mkdtemp(prefix="mpitp-check-")
    try:
        record_all(folder, kind, config, weights, (("forward", inputs), ("forward", outputs), ("backward", gradients)),
                   dict(layouts or {}), others, accumulate)
        verdict = judge(read_dump(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if verdict.unreadable:
        raise AssertionError(verdict.unreadable)
    if not verdict.good:
        raise AssertionError("\n".join(head(verdict)))
    return verdict


def record_all(folder: str, kind: str, config: Any, weights: Given, phases: Any, layouts: dict, options: dict,
               accumulate: str) -> None:
    """Write arrays as a dump. A list has one array for each rank, in the order of the ranks."""
    lists = [array for _, given in phases for array in given.values() if isinstance(array, (list, tuple))]
    ranks = len(lists[0]) if lists else 1
    recorders = [Recorder(folder, rank, ranks, kind, config, options=options, accumulate=accumulate)
                 for rank in range(ranks)]
    for name, array in weights.items():
        recorders[0].reference(name, array)
    for phase, given in phases:
        for name, array in given.items():
            phase_of, short = ("backward", name[1:]) if name in ("dx", "dy") else (phase, name)
            local = array if isinstance(array, (list, tuple)) else [array] * ranks
            if len(local) != ranks:
                raise ValueError(f"{name}: found {len(local)} arrays, expected one for each of {ranks} ranks")
            how = layouts.get(name, {})
            how = {"axis": how} if isinstance(how, int) else {"partial": True} if how == "partial" else dict(how)
            for recorder, one in zip(recorders, local):
                recorder.record(phase_of, short, one, **how)
    for recorder in recorders:
        recorder.save()
