"""What `verify` and `verify --all` share: the head of a report, how steps are taken, JSON, and the exit status."""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..comm import launch
from ..comm.group import TensorParallelGroup
from ..oracle import Comparison
from ..verification import Step
from . import device, report


@dataclass
class VerifyReport:
    """Where it ran, and whether every check holds.

    Parameters
    ----------
    mpitp, machine, mpi : str
        The version, the processor with NumPy and BLAS, the MPI library.
    ranks : int
    device, dtype : str
    reproducible : bool
    good : bool
        Whether every check holds.
    """
    mpitp: str
    machine: str
    mpi: str
    ranks: int
    device: str
    dtype: str
    reproducible: bool
    good: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields by the keys of the JSON."""
        return dict(vars(self))


def head(group: TensorParallelGroup, dtype: Any, good: bool) -> dict[str, Any]:
    """Return the fields of a VerifyReport."""
    return dict(mpitp=__version__, machine=launch.machine(), mpi=launch.library_name(), ranks=group.size,
                device=group.device, dtype=str(dtype), reproducible=group.reproducible, good=good)


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
    with device.group_of(arguments, reproducible=arguments.reproducible, blocks=arguments.blocks,
                         check=True) as group:
        if arguments.json:
            group.root_first(lambda: report.require_writable(arguments.json) if group.rank == 0 else None)
        found = check(group, arguments)
        if found is not None:
            print("\n".join(lines(found)), flush=True)
            if arguments.json:
                report.write_json(arguments.json, schema, found.as_json())
        return 0 if group.comm.bcast(found.good if group.rank == 0 else None) else 1


def take_steps(steps: list[Step]) -> list[Any]:
    """Take the steps of a check in order, and return what each returned. Collective."""
    return [take() for _, take in steps]


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


def count(number: int, noun: str) -> str:
    """Return a number of things: "1 rank", "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
