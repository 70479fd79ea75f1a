"""No rank may wait for a rank that failed.

A Python exception ends one process; the others sit in their next collective for ever (measured, MPICH and
Open MPI), because the failed rank itself waits for them in MPI_Finalize. So whatever ends a rank early, an
exception, sys.exit, a failed thread, ends the job by MPI_Abort, traceback first. Bad input is different:
every rank finds the same, rank 0 says it in one line, and all leave with status 2.
"""
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from mpi4py import MPI

from ..errors import InputError

PATIENCE = 5.0      # seconds that a rank with bad input waits for the others to find the same
FORWARDING = 0.2    # seconds for the launcher to forward what was written: it drops the rest when it kills (seen)
LEAVING = 7         # tag of the messages of all_leave()
active = False      # whether guarded() runs: it ends the job then, not the group's context manager


def say(text: str) -> None:
    """Write to standard error, after what was printed. A stream that is closed is no reason to stay."""
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(Exception):
        sys.stderr.write(text)
        sys.stderr.flush()


def end_job(text: str, status: int) -> NoReturn:
    """Say why, and end every rank."""
    say(text)
    if MPI.COMM_WORLD.size > 1:
        time.sleep(FORWARDING)
    MPI.COMM_WORLD.Abort(status)
    os._exit(status)                            # MPI_Abort may return


def out_of_memory(error: Any) -> str | None:
    """Return a line about a GPU's memory where that did not suffice, else None. Works without CuPy."""
    if type(error).__name__ != "OutOfMemoryError" or not hasattr(error, "_size"):
        return None
    free, total = sys.modules["cupy"].cuda.runtime.memGetInfo()
    free, total, asked, held = (size / 2 ** 30 for size in (free, total, error._size, error._total))
    return f"found {free:.1f} of {total:.1f} GiB of the GPU's memory free, expected {asked:.1f} GiB for one more " \
           f"array beside the {held:.1f} GiB of this rank\n"


def late_rank() -> str:
    """Return a line where a kernel on the GPU gave up waiting for another rank's, which ends the process; else ""."""
    peers = sys.modules.get("mpitp.comm.gpu.peer_memory")
    return peers.gave_up() or "" if peers else ""


def abort(error: BaseException) -> NoReturn:
    """Print why this rank failed, its traceback, and end the job with a non-zero status."""
    why = "interrupted\n" if isinstance(error, KeyboardInterrupt) else out_of_memory(error) or \
        "".join(traceback.format_exception(type(error), error, error.__traceback__)) + late_rank()
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    end_job(f"mpitp: rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} ends the job: {why}", code or 1)


def succeeds(error: BaseException) -> bool:
    """Return whether an exception is sys.exit() or sys.exit(0)."""
    return isinstance(error, SystemExit) and error.code in (0, None)


def thread_failed(failed: threading.ExceptHookArgs) -> None:
    """End the job for an exception that ends a thread, unless it is sys.exit()."""
    error = failed.exc_value or RuntimeError(failed.exc_type.__name__)      # Python may leave the value out
    if not succeeds(error):
        abort(error)


def watch_threads() -> Callable[[threading.ExceptHookArgs], object]:
    """From now on an exception that ends any thread ends the job. Returns the hook that was there before."""
    before, threading.excepthook = threading.excepthook, thread_failed
    return before


def guarded(main: Callable[[], int | None]) -> int:
    """Run main() and return this rank's exit status: 0 good, 1 failed, 2 bad input.

    Collective at the end: the ranks tell each other how they leave (4 bytes each).
    """
    global active
    active = True
    with suppress(Exception):                   # there may be no standard error
        faulthandler.enable()                   # a segmentation fault in a library shows its Python line
    comm = MPI.COMM_WORLD.Dup()                 # the farewell meets no other collective
    watch_threads()
    try:
        try:
            status = main() or 0
            if sys.stdout:
                sys.stdout.flush()              # whoever reads it may be gone: that is seen here, not at exit
            return farewell(comm, status)
        except InputError as error:
            return farewell(comm, 2, f"mpitp: {error}\n")
        except SystemExit as error:
            if not succeeds(error):
                raise
            return farewell(comm, 0)            # --help
    except BaseException as error:
        if comm.size > 1:
            abort(error)
        if isinstance(error, KeyboardInterrupt):
            say("mpitp: interrupted\n")
            return 1
        if out_of_memory(error):
            say(f"mpitp: {out_of_memory(error)}")
            return 1
        if isinstance(error, BrokenPipeError):  # `| head`: nothing more is wanted
            sys.stdout = open(os.devnull, "w")              # noqa: SIM115 - as long as the process
            return 1
        raise


def farewell(comm: MPI.Intracomm, status: int, message: str | None = None) -> int:
    """Leave together: the lowest rank that has a message prints it. Aborts where the others do not follow."""
    statuses = memoryview(bytearray(4 * comm.size)).cast("i")
    request = comm.Iallgather(memoryview(bytearray(status.to_bytes(4, sys.byteorder))).cast("i"), statuses)
    deadline = time.monotonic() + PATIENCE
    while not request.Test():
        if message and time.monotonic() > deadline:     # this rank alone met bad input
            end_job(message, status)
        time.sleep(0.0005)
    if message and status not in statuses.tolist()[:comm.rank]:
        say(message)
    return status


def all_leave(comm: MPI.Comm) -> bool:
    """Return whether every rank of comm calls this within PATIENCE seconds of each other.

    By messages from each to each, which the collectives that other ranks may still wait in do not meet.
    """
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    requests = [comm.Irecv(bytearray(0), rank, LEAVING) for rank in others]
    requests += [comm.Isend(bytearray(0), rank, LEAVING) for rank in others]
    deadline = time.monotonic() + PATIENCE
    while not MPI.Request.Testall(requests):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True
