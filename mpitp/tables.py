"""Tables and units for people, JSON for programs: what commands and benchmarks print and write."""
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import InputError


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


def rate(bytes_per_second: float) -> str:
    """Return bytes a second in a decimal unit with three digits: 117e6 -> '117 MB/s', 5.12e9 -> '5.12 GB/s'."""
    giga = bytes_per_second >= 0.9995e9
    return f"{bytes_per_second / (1e9 if giga else 1e6):#.3g}".rstrip(".") + (" GB/s" if giga else " MB/s")


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers with runs of neighbours shortened: [0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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
    """Raise InputError now rather than after the work when a report could not be written there.

    A device or a pipe of that name would give way to the file, and be gone for every program of the machine.
    """
    target = os.path.realpath(path)
    folder, is_other = os.path.dirname(target), os.path.exists(target) and not os.path.isfile(target)
    if is_other or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"found no way to write {path!r}, expected a file in an existing, writable folder")


def write_json(path: str, schema: str, value: Any) -> None:
    """Write a report, whole or not at all: a temporary name, then a rename; a link stays, and its file is written."""
    require_writable(path)                      # once more: what lies there may have become something else
    target = os.path.realpath(path)
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(target), delete=False) as out:
        json.dump({"schema": schema, **plain(value)}, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, 0o644)
    os.replace(out.name, target)
