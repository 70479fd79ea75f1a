"""What `verify` and `verify --all` share: what their reports begin with, how steps are taken, JSON, the exit status."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..comm.group import TensorParallelGroup
from ..oracle import Comparison
from ..verification import Step
from . import device, report
from .progress import Progress


@dataclass
class VerifyReport(report.Report):
    """What both reports begin with.

    Parameters
    ----------
    device, dtype : str
    reproducible : bool
    good : bool
        Whether every check holds.
    """
    device: str
    dtype: str
    reproducible: bool
    good: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields by the keys of the JSON."""
        return dict(vars(self))


def opening(group: TensorParallelGroup, dtype: Any) -> tuple[str, str, str, int, int, str, str, bool]:
    """Return the fields of a VerifyReport in order, but for `good`. Collective."""
    return (*report.opening(group), group.device, str(dtype), group.reproducible)


def run_checks(arguments: Namespace, check: Callable[[TensorParallelGroup, Namespace], VerifyReport | None],
               lines: Callable[[Any], Iterator[str]], schema: str) -> int:
    """Run a check on a group, print and write its report. Collective.

    Parameters
    ----------
    arguments : Namespace
        The options of `verify`.
    check : function of (group, arguments)
        Returns the report on rank 0, None elsewhere.
    lines : function of a report
        Its lines for people.
    schema : str
        Of the JSON.

    Returns
    -------
    int
        The exit status: 0 when every check holds, else 1.
    """
    with device.group_of(arguments, check=True) as group:
        report.require_files(group, arguments.json)
        found = check(group, arguments)
        if found is not None:
            report.publish(lines(found), found.as_json(), schema, arguments.json)
        return 0 if group.comm.bcast(found is not None and found.good) else 1


def take_steps(steps: list[Step]) -> list[Any]:
    """Take the steps of a check in order behind a bar, and return what each returned. Collective."""
    results = []
    with Progress(steps[0][0], len(steps)) as bar:
        for name, take in steps:
            bar.what = name
            results.append(take())
            bar.advance()
    return results


def json_of(result: Any) -> dict[str, Any]:
    """Return the fields of a result, its comparisons by the keys of the JSON."""
    fields = dict(vars(result))
    fields["ratios"] = [ratio_of(comparison) for comparison in fields.pop("comparisons")]
    return fields


def ratio_of(comparison: Comparison) -> dict[str, Any]:
    """Return one comparison by the keys of the JSON."""
    return {"name": comparison.name, "shape": comparison.shape, "parallel": comparison.error,
            "dense": comparison.dense_error, "limit": comparison.limit, "good": comparison.good,
            "parallel_of_norm": comparison.normwise, "dense_of_norm": comparison.dense_normwise}
