"""The record of every collective: how often, how much, how long. Its closed forms are tested exactly."""
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple


class Collective(NamedTuple):
    """One logical operation, however it travels: elements are those of the whole (reduced, gathered) array."""
    operation: str
    elements: int
    dtype: str


@dataclass
class Entry:
    """What is known of all the collectives of one kind."""
    calls: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0


def wire_bytes(operation, elements, itemsize, size):
    """Bytes that each rank must send, by the bandwidth-optimal algorithm; what a library really does may differ.

    all_reduce: 2 (P-1)/P n (reduce-scatter, then all-gather); all_gather, reduce_scatter: (P-1)/P n;
    broadcast: (P-1)/P n as the mean over the ranks; gather: (P-1)/P n, which root receives.
    n = elements * itemsize, P = size.
    """
    volume = 2 if operation == "all_reduce" else 1
    return volume * elements * itemsize * (size - 1) // size


class Recording:
    """One collective under way; a plain class, as a generator would cost more than the rest of a small call."""
    __slots__ = ("entries", "key", "sent", "start")

    def __init__(self, entries, key, sent):
        self.entries, self.key, self.sent = entries, key, sent

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, kind, error, trace):
        if kind is not None:
            return
        entry = self.entries.get(self.key)
        if entry is None:
            entry = self.entries[self.key] = Entry()
        entry.calls += 1
        entry.wire_bytes += self.sent
        entry.seconds += time.perf_counter() - self.start


@dataclass
class Ledger:
    """Counts collectives by kind, so that a long run does not grow it.

    data : {Collective: Entry}, the operations that the mathematics asks for
    control : {str: Entry}, checks and reports
    transport : name of what carries them
    """
    data: dict = field(default_factory=dict)
    control: dict = field(default_factory=dict)
    transport: str = "mpi"

    def record(self, kind, key, sent):
        """Count one collective, and the time until it is done (waiting for other ranks included).

        A context manager around the call; a call that raises is not counted.
        """
        return Recording(getattr(self, kind), key, sent)

    def counts(self):
        """The data collectives as a Counter, to compare with a closed form."""
        return Counter({key: entry.calls for key, entry in self.data.items()})

    def wire_bytes(self):
        """Bytes that this rank sent for data collectives."""
        return sum(entry.wire_bytes for entry in self.data.values())

    def seconds(self):
        return sum(entry.seconds for entries in (self.data, self.control) for entry in entries.values())

    def clear(self):
        self.data.clear()
        self.control.clear()
