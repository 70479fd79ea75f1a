"""What commands print and write: tables for people, JSON for programs, both from the same values."""
import dataclasses
import json
import math
import os
import tempfile

from ..errors import InputError


def table(header, rows, indent="  "):
    """Lines of a table: text to the left, numbers (given as strings that start like one) to the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    return [indent + "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()
            for row in cells]


def is_number(text):
    return text[:1].isdigit() or text[:1] in "+-." and text[1:2].isdigit() or text in ("inf", "nan", "-", "")


def size(count):
    """A number of bytes in binary units: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024


def seconds(value):
    """A time in the unit that suits it: 0.0012 -> '1.20 ms'."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def plain(value):
    """Dataclasses, tuples and NaN as what JSON has: objects, lists and null."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def require_writable(path):
    """Raise InputError now rather than after the work when a report could not be written there."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"found no way to write {path!r}, expected a file in an existing, writable folder")


def write_json(path, schema, value):
    """Write a report, whole or not at all: a temporary name, then a rename."""
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(os.path.abspath(path)), delete=False) as out:
        json.dump({"schema": schema, **plain(value)}, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    os.chmod(out.name, 0o644)
    os.replace(out.name, path)
