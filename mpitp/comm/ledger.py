"""The record of every collective: how often, how much, how long. Its closed forms are tested exactly."""
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from threading import get_ident
from typing import Any, NamedTuple

from ..arrays import Array
from ..errors import InputError

# "float32" for a dtype; kept, as NumPy takes 2 us to spell one out.
dtype_name = lru_cache(str)


def memory_order(x: Array) -> str:
    """Return F for column-major arrays, C for everything that is sent row by row."""
    return "F" if x.flags.f_contiguous and not x.flags.c_contiguous else "C"


class Collective(NamedTuple):
    """A Collective is a logical operation, however it travels; its elements are the whole array's."""
    operation: str
    elements: int
    dtype: str


@dataclass
class Entry:
    """The calls, bytes sent by this rank and seconds of all the collectives of one kind."""
    calls: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0


def wire_bytes(operation: str, elements: int, itemsize: int, size: int) -> int:
    """Return the bytes that each rank must send by the bandwidth-optimal algorithm; a library may do otherwise.

    all_reduce: 2 (P-1)/P n (reduce-scatter, then all-gather); all_gather, reduce_scatter: (P-1)/P n;
    broadcast: (P-1)/P n as the mean over the ranks; gather: (P-1)/P n, which root receives.
    n = elements * itemsize, P = size.
    """
    volume = 2 if operation == "all_reduce" else 1
    return volume * elements * itemsize * (size - 1) // size


def refuse_thread(owner: int | None) -> None:
    """Raise InputError in a thread that is not the owner, where two would mix up messages, or after close (None)."""
    raise InputError("found a collective of a closed group, expected one of an open group" if owner is None else
                     "found a collective in another thread than the one that made the group, expected that one alone "
                     "(group.ledger.thread = threading.get_ident() hands the group over)")


class Recording:
    """A Recording counts one collective and its time in the ledger, unless it raises.

    A plain class, as a generator would cost more than the rest of a small call.
    """
    __slots__ = ("entries", "key", "ledger", "sent", "start")

    def __init__(self, ledger: "Ledger", entries: "defaultdict[Any, Entry]", key: Any, sent: int):
        self.ledger, self.entries, self.key, self.sent = ledger, entries, key, sent

    def __enter__(self) -> None:
        if get_ident() != self.ledger.thread:
            refuse_thread(self.ledger.thread)
        self.ledger.current = self.key
        self.start = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.ledger.current = None
        if kind is None:
            entry = self.entries[self.key]
            entry.calls += 1
            entry.wire_bytes += self.sent
            entry.seconds += time.perf_counter() - self.start


@dataclass
class Ledger:
    """A ledger counts collectives by kind, so that a long run does not grow it.

    Attributes
    ----------
    data : {Collective: Entry}
        The operations that the mathematics asks for.
    control : {str: Entry}
        Checks and reports.
    transport : str
        Name of what carries them.
    current, cleared : Collective, str or None; int
        What this rank is inside of, and the calls that clear() has forgotten: for the watchdog.
    thread : int or None
        The one thread that may call collectives: that which made the group, or was put in its place; None after close.
    """
    data: defaultdict[Collective, Entry] = field(default_factory=lambda: defaultdict(Entry))
    control: defaultdict[str, Entry] = field(default_factory=lambda: defaultdict(Entry))
    transport: str = "mpi"
    current: Collective | str | None = None
    thread: int | None = field(default_factory=get_ident)
    cleared: int = field(default=0, compare=False)

    def record_data(self, collective: Collective, sent: int) -> Recording:
        """Return a context manager that counts a data collective of which this rank sends so many bytes.

        Its time is the time until it is done, waiting for other ranks included; a call that raises is not counted.
        """
        return Recording(self, self.data, collective, sent)

    def record_control(self, name: str, sent: int = 0) -> Recording:
        """Return a context manager that counts a check or a report."""
        return Recording(self, self.control, name, sent)

    def counts(self) -> Counter:
        """Return the data collectives as a Counter, to compare with a closed form."""
        return Counter({key: entry.calls for key, entry in self.data.items()})

    def wire_bytes(self) -> int:
        """Return the bytes that this rank sent for data collectives."""
        return sum(entry.wire_bytes for entry in self.data.values())

    def seconds(self) -> float:
        """Return the time in all collectives, waiting for other ranks included."""
        return sum(entry.seconds for entries in (self.data, self.control) for entry in entries.values())

    def clear(self) -> None:
        """Forget everything."""
        self.cleared += sum(entry.calls for entries in (self.data, self.control) for entry in entries.values())
        self.data.clear()
        self.control.clear()
