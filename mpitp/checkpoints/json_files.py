"""Small files of a folder, which may be hostile: JSON objects, read within limits of size and of what they may hold."""
from __future__ import annotations

import codecs
import errno
import json
import os
import stat
from collections.abc import Sequence
from typing import Any

from ..errors import InputError

MOST_BYTES = 1 << 24            # of a JSON file; an index of 100,000 tensors has 10 million
# A list or an object takes 20 times the bytes of its text: so many may there be, and one more for each BYTES_OF_ONE.
CONTAINERS, BYTES_OF_ONE = 10_000, 12
LFS_POINTER = b"version "       # https://git-lfs.github.com/spec/v1; no header has a length of these 8 bytes
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
         (stat.S_ISBLK, "a device"))


def require_file(path: str, expected: str) -> None:
    """Raise InputError unless a path leads to a plain file: a pipe would be waited for, a device has no end."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected {expected}") from None
    except ValueError:                          # a name with a null character
        raise InputError(f"{path!r}: found no name of a file, expected {expected}") from None
    for is_kind, kind in KINDS:
        if is_kind(mode):
            text = os.strerror(errno.EISDIR) if kind == "a folder" else kind
            raise InputError(f"{path}: found {text}, expected {expected}")


def read_json(path: str, most: int = MOST_BYTES) -> dict:
    """Read the object in a JSON file.

    Raises InputError for a file that holds something else, a key twice, or more than a file of its kind needs.
    """
    require_file(path, "a JSON file")
    try:
        with open(path, "rb") as file:
            content = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)     # read() makes room first
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a JSON file") from None
    if len(content) > most:
        raise InputError(f"{path}: found more than {most} bytes, expected a JSON file of at most so many")
    require_no_pointer(path, content)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: found UTF-16, by its byte order mark, expected a JSON object in UTF-8")
    return parse_object(path, content.removeprefix(codecs.BOM_UTF8))    # an editor's byte order mark is no part of it


def parse_object(path: str, content: bytes, what: str = "something") -> dict:
    """Parse a JSON object; `what` says for messages what it is in the file of this path. Raises InputError."""
    containers = content.count(b"[") + content.count(b"{")
    if containers > CONTAINERS + len(content) // BYTES_OF_ONE:
        raise InputError(f"{path}: found {what} of {containers} lists and objects in {len(content)} bytes, expected "
                         f"fewer")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=Unique(path).unique)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected a JSON object") from None
    except InputError:
        raise
    except (ValueError, RecursionError):        # not JSON, a number of more digits than Python takes
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {what} that is not a JSON object, expected one")
    return value


class Unique:
    """Objects of a JSON file whose keys all differ; json.loads would take the last of two equal ones.

    path : of the file, for messages
    """

    def __init__(self, path: str):
        self.path = path

    def unique(self, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        """Make a dict of an object's (key, value) pairs. Raises InputError for a key that stands there twice."""
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise InputError(f"{self.path}: found {name[:200]!r} twice, expected every key once")
                seen.add(name)
        return values


def require_no_pointer(path: str, start: bytes) -> None:
    """Raise InputError where a file starts as what Git LFS leaves in a clone that has not fetched the file itself."""
    if start.startswith(LFS_POINTER):
        raise InputError(f"{path}: found a Git LFS pointer in place of the file, expected the file itself: "
                         f"git lfs pull")
