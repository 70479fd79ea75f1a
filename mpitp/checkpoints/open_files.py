"""Files that are read again and again; few of them are open at a time, as a model may have more shards than that."""
from __future__ import annotations

import errno
import os
import weakref
from collections import OrderedDict

from ..errors import InputError

MOST_OPEN = 32
# What closes each open file of this process; the file that was read last stands at the end.
RECENT: OrderedDict[int, weakref.finalize] = OrderedDict()


class OpenFile:
    """A file that is opened when it is read, and closed when others need the room.

    identity : (device, inode) of the file when it was checked. Raises InputError where another has taken its place.
    """

    def __init__(self, path: str, identity: tuple[int, int]):
        self.path, self.identity = path, identity
        self.number = -1                        # not open
        self.close_once: weakref.finalize | None = None

    def descriptor(self) -> int:
        """Return the file's descriptor, valid until the next call for another file."""
        key = id(self)
        if self.close_once is None or not self.close_once.alive:
            self.number = opened(self.path)
            self.close_once = weakref.finalize(self, close, key, self.number)
            RECENT[key] = self.close_once
            status = os.fstat(self.number)
            if (status.st_dev, status.st_ino) != self.identity:
                self.close_once()
                raise InputError(f"{self.path}: found another file than the one that was checked, expected the same")
            if len(RECENT) > MOST_OPEN:
                next(iter(RECENT.values()))()
        RECENT.move_to_end(key)
        return self.number


def opened(path: str) -> int:
    """Open a file to be read; where the process may have no more of them, close the one that was read longest ago."""
    while True:
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not RECENT:
                raise
            next(iter(RECENT.values()))()


def close(key: int, descriptor: int) -> None:
    """Close one of the open files."""
    RECENT.pop(key, None)
    os.close(descriptor)
