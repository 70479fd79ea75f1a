"""A rank that waits before its first group is made: of the others it knows only that they do not come.

Needs no NumPy, as commands call it before the number of BLAS threads is set.
"""
import math
import os
import socket
import sys
import threading
import time
from typing import Any

from mpi4py import MPI

from ..errors import InputError
from . import guard
from .stand import clock, where

VARIABLE = "MPITP_STALL_LIMIT"
DEFAULT_LIMIT = 600.0
ROUND = 1.0             # seconds between two looks, at most; at least 20 of them make the limit
NAME = "mpitp-watchdog-of-the-start"


def stall_limit() -> float:
    """Return the seconds of MPITP_STALL_LIMIT, or the default. Raises InputError for another text."""
    text = os.environ.get(VARIABLE) or str(DEFAULT_LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = -1
    if not (math.isfinite(limit) and limit >= 0):
        raise InputError(f"found {VARIABLE} = {text!r}, expected seconds, or 0 for no limit")
    return limit


def expect_all() -> None:
    """Watch the main thread until its first group has a watchdog that knows more: others may never come to it."""
    if not has_watch() and all(thread.name != NAME for thread in threading.enumerate()):
        threading.Thread(target=look_until_a_group, name=NAME, daemon=True).start()


def has_watch() -> bool:
    """Return whether a group of this process has been watched."""
    watchdog: Any = sys.modules.get("mpitp.comm.watchdog")
    return bool(watchdog and getattr(watchdog, "_watches", None))


def limit_now() -> float:
    """Return the limit, which an option may have changed meanwhile; infinite for none, and for what is no number."""
    try:
        return stall_limit() or math.inf
    except InputError:                          # whoever makes the group says so
        return math.inf


def this_rank() -> str:
    """Return this rank with its host."""
    return f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} on {socket.gethostname()}"


def the_others() -> str:
    """Return who may be the one that others wait for."""
    size = MPI.COMM_WORLD.size
    return f"rank {1 - MPI.COMM_WORLD.rank}" if size == 2 else f"one of the {size - 1} others"


def look_until_a_group() -> None:
    """Warn, and end the job, where the main thread waits in one MPI call of mpitp's for as long as the limit."""
    at, still, since, is_warned = None, 0.0, clock(), False
    while not has_watch():
        limit = limit_now()
        seconds = min(ROUND, limit / 20)
        time.sleep(seconds)
        stand = where(sys._current_frames().get(threading.main_thread().ident or 0))
        if stand.call is None or stand.at != at:
            at, still, since, is_warned = stand.at, 0.0, clock(), False
            continue
        still += seconds
        waits = f"{this_rank()} waits for {stand.call} since {since}, at {stand.place}; not there: {the_others()}, " \
                "of which nothing is known before the first group is made"
        if still >= limit:
            guard.end_job(f"mpitp: {waits}: the job ends after {limit:g} s (--stall-limit, {VARIABLE})\n", 1)
        elif still >= limit / 2 and not is_warned:
            is_warned = True
            guard.say(f"mpitp: warning: {waits}: the job ends in {limit - still:.0f} s (--stall-limit, {VARIABLE})\n")
