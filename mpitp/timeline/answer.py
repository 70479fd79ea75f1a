"""What the spans say, in words and in a table: where each rank's time went, and which rank the others wait for."""
from collections.abc import Sequence

import numpy as np

from .. import tables
from .places import MPI, PRODUCTS
from .spans import Span
from .waiting import Waiting, blamed

LEAST = 0.01            # of the time: less waiting than that has no culprit


def answer(of_ranks: Sequence[Sequence[Span]], waiting: Waiting) -> str:
    """Return the sentence about waiting.

    Parameters
    ----------
    of_ranks : list of list of Span
        Of each rank, on one clock.
    waiting : Waiting
        Of the same.
    """
    if len(of_ranks) == 1:
        return "one rank: it waits for nobody"
    whole = length_of(of_ranks)
    if not waiting.number.size or not whole:
        return "found no sum, expected some: there is nothing to wait for"
    share = waiting.waited.sum(axis=1).mean() / whole
    caused = [waiting.late[waiting.last == rank].sum() for rank in range(len(of_ranks))]
    rank = int(np.argmax(caused))
    if caused[rank] < LEAST * whole:
        return f"no rank keeps the others waiting; without waiting it would take {share:.0%} less"
    is_last = waiting.last == rank
    where, _ = blamed(of_ranks, waiting, rank)
    late = seconds(float(np.median(waiting.late[is_last])))
    of_its_groups = is_last[waiting.number[rank] >= 0]
    return (f"rank {rank} arrives last in {of_its_groups.mean():.0%} of the sums, {late} (median) after the others, "
            f"in {where}; without waiting it would take {share:.0%} less")


def table(of_ranks: Sequence[Sequence[Span]], waiting: Waiting) -> str:
    """Return a table of each rank's time: products, waiting, transfer, and the rest, which is Python's and NumPy's."""
    whole = length_of(of_ranks)
    rows = []
    for rank, spans in enumerate(of_ranks):
        products = sum(span.end - span.start for span in outermost(spans, PRODUCTS))
        inside = sum(span.end - span.start for span in spans if span.track == MPI)
        waited = float(waiting.waited[rank].sum()) if waiting.number.size else 0.0
        rest = whole - products - inside
        rows.append([str(rank), *map(seconds, (whole, products, rest, waited, inside - waited))])
    return "\n".join(tables.table(["rank", "in all", "BLAS products", "Python, NumPy", "waiting", "transfer"], rows))


def outermost(spans: Sequence[Span], track: str) -> list[Span]:
    """Return the spans of a track that lie in no other one of it."""
    found: list[Span] = []
    for span in sorted((span for span in spans if span.track == track), key=lambda span: (span.start, -span.end)):
        if not found or span.start >= found[-1].end:
            found.append(span)
    return found


def length_of(of_ranks: Sequence[Sequence[Span]]) -> float:
    """Return the nanoseconds from the first start to the last end."""
    ends = [span.end for spans in of_ranks for span in spans]
    return max(ends) - min(span.start for spans in of_ranks for span in spans) if ends else 0.0


def seconds(nanoseconds: float) -> str:
    """Return a time for people."""
    return tables.seconds(nanoseconds * 1e-9)
