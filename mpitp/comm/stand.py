"""Where a rank stands, by its thread, its process and its ledger: seen from outside, so that it need not say it."""
import linecache
import os
import re
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:                               # it imports NumPy
    from .ledger import Ledger

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
COMM = os.path.join(HOME, "comm") + os.sep
MPI_CALL = re.compile(r"\b(?:comm|node|COMM_WORLD)\.(\w+)\(")


class Stand(NamedTuple):
    """A stand is where a thread was when it was looked at.

    Attributes
    ----------
    at : object
        Another one wherever the thread has moved on.
    place : str
        The innermost line outside of mpitp/comm; where that is mpitp's, the program's own line behind it, too.
    is_in_comm : bool
        Whether the innermost line is in mpitp/comm, or calls a communicator.
    call : str or None
        The function of a communicator that mpitp's innermost line calls.
    """
    at: object
    place: str
    is_in_comm: bool
    call: str | None


def where(innermost: FrameType | None) -> Stand:
    """Return where the thread with this innermost frame stands."""
    places: list[FrameType] = []
    frame = innermost
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((COMM, "<frozen")):
            places = [*places[:1], frame]
            if not file.startswith(HOME):
                break
        frame = frame.f_back
    if innermost is None or not places:
        return Stand(None, "its end", False, None)
    call = mpi_call(innermost)
    return Stand((id(innermost), innermost.f_lasti), ", called from ".join(map(line_of, places)),
                 call is not None or innermost.f_code.co_filename.startswith(COMM), call)


def line_of(frame: FrameType) -> str:
    """Return a frame as "file.py:12 in function", the last two parts of the file's path."""
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


def mpi_call(frame: FrameType) -> str | None:
    """Return the MPI function that the innermost frame is inside of: its line is mpitp's, and calls a communicator."""
    file = frame.f_code.co_filename
    if not file.startswith(HOME):
        return None
    found = MPI_CALL.search(linecache.getline(file, frame.f_lineno or 0))     # None between two lines
    return found[1] if found else None


def letter(process: int) -> str | None:
    """Return the letter of a process of this host in /proc, None where there is none, "?" where no system says."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return None if os.path.isdir("/proc/self") else "?"


def is_there(process: int) -> bool:
    """Return whether a process of this host is there, and not dead; True where no system says."""
    return letter(process) not in (None, "Z", "X")


def state(process: int) -> str:
    """Return what the system says of a process, for a message."""
    return {None: " (there is no such process)", "T": " (stopped)", "t": " (stopped by a debugger)", "Z": " (dead)",
            "D": " (waits for a disk or a file system of the network)"}.get(letter(process), "")


def done(ledger: "Ledger") -> int:
    """Return how many collectives of a group this rank has done."""
    while True:
        try:
            return ledger.cleared + sum(entry.calls for entries in (ledger.data, ledger.control)
                                        for entry in entries.values())
        except RuntimeError:                        # another kind was added meanwhile
            continue


def text_of(current: Any) -> str | None:
    """Return a ledger's current collective as text: "all_reduce 5120 float32"."""
    return current if current is None or isinstance(current, str) else " ".join(map(str, current))


def clock() -> str:
    """Return the time of day."""
    return time.strftime("%H:%M:%S")
