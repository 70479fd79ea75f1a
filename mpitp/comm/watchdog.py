"""Which rank has not arrived, and since when: a thread that looks once a second, so that a collective costs nothing.

A rank that waits in MPI for one that is stopped, wedged or gone waits for ever. This thread sees where the main thread
stands, by its stack and by the ledger's `current`, writes it where the other ranks of the host read it (heartbeats.py),
and reads theirs. It calls no MPI function, so that any thread level will do, until it ends the job by MPI_Abort; where
there are several hosts, another thread sends messages between them (mail.py). Time is counted in this thread's own
rounds: a job that was suspended, all of it, goes on.

A rank is warned of when others have waited half of the limit for it, and the job ends at the limit. Where a rank has
left the program, or closed the group, before a collective that others are inside of, the job ends after LEFT seconds.
"""
import atexit
import math
import os
import sys
import threading
import time
from typing import Any

from mpi4py import MPI

from ..errors import InputError
from . import guard
from .heartbeats import Heartbeats
from .ledger import Ledger
from .others import LEFT, Others
from .stand import Stand, clock, done, text_of, where

VARIABLE = "MPITP_STALL_LIMIT"
DEFAULT_LIMIT = 600.0
ROUND = 1.0             # seconds between two looks, at most; at least 20 of them make the limit
SPOKESMAN = 3           # rounds that the lowest waiting rank has to speak, before the next one does
CLOSED = 16             # groups that were closed and whose counts are kept

# {ranks of the world: Watch}. Groups of the same ranks share one, in the order of the program.
_watches: dict[tuple[int, ...], "Watch"] = {}


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


def watch(comm: MPI.Comm, ledger: Ledger) -> "Watch | None":
    """Watch the collectives of a group until Watch.remove(ledger); None where the limit is 0. Collective."""
    limit = stall_limit()
    if limit == 0:
        return None
    if not _watches:
        atexit.register(depart)
        guard.watch_threads()
        threading.Thread(target=look_for_ever, name="mpitp-watchdog", daemon=True).start()
    own, world = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    ranks = tuple(own.Translate_ranks(None, world))
    own.Free()
    world.Free()
    found = _watches.get(ranks)
    if found is None or MPI.UNDEFINED in ranks:     # the same answer on every rank of comm
        found = _watches[ranks] = Watch(comm)
    found.add(ledger, limit)
    return found


def leave() -> None:
    """Let the other ranks know that this one leaves the program."""
    for one in list(_watches.values()):
        one.leave()


def depart() -> None:
    """Leave, and receive what other hosts have sent: MPI_Finalize comes next."""
    leave()
    for one in list(_watches.values()):
        if one.mail and os.getpid() == one.process and not MPI.Is_finalized():
            one.mail.empty()


def look_for_ever() -> None:
    """See where this process stands, round after round, and let each of its watches judge that."""
    before: tuple = ()
    while True:
        watches = list(_watches.values())
        seconds = min([ROUND, *(one.limit / 20 for one in watches)])
        time.sleep(seconds)
        thread = next((one.thread() for one in watches if one.open), threading.main_thread().ident)
        stand = where(sys._current_frames().get(thread or 0))
        now = (stand.at, [one.groups() for one in watches])
        for one in watches:
            one.look(stand, seconds, moved=now != before)
        before = now


def is_watching() -> bool:
    """Return whether any group of this process is open."""
    return any(one.open for one in list(_watches.values()))


def is_recorded() -> bool:
    """Return whether this process is inside of a collective that a ledger records; then others' are not in question."""
    return any(ledger.current for one in list(_watches.values()) for ledger in one.ledgers())


