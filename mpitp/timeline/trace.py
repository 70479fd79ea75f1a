"""The timeline as a file of the Trace Event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Format: "Trace Event Format", the document of the Chromium project: complete events X, flow events s and f, metadata M.
Times are in microseconds, from the first span on.
"""
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .places import MPI, TRACKS
from .spans import Span
from .waiting import Waiting, collectives_of

FIRST_THREAD = 1_000_000        # beyond the number of any rank, as the thread of a process's number is its first one

def write_trace(path: str, of_ranks: Sequence[Sequence[Span]], hosts: Sequence[str], waiting: Waiting,
                facts: dict[str, Any]) -> None:
    """Write the spans of all ranks into one file, whole or not at all: a process a rank, a thread a track.

    Parameters
    ----------
    path : str
    of_ranks : list of list of Span
        Of each rank, on one clock, with details that JSON can hold.
    hosts : list of str
        Of the ranks.
    waiting : Waiting
        Makes the two parts of a collective, and the arrows from the rank that arrives last to the others.
    facts : dict
        Put beside the events, as "otherData".
    """
    first = min((span.start for spans in of_ranks for span in spans), default=0)
    events = [*names(hosts), *complete_events(of_ranks, first), *parts_and_arrows(of_ranks, waiting, first)]
    with open(f"{path}.partial", "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms", "otherData": facts}, file)
    os.replace(f"{path}.partial", path)


def names(hosts: Sequence[str]) -> Iterator[dict]:
    """Yield the names of processes and threads."""
    for rank, host in enumerate(hosts):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank} on {host}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        for number, track in enumerate(TRACKS):
            of_thread = {"ph": "M", "pid": rank, "tid": thread_of(rank, track)}
            yield of_thread | {"name": "thread_name", "args": {"name": track}}
            yield of_thread | {"name": "thread_sort_index", "args": {"sort_index": number}}


def thread_of(rank: int, track: str) -> int:
    """Return the number of a track. Perfetto knows a thread by its number alone, which no other process may have."""
    return FIRST_THREAD + 10 * rank + TRACKS.index(track)


def complete_events(of_ranks: Sequence[Sequence[Span]], first: float) -> Iterator[dict]:
    """Yield the spans."""
    for rank, spans in enumerate(of_ranks):
        for span in spans:
            yield complete(span.name, rank, span.track, span.start - first, span.end - first, span.details)


def parts_and_arrows(of_ranks: Sequence[Sequence[Span]], waiting: Waiting, first: float) -> Iterator[dict]:
    """Yield waiting and transfer of each collective in which all wait, and arrows from the last rank to the others."""
    if len(of_ranks) == 1:
        return
    lists = [collectives_of(spans) for spans in of_ranks]
    waited_of = waiting.waited
    for column, (last, complete_at) in enumerate(zip(waiting.last.tolist(), waiting.complete)):
        start, arrows = microseconds(complete_at - first), {}
        for rank in np.flatnonzero(waiting.number[:, column] >= 0).tolist():
            span, waited = lists[rank][waiting.number[rank, column]], float(waited_of[rank, column])
            yield complete("waiting", rank, MPI, span.start - first, span.start + waited - first, None)
            yield complete("transfer", rank, MPI, span.start + waited - first, span.end - first, None)
            arrow = {"name": "last to arrive", "cat": "collective", "id": column, "pid": rank,
                     "tid": thread_of(rank, MPI), "ts": start}
            arrows[rank] = arrow | ({"ph": "s"} if rank == last else {"ph": "f", "bp": "e"})
        yield arrows.pop(last)                              # an end before its start in the file would be lost
        yield from arrows.values()


def complete(name: str, rank: int, track: str, start: float, end: float, details: Any) -> dict:
    """Return a complete event, of nanoseconds. Both ends are rounded, so that what nests goes on to nest."""
    event = {"ph": "X", "name": name, "cat": track, "pid": rank, "tid": thread_of(rank, track),
             "ts": microseconds(start), "dur": round(microseconds(end) - microseconds(start), 3)}
    return event | {"args": details} if details else event


def microseconds(nanoseconds: float) -> float:
    """Return microseconds, to the nanosecond."""
    return round(float(nanoseconds) * 1e-3, 3)
