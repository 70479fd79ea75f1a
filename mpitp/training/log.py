"""log.jsonl of a run: one JSON line a step, written by rank 0."""
from __future__ import annotations

import contextlib
import json
import os

from ..errors import InputError

FILE = "log.jsonl"


def append_log(folder: str, step: int, figures: dict) -> None:
    """Add a step's line. Raises InputError where the file cannot be written."""
    path = os.path.join(folder, FILE)
    try:
        with open(path, "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, **figures}) + "\n")
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected to write it") from None


def read_log(folder: str) -> list[dict]:
    """Return the lines as dicts; one that a killed run left unfinished is skipped."""
    found, path = [], os.path.join(folder, FILE)
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)
            and isinstance(line.get("loss"), float)]


def cut_log(folder: str, step: int) -> None:
    """Drop the lines of later steps, which a resumed run takes again."""
    lines = [line for line in read_log(folder) if line["step"] <= step]
    path = os.path.join(folder, FILE)
    with open(f"{path}.partial", "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(f"{path}.partial", path)
