"""log.jsonl of a run: one JSON line a step, written by rank 0."""
from __future__ import annotations

import contextlib
import json
import os

from ..checkpoints.json_files import require_file
from ..errors import InputError

FILE = "log.jsonl"
LONGEST = 1 << 16       # characters of a line, which has about 150


def append_log(folder: str, step: int, figures: dict) -> None:
    """Add a step's line. Raises InputError where the file cannot be written."""
    path = os.path.join(folder, FILE)
    try:
        # Not blocking: a pipe that nothing reads is an error, not a wait without end.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with open(descriptor, "a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step, **figures}) + "\n")
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected to write it") from None


def read_log(folder: str) -> list[dict]:
    """Return the lines as dicts; one that a killed run left unfinished is skipped."""
    found, path = [], os.path.join(folder, FILE)
    if os.path.lexists(path):
        require_file(path, "a log")
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                while line := file.readline(LONGEST):
                    if len(line) == LONGEST:
                        raise InputError(f"{path}: found a line of more than {LONGEST} characters, expected a log")
                    with contextlib.suppress(ValueError, RecursionError):
                        found.append(json.loads(line))
        except OSError as error:
            raise InputError(f"{path}: found {error.strerror}, expected to read it") from None
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)
            and isinstance(line.get("loss"), float)]


def cut_log(folder: str, step: int) -> None:
    """Drop the lines of later steps, which a resumed run takes again."""
    path = os.path.join(folder, FILE)
    if not os.path.lexists(path):
        return
    lines = [line for line in read_log(folder) if line["step"] <= step]
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}.partial")        # of a run that was killed; or a pipe, which would be waited for
        with open(f"{path}.partial", "x", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(f"{path}.partial", path)
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected to write it") from None
