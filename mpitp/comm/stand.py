"""Where a thread stands, and how a process is: seen from outside, so that they need not say it."""
import linecache
import os
import re
from types import FrameType
from typing import NamedTuple

HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
COMM = os.path.join(HOME, "comm") + os.sep
MPI_CALL = re.compile(r"\b(?:comm|node|COMM_WORLD)\.(\w+)\(")


class Stand(NamedTuple):
    """Where a thread stands.

    Attributes
    ----------
    at : object
        Another one wherever the thread has moved on.
    place : str
        The innermost line outside of mpitp/comm; where that is mpitp's, the program's own line behind it, too.
    is_in_comm : bool
        Whether the innermost line is in mpitp/comm.
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
    return Stand((id(innermost), innermost.f_lasti), ", called from ".join(map(line_of, places)),
                 innermost.f_code.co_filename.startswith(COMM), mpi_call(innermost))


def line_of(frame: FrameType) -> str:
    """Return a frame as "file.py:12 in function", the last two parts of the file's path."""
    file = os.sep.join(frame.f_code.co_filename.split(os.sep)[-2:])
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


def mpi_call(frame: FrameType) -> str | None:
    """Return the MPI function that the innermost frame is inside of: its line is mpitp's, and calls a communicator."""
    file = frame.f_code.co_filename
    if not file.startswith(HOME):
        return None
    found = MPI_CALL.search(linecache.getline(file, frame.f_lineno))
    return found[1] if found else None


def state(process: int) -> str:
    """Return what the system says of a process of this host, for a message."""
    try:
        with open(f"/proc/{process}/stat") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return " (there is no such process)" if os.path.isdir("/proc/self") else ""
    return {"T": " (stopped)", "t": " (stopped by a debugger)", "Z": " (dead)", "D": " (waits for a disk or network "
            "file system)"}.get(letter, "")
