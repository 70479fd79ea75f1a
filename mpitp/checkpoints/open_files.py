"""Files that are read again and again, of which only a few are open at a time: a model may have more shards."""
from __future__ import annotations

import os
import weakref
from collections import OrderedDict

from ..errors import InputError

MOST_OPEN = 32
RECENT: OrderedDict[int, OpenFile] = OrderedDict()    # the open ones of this process, the one read last at the end


class OpenFile:
    """A file that is opened when it is read, and closed when others need the room.

    identity : (device, inode) of the file when it was checked. Raises InputError where another has taken its place.
    """

    def __init__(self, path: str, identity: tuple[int, int]):
        self.path, self.identity, self.close_once = path, identity, None

    def descriptor(self) -> int:
        """The file's descriptor, valid until the next call for another file."""
        key = id(self)
        if self.close_once is None or not self.close_once.alive:
            descriptor = os.open(self.path, os.O_RDONLY)
            status = os.fstat(descriptor)
            if (status.st_dev, status.st_ino) != self.identity:
                os.close(descriptor)
                raise InputError(f"{self.path}: found another file than the one that was checked, expected the same")
            self.number = descriptor
            self.close_once = weakref.finalize(self, close, key, descriptor)
            RECENT[key] = weakref.proxy(self)
            if len(RECENT) > MOST_OPEN:
                next(iter(RECENT.values())).close_once()
        RECENT.move_to_end(key)
        return self.number


def close(key: int, descriptor: int) -> None:
    """Close one of the open files."""
    RECENT.pop(key, None)
    os.close(descriptor)
