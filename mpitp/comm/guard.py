"""No rank may wait for a rank that failed.

A Python exception ends one process; the others sit in their next collective for ever (measured, MPICH and
Open MPI), because the failed rank itself waits for them in MPI_Finalize. So whatever ends a rank early, an
exception, sys.exit, a failed thread, ends the job by MPI_Abort, traceback first. Bad input is different:
every rank finds the same, rank 0 says it in one line, and all leave with status 2.
"""
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from mpi4py import MPI

from ..errors import InputError

PATIENCE = 1.5      # seconds that a rank with bad input waits for the others to find the same
ABORTING = 5        # seconds that MPI_Abort may take before the process ends itself
FORWARDING = 0.2    # seconds for the launcher to forward what was written: it drops the rest when it kills (seen)
LEAVING = 32749     # tag of the messages of all_leave(), which a program is not likely to use in COMM_WORLD
process = os.getpid()   # one that is forked off it has no say in the job
active = False      # whether guarded() runs: it ends the job then, not the group's context manager


def say(text: str) -> None:
    """Write to standard error, after what was printed. A stream that is closed is no reason to stay."""
    with suppress(Exception):
        sys.stdout.flush()
    with suppress(Exception):
        sys.stderr.write(text)
        sys.stderr.flush()


def end_job(text: str, status: int) -> NoReturn:
    """Say why, and end every rank. Any thread may call it.

    Below MPI_THREAD_MULTIPLE MPI is for one thread at a time, which may be inside of it and stay there. MPI_Abort is
    called all the same: where it does not come to its end, the alarm ends this process, and the launcher the others. A
    process that merely ends can leave launchers waiting for the rest (seen: MPICH's, over two hosts).
    """
    say(text)
    if MPI.COMM_WORLD.size > 1:
        time.sleep(FORWARDING)
    if hasattr(signal, "alarm") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
        signal.alarm(ABORTING)                  # the kernel ends a process whose MPI_Abort waits for a broken network
    MPI.COMM_WORLD.Abort(status)
    os._exit(status)                            # MPI_Abort may return; the launcher ends the others


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
    end_job(f"mpitp: rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} ends the job, on "
            f"{socket.gethostname()}: {why}", code or 1)


def succeeds(error: BaseException) -> bool:
    """Return whether an exception is sys.exit() or sys.exit(0)."""
    return isinstance(error, SystemExit) and error.code in (0, None)


def thread_failed(failed: threading.ExceptHookArgs) -> None:
    """End the job for an exception that ends a thread while a group is open, unless it is sys.exit()."""
    watchdog: Any = sys.modules.get("mpitp.comm.watchdog")
    if os.getpid() != process or watchdog and not watchdog.is_watching() and not active:
        threading.__excepthook__(failed)        # of a process that was forked off, or after the last group
        return
    error = failed.exc_value or RuntimeError(failed.exc_type.__name__)      # Python may leave the value out
    if not succeeds(error):
        abort(error)


def watch_threads() -> Callable[[threading.ExceptHookArgs], object]:
    """From now on an exception that ends any thread ends the job. Returns the hook that was there before."""
    before, threading.excepthook = threading.excepthook, thread_failed
    return before


def uncaught(show: Callable, parent: int, kind: type[BaseException], error: BaseException,
             trace: TracebackType | None) -> None:
    """End the job for an exception that nothing has caught: sys.excepthook of every program that imports mpitp.

    Parameters
    ----------
    show : function of (kind, error, trace)
        The hook that was there before.
    parent : int
        The process that is a rank. One that was forked off it ends alone, and without MPI_Finalize, which is not its.
    kind, error, trace
        As sys.excepthook's.
    """
    if not MPI.Is_initialized() or MPI.Is_finalized() or MPI.COMM_WORLD.size == 1 or hasattr(sys, "ps1"):
        show(kind, error, trace)
    elif os.getpid() != parent:
        show(kind, error, trace)
        say("")
        os._exit(1)
    elif isinstance(error, InputError) and all_leave(MPI.COMM_WORLD):
        show(kind, error, trace)                # every rank has found bad input
    else:
        abort(error)


def leave(group: Any, error: BaseException) -> None:
    """Let an error out of the body of `with group` where it meets no rank that waits for this one; else end the job."""
    if active or succeeds(error) or os.getpid() != process:
        return                                  # guarded() ends the job; sys.exit(0) is no failure
    if group.size == 1 or isinstance(error, InputError) and all_leave(group.comm):
        group.close()
    else:
        abort(error)


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
            return farewell(comm, 2, str(error))
        except SystemExit as error:
            if not succeeds(error):
                raise
            return farewell(comm, 0)            # --help
    except BaseException as error:
        if os.getpid() != process:
            raise
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
    watchdog: Any = sys.modules.get("mpitp.comm.watchdog")
    if watchdog:
        watchdog.leave()                        # others may be inside of a collective
    statuses = memoryview(bytearray(4 * comm.size)).cast("i")
    request = comm.Iallgather(memoryview(bytearray(status.to_bytes(4, sys.byteorder))).cast("i"), statuses)
    deadline, who = time.monotonic() + PATIENCE, f"rank {comm.rank} of {comm.size} on {socket.gethostname()}"
    while not request.Test():
        if message and time.monotonic() > deadline:     # this rank alone met bad input
            end_job(f"mpitp: {who}: {message}\n", status)
        time.sleep(0.0005)
    if message and status not in statuses.tolist()[:comm.rank]:
        is_shared = statuses.tolist().count(status) == comm.size
        say(f"mpitp: {message}\n" if is_shared else f"mpitp: {who}: {message}\n")
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
