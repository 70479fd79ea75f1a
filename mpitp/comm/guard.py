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

from mpi4py import MPI

from ..errors import InputError

PATIENCE = 5.0      # seconds that a rank with bad input waits for the others to find the same
active = False      # whether guarded() runs: it ends the job then, not the group's context manager


def describe(error):
    """What is said of the error that ends the job: a traceback, or a line for sys.exit and Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted\n"
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r})\n"
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def abort(error):
    """Print why this rank failed, and end the job with a non-zero status."""
    code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    sys.stdout.flush()
    sys.stderr.write(f"mpitp: rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} ends the job: {describe(error)}")
    sys.stderr.flush()
    time.sleep(0.2)                             # the launcher drops what it has not forwarded when it kills (seen)
    MPI.COMM_WORLD.Abort(code or 1)
    os._exit(code or 1)                         # MPI_Abort may return


def guarded(main):
    """Run main() and return this rank's exit status: 0 good, 1 failed, 2 bad input.

    Collective at the end: the ranks tell each other how they leave (4 bytes each).
    """
    global active
    active = True
    faulthandler.enable()                       # a segmentation fault in a library shows its Python line
    comm = MPI.COMM_WORLD.Dup()                 # the farewell meets nobody's other collectives
    threading.excepthook = lambda failed: abort(failed.exc_value)
    try:
        try:
            return farewell(comm, main() or 0)
        except InputError as error:
            return farewell(comm, 2, f"mpitp: {error}")
        except SystemExit as error:
            if error.code not in (0, None):
                raise
            return farewell(comm, 0)            # --help
    except BaseException as error:
        if comm.size == 1 and not isinstance(error, KeyboardInterrupt):
            raise
        abort(error)


def farewell(comm, status, message=None):
    """Leave together: the lowest rank that has a message prints it. Aborts where the others do not follow."""
    statuses = memoryview(bytearray(4 * comm.size)).cast("i")
    request = comm.Iallgather(memoryview(bytearray(status.to_bytes(4, sys.byteorder))).cast("i"), statuses)
    deadline = time.monotonic() + PATIENCE
    while not request.Test():
        if message and time.monotonic() > deadline:     # this rank alone met bad input
            print(message, file=sys.stderr, flush=True)
            time.sleep(0.2)
            comm.Abort(2)
        time.sleep(0.0002 if message is None else 0.001)
    if message and 2 not in list(statuses[:comm.rank]):
        print(message, file=sys.stderr, flush=True)
    return status
