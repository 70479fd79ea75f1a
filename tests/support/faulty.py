"""Run a command or a program with a fault on one rank: python faulty.py FAULT RANK CALLS COMMAND OPTIONS...

The fault happens in place of the rank's all-reduce number CALLS, or with "control:3" of its third control collective,
while the others wait there. COMMAND is one of mpitp, or "with", "bare", "guarded": a program of a few sums with the
context manager, without it, and under the guard.
"""
import os
import runpy
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

import mpitp
from mpitp.comm.ledger import Ledger
from mpitp.comm.mpi import MpiTransport


def spin():
    """Compute for ever."""
    while True:
        pass


def fail(error):
    """Raise an error."""
    raise error


FAULTS = {
    "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(1000),
    "spins": spin,
    "raises": lambda: fail(RuntimeError("boom")),
    "has no memory": lambda: fail(MemoryError("no room")),
    "is interrupted": lambda: fail(KeyboardInterrupt()),
    "finds bad input": lambda: fail(mpitp.InputError("found a, expected b")),
    "exits with 0": lambda: sys.exit(0),
    "exits with 3": lambda: sys.exit(3),
    "ends at once": lambda: os._exit(0),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "does another collective": lambda: GROUPS[-1].broadcast(np.ones(5)),
    "returns early": lambda: fail(Return()),
    "closes the group": lambda: (GROUPS[-1].close(), time.sleep(1000)),
    "fails in a thread": lambda: fail_in_a_thread(),
    "computes in a thread": lambda: reduce_in_a_thread(),
}
GROUPS = []


class Return(Exception):
    """The end of a program's main function."""


def fail_in_a_thread():
    """Raise in a thread, and wait."""
    import threading
    threading.Thread(target=fail, args=(RuntimeError("boom"),)).start()
    time.sleep(1000)


def reduce_in_a_thread():
    """Call a collective in another thread than the group's, and wait."""
    import threading
    threading.Thread(target=GROUPS[-1].all_reduce, args=(np.ones(3),)).start()
    time.sleep(1000)


def plant(fault, rank, calls):
    """Make the fault happen on the rank in place of an all-reduce, or of a control collective."""
    if calls.startswith("control:"):
        plant_in_control(fault, rank, int(calls.removeprefix("control:")))
        return
    right, done = MpiTransport.all_reduce, []

    def all_reduce(transport, x, op):
        done.append(x)
        if MPI.COMM_WORLD.rank == rank and len(done) == int(calls):
            FAULTS[fault]()
        right(transport, x, op)
    MpiTransport.all_reduce = all_reduce


def plant_in_control(fault, rank, calls):
    """Make the fault happen on the rank in place of a control collective."""
    right, done = Ledger.record_control, []

    def record_control(ledger, name, sent=0):
        done.append(name)
        if MPI.COMM_WORLD.rank == rank and len(done) == calls:
            FAULTS[fault]()
        return right(ledger, name, sent)
    Ledger.record_control = record_control


def sums(group):
    """A few of them, and a layer."""
    GROUPS.append(group)
    for _ in range(3):
        group.all_reduce(np.ones(3))
    mpitp.ParallelMLP(group, 10).forward(np.ones((2, 10), "f"))
    print("came to the end")


def with_block():
    """A program with the context manager."""
    with mpitp.TensorParallelGroup() as group:
        sums(group)


def bare():
    """A program without it."""
    sums(mpitp.TensorParallelGroup())


def main():
    fault, rank, calls, *words = sys.argv[1:]
    if fault != "nothing":
        plant(fault, int(rank), calls)
    try:
        if words[0] == "with":
            with_block()
        elif words[0] == "bare":
            bare()
        elif words[0] == "guarded":
            from mpitp.comm.guard import guarded
            sys.exit(guarded(bare))
        else:
            sys.argv[1:] = words
            runpy.run_module("mpitp", run_name="__main__", alter_sys=True)
    except Return:
        pass


if __name__ == "__main__":
    main()