class Watch:
    """A watch is what one rank knows of the ranks of its groups, all of which have the same ranks.

    Parameters
    ----------
    comm : mpi4py communicator
        Of these ranks, for all of which the constructor is collective.
    """

    def __init__(self, comm: MPI.Comm):
        self.rank, self.size, self.process = comm.rank, comm.size, os.getpid()
        self.beats, self.lock = Heartbeats(comm), threading.Lock()
        self.mail = self.mail_between_hosts(comm)
        self.open: dict[int, Ledger] = {}           # by number, in the order in which the groups were made
        self.closed: dict[int, int] = {}            # collectives that were done when they were closed
        self.made, self.limit = 0, DEFAULT_LIMIT
        self.round, self.still, self.is_leaving, self.is_warned = 0, 0.0, False, False
        self.stand, self.since = Stand(None, "its start", False, None), clock()
        self.others = Others(self.beats, self.mail)

    def mail_between_hosts(self, comm: MPI.Comm) -> Any:
        """Return what carries records between hosts; None where there is one, or with a warning where MPI cannot."""
        if len(self.beats.heads) == 1:
            return None
        from .mail import Mail, obstacle
        level = obstacle(comm)
        if level is None:
            return Mail(comm, self.beats)
        if self.rank == 0 and not _watches:
            guard.say(f"mpitp: warning: found {level} on several hosts, expected MPI_THREAD_MULTIPLE: the watchdog "
                      f"sees the ranks of its own host alone ({VARIABLE}=0 turns it off)\n")
        return None

    def add(self, ledger: Ledger, limit: float) -> None:
        """Watch one more group."""
        with self.lock:
            self.open[self.made] = ledger
            self.made += 1
        self.limit, self.is_leaving = limit, False
        if self.mail:
            self.mail.is_open = True
        self.write()

    def remove(self, ledger: Ledger) -> None:
        """Stop watching a group, which this rank closes."""
        with self.lock:
            for number in [number for number, one in self.open.items() if one is ledger]:
                self.closed[number] = done(self.open.pop(number))
            while len(self.closed) > CLOSED:
                del self.closed[min(self.closed)]
        own = self.write()
        if not self.open:
            self.say_last(own)

    def wait_for_ever(self) -> None:
        """Lift the limit until the next group is made: one rank is about to compute alone. Every rank calls it."""
        self.limit = math.inf

    def leave(self) -> None:
        """Let the other ranks know that this one leaves."""
        if os.getpid() == self.process:             # not a process that was forked off
            self.is_leaving, self.since = True, clock()
            self.say_last(self.write())

    def say_last(self, own: dict) -> None:
        """Let the other hosts know before the next round where this rank stands, if it is for this one to do so."""
        if self.mail and not MPI.Is_finalized():
            self.others.read(0)
            if self.others.carries_mail():
                self.mail.say_last(self.others.of_this_host(own))

    # --- a round ----------------------------------------------------------------------------------------------------

    def look(self, stand: Stand, seconds: float, moved: bool) -> None:
        """Note where this rank stands, tell the others, read theirs, and judge.

        Parameters
        ----------
        stand : Stand
        seconds : float
            Since the last look.
        moved : bool
            Whether the rank has moved on since then.
        """
        self.stand, self.round = stand, self.round + 1
        self.still = 0.0 if moved else self.still + seconds
        if moved and not self.is_leaving:
            self.is_warned, self.since = False, clock()
        own = self.write()
        self.others.read(seconds)
        if self.mail and self.open and not self.is_leaving and self.others.carries_mail():
            self.mail.post(self.others.of_this_host(own))
        self.judge(seconds)

    def ledgers(self) -> list[Ledger]:
        """Return the ledgers of the open groups."""
        with self.lock:
            return list(self.open.values())

    def thread(self) -> int | None:
        """Return the thread that computes with the groups."""
        return next((ledger.thread for ledger in self.ledgers()), None)

    def groups(self) -> dict[str, tuple[int, str | None]]:
        """Return {number: (collectives that are done, the one that this rank is inside of)} of the open groups."""
        with self.lock:
            return {str(number): (done(ledger), text_of(ledger.current)) for number, ledger in self.open.items()}

    def write(self) -> dict:
        """Tell the other ranks of the host where this one stands; returns that."""
        waits = self.stand.is_in_comm               # else it computes meanwhile, or an error has left the name behind
        groups = {number: (count, name if waits else None) for number, (count, name) in self.groups().items()}
        own = {"round": self.round, "process": self.process, "open": groups, "closed": self.closed,
               "leaving": self.is_leaving, "place": self.stand.place, "since": self.since,
               "waits": self.collective() is not None, "call": self.unrecorded()}
        self.beats.write(own)
        return own

    # --- what this rank is inside of --------------------------------------------------------------------------------

    def collective(self) -> tuple[str, int, str] | None:
        """Return (number of the group, its collectives that are done, name) of what this rank is inside of, or None.

        The number is "" where no ledger records it: what mpitp asks before and beside the collectives of groups.
        """
        for number, (count, name) in self.groups().items():
            if name and self.stand.is_in_comm:
                return number, count, name
        call = self.unrecorded()
        return ("", 0, call) if call else None

    def unrecorded(self) -> str | None:
        """Return the MPI function that no ledger records; one watch of a process has it, that of the most ranks."""
        largest = max(_watches.values(), key=lambda one: one.size, default=self)
        return None if self is not largest or is_recorded() else self.stand.call

    # --- the verdict ------------------------------------------------------------------------------------------------

    def judge(self, seconds: float) -> None:
        """Warn of ranks that others wait for, or end the job."""
        found = self.collective()
        if found is None and all(silent < self.limit for silent in self.others.silent.values()) or self.is_leaving:
            return
        number, count, name = found or ("", 0, "the device")
        patience = SPOKESMAN * seconds * self.others.lower_that_wait()
        gone = self.others.gone(number, count)
        if gone and self.still >= min(LEFT, self.limit) + patience:
            guard.end_job(f"mpitp: {self.text(name, gone)}: the job ends\n", 1)
        elif self.still >= self.limit + patience:
            guard.end_job(f"mpitp: {self.text(name, self.others.missing(number, count, name))}: the job ends after "
                          f"{self.limit:g} s (--stall-limit, {VARIABLE})\n", 1)
        elif self.still >= self.limit / 2 and not self.is_warned:
            self.is_warned = True
            if patience == 0:
                missing = self.others.missing(number, count, name)
                guard.say(f"mpitp: warning: {self.text(name, missing)}: the job ends in "
                          f"{self.limit - self.still:.0f} s (--stall-limit, {VARIABLE})\n")

    def text(self, name: str, guilty: list[str]) -> str:
        """Return the line about what this rank waits for, and those who have not arrived there."""
        return f"rank {self.rank} of {self.size} on {self.beats.hosts[self.rank]} waits for {name} since " \
               f"{self.since}, at {self.stand.place}; not there: {'; '.join(guilty)}"
