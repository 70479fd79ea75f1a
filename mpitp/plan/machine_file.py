"""Machine files: what `bench --calibrate` writes and `plan` reads, JSON with units in its keys."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from .. import tables
from ..errors import InputError
from .machine import Link, Machine, Tables

SCHEMA = "mpitp.machine/1"
AXES = {"products": 3, "scores": 2, "passes": 1}            # sizes in front of the seconds of a point
ROW_MESSAGES = "all_gather", "reduce_scatter"
MOST_BYTES = 1 << 24


def default_path() -> str:
    """Return where `bench --calibrate` writes where it is given no file."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "mpitp", "machine.json")


def calibrated_here() -> tuple[Machine | None, str]:
    """Return the machine at hand, None where it was not calibrated; and a line that says so."""
    path = default_path()
    if not os.path.exists(path):
        return None, "no machine was named, and none calibrated: bench --calibrate does"
    from ..comm.launch import machine                           # which asks NumPy and the processor, not MPI
    found, here = read_machine(path), machine()
    if found.source.partition(";")[0] != here:
        return None, f"no machine was named, and {path} is of another one ({found.source.partition(';')[0]})"
    return found, f"calibrated here, {path}"


def write_machine(path: str, machine: Machine, dtype: str) -> None:
    """Write a machine that was measured, whole or not at all."""
    assert machine.tables is not None, "a named machine needs no file"
    found = asdict(machine)
    found["flops_per_second"], found["dtype"] = machine.flops_per_second[dtype], dtype
    found["tables"] = {
        **{kind: {what: as_rows(points) for what, points in getattr(machine.tables, kind).items()} for kind in AXES},
        "reads": as_rows(machine.tables.reads), "messages": as_rows(machine.tables.messages),
        "python": machine.tables.python,
        "row_messages": {what: as_rows(points) for what, points in machine.tables.row_messages.items()},
        "outside_messages": as_rows(machine.tables.outside_messages), "outside_ranks": machine.tables.outside_ranks,
        "large_reads": as_rows(machine.tables.large_reads)}
    tables.write_json(path, SCHEMA, found)


def as_rows(points: Mapping[tuple[int, ...], float]) -> list[list]:
    """Return points as rows: the sizes, then the seconds."""
    return [[*size, seconds] for size, seconds in points.items()]


def read_machine(path: str) -> Machine:
    """Return the machine of a file. Raises InputError, naming the key, for anything that is not as it should be."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        values = json.loads(text) if len(text) <= MOST_BYTES else None
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a machine file of `bench --calibrate`") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        found = values.get("schema") if isinstance(values, dict) else "no JSON object"
        raise InputError(f"{path}: found {str(found)[:60]!r}, expected a machine file, of schema {SCHEMA}")
    get = Getter(path, values)
    device = get.one("device", lambda value: value in ("cpu", "gpu"), "'cpu' or 'gpu'")
    dtype = get.one("dtype", lambda value: isinstance(value, str), "the name of a dtype")
    return Machine(
        get.text("name"), get.text("source"), device, int(get.number("ranks_per_host")),
        int(get.number("memory_bytes")), {dtype: get.number("flops_per_second")}, get.number("read_bytes_per_second"),
        get.number("pass_bytes_per_second"), get.number("python_seconds"), get.link("inside"),
        None if values.get("outside") is None else get.link("outside"), get.tables("tables"))


class Getter:
    """The keys of a machine file, each read with a check; the path is for messages."""

    def __init__(self, path: str, values: dict):
        self.path, self.values = path, values

    def one(self, key: str, good: Callable[[Any], Any], expected: str) -> Any:
        """Return the value of a key. Raises InputError where it is missing, or not good."""
        if key not in self.values:
            raise InputError(f"{self.path}: found no {key}, expected {expected} there")
        if not good(self.values[key]):
            raise InputError(f"{self.path}: found {key} = {str(self.values[key])[:60]}, expected {expected}")
        return self.values[key]

    def text(self, key: str) -> str:
        """Return a text."""
        return self.one(key, lambda value: isinstance(value, str), "a text")

    def number(self, key: str) -> float:
        """Return a positive number."""
        return self.one(key, is_positive, "a positive number")

    def link(self, key: str) -> Link:
        """Return a Link."""
        inner = Getter(f"{self.path}: {key}", self.one(key, lambda value: isinstance(value, dict), "an object"))
        return Link(inner.number("alpha_seconds"), inner.number("bytes_per_second"))

    def tables(self, key: str) -> Tables:
        """Return the Tables."""
        inner = Getter(f"{self.path}: {key}", self.one(key, lambda value: isinstance(value, dict), "an object"))
        found: dict[str, Any] = {}
        for kind, axes in AXES.items():
            of_kind = Getter(f"{inner.path}: {kind}", inner.one(kind, lambda value: isinstance(value, dict) and value,
                                                               "an object of lists"))
            found[kind] = {what: of_kind.points(what, 1 if what == "token" else axes) for what in of_kind.values}
        for what, operations in (("products", ("forward", "dx", "dw")), ("passes", ("add",)),
                                 ("scores", ("forward", "backward", "token"))):
            for operation in operations:
                Getter(f"{inner.path}: {what}", found[what]).one(operation, bool, "a list of points")
        python = inner.one("python", lambda value: isinstance(value, dict) and all(
            isinstance(seconds, (int, float)) and isfinite(seconds) for seconds in value.values()), "seconds by layer")
        by_rows: dict[str, Any] = {}
        if "row_messages" in inner.values:                      # which older files lack
            of_rows = Getter(f"{inner.path}: row_messages", inner.one("row_messages", lambda value: isinstance(
                value, dict) and set(value) <= set(ROW_MESSAGES), f"an object of {' and '.join(ROW_MESSAGES)}"))
            by_rows = {what: of_rows.points(what, 1) for what in of_rows.values}
        outside = inner.points("outside_messages", 1) if inner.values.get("outside_messages") else {}
        ranks = int(inner.number("outside_ranks")) if outside else 0
        large = inner.points("large_reads", 1) if inner.values.get("large_reads") else {}
        return Tables(found["products"], found["scores"], found["passes"], inner.points("reads", 1),
                      inner.points("messages", 1), python, by_rows, outside, ranks, large)

    def points(self, key: str, axes: int) -> dict[tuple[int, ...], float]:
        """Return points of so many sizes and a time each, which fill a grid."""
        rows = self.one(key, lambda value: isinstance(value, list) and value and all(
            isinstance(row, list) and len(row) == axes + 1 and is_positive(row[-1])
            and all(isinstance(size, int) and size >= 0 for size in row[:-1]) for row in value),
            f"a list of {axes} sizes and seconds each")
        points = {tuple(row[:-1]): float(row[-1]) for row in rows}
        count = 1
        for sizes in zip(*points):
            count *= len(set(sizes))
        if count != len(points):
            raise InputError(f"{self.path}: found {len(points)} points of {key}, expected {count}, a grid's")
        return points


def is_positive(value: object) -> bool:
    """Return whether a value is a positive, finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value > 0
