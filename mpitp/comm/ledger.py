"""The record of every collective: how often, how much, how long. Its closed forms are tested exactly."""
import time
from collections import Counter
from contextlib import contextmanager
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
    broadcast and gather: n (P-1)/P, as the mean over the ranks. n = elements * itemsize, P = size.
    """
    volume = 2 if operation == "all_reduce" else 1
    return volume * elements * itemsize * (size - 1) // size


@dataclass
class Ledger:
    """Counts collectives by kind, so that a long run does not grow it.

    data : {Collective: Entry}, the operations that the mathematics asks for
    control : {str: Entry}, checks, launches and reports
    """
    data: dict = field(default_factory=dict)
    control: dict = field(default_factory=dict)

    @contextmanager
    def record(self, kind, key, sent):
        """Count one collective, and the time until it is done (waiting for other ranks included)."""
        start = time.perf_counter()
        yield
        entry = getattr(self, kind).setdefault(key, Entry())
        entry.calls += 1
        entry.wire_bytes += sent
        entry.seconds += time.perf_counter() - start

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
