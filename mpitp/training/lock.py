"""The lock of a run's folder, lock.json: one job at a time writes there.

It names the host and the process. A process that died leaves it behind: on its own host the next job sees that the
process is gone; on another host it watches whether the lock is still touched, which its owner does every BEAT seconds.
"""
from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time

from ..errors import InputError

FILE = "lock.json"
BEAT = 5.0              # seconds between two touches
STALE = 30.0            # seconds without one, after which the owner on another host is taken for dead
WRITING = 1.0           # seconds that a job may take from making the lock to its contents


class FolderLock:
    """A lock on the folder of a run, for rank 0.

    Parameters
    ----------
    folder : str
        It exists.
    """

    def __init__(self, folder: str):
        self.folder, self.path = folder, os.path.join(folder, FILE)
        self.mine = this_process()
        self.is_over, self.thread = threading.Event(), threading.Thread(target=self.touch, name="lock", daemon=True)

    def acquire(self) -> str:
        """Take the lock. Returns "", or a line about the dead owner of the one that lay there.

        Raises InputError where another job has it, or where it cannot be written.
        """
        said = ""
        while not self.write():
            owner = self.read()
            if self.lives(owner):
                raise InputError(f"{self.folder}: found the lock of {described(owner)}, expected no other job that "
                                 f"writes there (where none does, remove {self.path})")
            self.remove_stale(owner)
            said = f"removed the lock of {described(owner)}, which has ended"
        self.thread.start()
        return said

    def write(self) -> bool:
        """Make the lock; return False where there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            with open(descriptor, "w", encoding="utf-8") as out:
                out.write(json.dumps(self.mine) + "\n")
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"{self.path}: found {error.strerror}, expected to write it") from None
        return True

    def read(self) -> dict:
        """Return what the lock says; {} where there is none, or nothing that could be a lock's contents."""
        deadline = time.monotonic() + WRITING
        while True:
            if os.path.isfile(self.path):
                with contextlib.suppress(OSError):
                    if found := lock_in(self.path):
                        return found
            if not os.path.lexists(self.path) or time.monotonic() > deadline:
                return {}
            time.sleep(0.05)

    def lives(self, owner: dict) -> bool:
        """Return whether the owner of a lock may still write into the folder; waits up to STALE seconds."""
        if not owner or was_requeued(owner, self.mine):
            return False
        if owner.get("host") == self.mine["host"] and owner.get("space") == self.mine["space"]:
            return start_of(owner["pid"]) == owner.get("started")
        first, deadline = self.touched(), time.monotonic() + STALE
        while self.touched() == first:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return self.touched() is not None       # None: it was released meanwhile

    def touched(self) -> int | None:
        """Return when the lock was touched, by the clock of the file system; None where there is none."""
        try:
            with open(self.path, "rb") as file:             # opening asks a network file system anew
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    def remove_stale(self, owner: dict) -> None:
        """Remove the lock of a dead owner, under a name of this process's own: of two jobs that see it, one does.

        Another job may have been faster: then what was taken away is its own lock, and comes back.
        """
        away = f"{self.path}.{self.mine['host']}.{self.mine['pid']}"
        if os.path.isdir(self.path):
            raise InputError(f"{self.path}: found a folder, expected a lock, or nothing")
        try:
            os.rename(self.path, away)
            if os.path.isfile(away) and lock_in(away) != owner:
                with contextlib.suppress(FileExistsError):
                    os.link(away, self.path)
            os.unlink(away)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(f"{self.path}: found {error.strerror}, expected a lock, or nothing") from None

    def require_own(self) -> None:
        """Raise InputError where another job has taken the lock, which it does after this one stood still for long."""
        owner = self.read()
        if owner != self.mine and (owner or not self.write()):
            raise InputError(f"{self.folder}: found the lock of {described(self.read())}, expected this job's own: "
                             f"another one writes there now")

    def touch(self) -> None:
        """Touch the lock until it is released."""
        while not self.is_over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        self.is_over.set()
        with contextlib.suppress(OSError):
            if self.read() == self.mine:
                os.unlink(self.path)


def lock_in(path: str) -> dict:
    """Return what a lock file says; {} where it holds nothing that could be a lock's contents. Raises OSError."""
    with open(path, "rb") as file, contextlib.suppress(ValueError, RecursionError):
        found = json.loads(file.read(1 << 16))
        if isinstance(found, dict) and isinstance(found.get("pid"), int):
            return found
    return {}


def this_process() -> dict:
    """Return what tells this process from any other: host, PID and the names it counts in, start, batch job."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")            # two containers may have one host's name
    return {"host": platform.node(), "space": space, "pid": os.getpid(), "started": start_of(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID", ""), "restart": os.environ.get("SLURM_RESTART_COUNT", "")}


def start_of(pid: int) -> str | None:
    """Return when a process of this host began, as the kernel counts; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()       # a zombie writes nothing
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return None
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)                         # macOS: whether there is one, not which
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return ""


def was_requeued(owner: dict, mine: dict) -> bool:
    """Return whether the owner was an earlier start of this process's own batch job."""
    return bool(mine["job"]) and owner.get("job") == mine["job"] and owner.get("restart") != mine["restart"]


def described(owner: dict) -> str:
    """Return the owner of a lock for a message."""
    if not owner:
        return "another job"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner['pid']} on {str(owner.get('host'))[:80]}{job}"
