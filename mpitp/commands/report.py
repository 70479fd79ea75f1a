"""What the reports of the commands share: where they ran, and how they are printed and written."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .. import __version__, tables
from ..comm import launch
from ..comm.group import TensorParallelGroup

Opening = tuple[str, str, str, int, int]        # the fields of a Report


@dataclass
class Report:
    """What the report of every command that computes begins with: the program, the machine and its ranks."""
    mpitp: str
    machine: str
    mpi: str
    ranks: int
    cores_per_rank: int


def opening(group: TensorParallelGroup) -> Opening:
    """Return the fields of a Report for this group, in order. Collective."""
    return (__version__, launch.machine(), launch.library_name(), group.size, launch.share_of_cores(group.comm))


def require_files(group: TensorParallelGroup, *paths: str | None) -> None:
    """Raise InputError on every rank unless rank 0 can write each of the paths; None is no path. Collective."""
    group.on_root(lambda: require_all_writable(path for path in paths if path))


def require_all_writable(paths: Iterable[str]) -> None:
    """Raise InputError unless each of the paths can be written."""
    for path in paths:
        tables.require_writable(path)


def ranks_line(result: Any) -> str:
    """Return the line that tells how many ranks computed, in which dtype and mode."""
    ranks, cores = tables.count(result.ranks, "rank"), tables.count(result.cores_per_rank, "core")
    mode = ", reproducible mode" if result.reproducible else ""
    return f"  {ranks}, {cores} a rank, {result.dtype}{mode}, {result.mpi}"


def publish(lines: Iterable[str], result: Any, schema: str, path: str | None) -> None:
    """Print the lines of a report on this rank, and write it to `path` as JSON where one is given."""
    print("\n".join(lines), flush=True)
    if path:
        tables.write_json(path, schema, result)
