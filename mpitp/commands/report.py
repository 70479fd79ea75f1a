"""What commands print and write: tables for people, JSON for programs, both from the same values."""
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..comm import launch
from ..comm.group import TensorParallelGroup
from ..errors import InputError

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
        require_writable(path)


def ranks_line(result: Any) -> str:
    """Return the line that tells how many ranks computed, in which dtype and mode."""
    ranks, cores = count(result.ranks, "rank"), count(result.cores_per_rank, "core")
    mode = ", reproducible mode" if result.reproducible else ""
    return f"  {ranks}, {cores} a rank, {result.dtype}{mode}, {result.mpi}"


def publish(lines: Iterable[str], result: Any, schema: str, path: str | None) -> None:
    """Print the lines of a report on this rank, and write it to `path` as JSON where one is given."""
    print("\n".join(lines), flush=True)
    if path:
        write_json(path, schema, result)


def table(header: Sequence[str], rows: Iterable[Sequence], indent: str = "  ") -> list[str]:
    """Return the lines of a table: text to the left, numbers (given as strings that start like one) to the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    return [indent + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()
            for row in cells]


def is_number(text: str) -> bool:
    """Return whether a cell belongs to a column of numbers."""
    return text[:1].isdigit() or text[:1] in "+-." and text[1:2].isdigit() or text in ("inf", "nan", "-", "")


def count(number: int, noun: str) -> str:
    """Return a number of things: (1, 'rank') -> '1 rank', (2, 'rank') -> '2 ranks'."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(count: float) -> str:
    """Return a number of bytes in binary units: 1536 -> '1.5 KiB'."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} GiB"


def seconds(value: float) -> str:
    """Return a time in the unit that suits it: 0.0012 -> '1.20 ms'."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def plain(value: Any) -> Any:
    """Return the value in JSON's types: dataclasses as objects, tuples as lists, NaN and infinities as null."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def require_writable(path: str) -> None:
    """Raise InputError now rather than after the work when a report could not be written there."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"found no way to write {path!r}, expected a file in an existing, writable folder")


def write_json(path: str, schema: str, value: Any) -> None:
    """Write a report, whole or not at all: a temporary name, then a rename."""
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(os.path.abspath(path)), delete=False) as out:
        json.dump({"schema": schema, **plain(value)}, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, 0o644)
    os.replace(out.name, path)
