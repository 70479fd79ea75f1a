"""Who waited for whom: the collectives of all ranks beside each other, and where the last one's time went.

Dimension key: P ranks, K collectives.
"""
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .places import MPI, PRODUCTS, PYTHON
from .spans import Span

# Collectives that no rank leaves before the last one has come.
ALL_WAIT = ("all_reduce", "all_gather", "reduce_scatter", "agreement", "any")
OUTSIDE = "the program, outside of layers"
MOST_OF = 0.8           # of a pattern's time in one layer: then that one is named


class Waiting(NamedTuple):
    """The collectives of all ranks in which all of its group wait for the last.

    Attributes
    ----------
    number : (P, K) array of int
        Of each among all collectives of a rank; -1 for a rank that is not of its group.
    arrived, left : (P, K) arrays of float
        When each rank entered and left it, in nanoseconds; NaN for a rank that is not of its group.
    """
    number: np.ndarray
    arrived: np.ndarray
    left: np.ndarray

    @property
    def complete(self) -> np.ndarray:
        """When the last rank arrived (K,)."""
        return np.nanmax(self.arrived, axis=0)

    @property
    def waited(self) -> np.ndarray:
        """How long each rank waited for the last one (P, K); the rest of its time in it is transfer."""
        return np.nan_to_num(np.minimum(self.complete, self.left) - self.arrived)

    @property
    def last(self) -> np.ndarray:
        """The rank that arrived last (K,)."""
        return np.nanargmax(self.arrived, axis=0)

    @property
    def late(self) -> np.ndarray:
        """How long the last rank came after the last but one (K,)."""
        arrived = np.where(self.number < 0, -np.inf, self.arrived)
        return self.complete - np.partition(arrived, -2, axis=0)[-2]


def collectives_of(spans: Sequence[Span]) -> list[Span]:
    """Return the collectives of a rank, in order."""
    return sorted((span for span in spans if span.track == MPI), key=lambda span: span.start)


def waiting_of(of_ranks: Sequence[Sequence[Span]]) -> Waiting:
    """Return the collectives in which all wait, of the spans of every rank, by their start.

    All ranks of a group enter its collectives in the same order.
    """
    P, together = len(of_ranks), []
    for ranks, lists in by_group(of_ranks).items():
        if len(ranks) > 1 or P == 1:
            together += [(ranks, row) for row in zip(*lists) if row[0][1].name in ALL_WAIT]
    together.sort(key=lambda found: min(span.start for _, span in found[1]))
    number, arrived = np.full((P, len(together)), -1), np.full((P, len(together)), np.nan)
    left = arrived.copy()
    for column, (ranks, row) in enumerate(together):
        for rank, (of_rank, span) in zip(ranks, row):
            number[rank, column], arrived[rank, column], left[rank, column] = of_rank, span.start, span.end
    return Waiting(number, arrived, left)


def by_group(of_ranks: Sequence[Sequence[Span]]) -> dict[tuple[int, ...], list[list[tuple[int, Span]]]]:
    """Return {ranks of a group: [its collectives and their numbers, of each of these ranks]}.

    The details of a collective name the ranks where they are not all.
    """
    found: dict[tuple[int, ...], dict[int, list]] = {}
    for rank, spans in enumerate(of_ranks):
        for number, span in enumerate(collectives_of(spans)):
            details: Any = span.details if isinstance(span.details, dict) else {}
            ranks = tuple(details.get("ranks", range(len(of_ranks))))
            found.setdefault(ranks, {member: [] for member in ranks})[rank].append((number, span))
    return {ranks: list(lists.values()) for ranks, lists in found.items()}


def own_times(spans: Sequence[Span]) -> Iterator[tuple[int, str, int]]:
    """Yield (collectives done, label, nanoseconds) of one rank: where its time went between its collectives.

    What is called belongs to itself, not to its caller; the label is the innermost layer, and the operation in it.
    """
    nested = sorted((span for span in spans if span.track in (PYTHON, PRODUCTS, MPI)),
                    key=lambda span: (span.start, -span.end))
    done, at = 0, nested[0].start if nested else 0
    stack: list[Span] = []
    for span in [*nested, None]:
        while stack and (span is None or stack[-1].end <= span.start):
            inner = stack[-1]
            if inner.track != MPI:
                yield done, label_of(stack), inner.end - at
            stack.pop()
            done, at = done + (inner.track == MPI), inner.end
        if span is None:
            return
        yield done, label_of(stack), span.start - at
        stack.append(span)
        at = span.start


def label_of(stack: Sequence[Span]) -> str:
    """Return the innermost layer of a stack of spans, and the operation in it: "layers.0.mlp forward: product"."""
    layers = [span.name for span in stack if " " in span.name]
    operation = stack[-1].name if stack and " " not in stack[-1].name else ""
    return ": ".join(filter(None, [layers[-1] if layers else OUTSIDE, operation]))


def pattern_of(label: str) -> str:
    """Return a label without the number of its layer: "layers.*.mlp forward: product"."""
    return re.sub(r"\.\d+\.", ".*.", label)


def blamed(of_ranks: Sequence[Sequence[Span]], waiting: Waiting, rank: int) -> tuple[str, float]:
    """Return where a rank that comes last takes longer than the others, and the nanoseconds of that in all.

    Of each stretch between two collectives, what the rank needs under a label is compared with the median of the
    others.
    """
    of_last, times = waiting.number[:, waiting.last == rank], []
    for spans, stretches in zip(of_ranks, of_last):
        found: dict[int, Counter] = {stretch: Counter() for stretch in stretches.tolist()}
        for done, label, nanoseconds in own_times(spans):
            if done in found:
                found[done][label] += nanoseconds
        times.append(found)
    excess: dict[str, float] = defaultdict(float)
    for column in of_last.T.tolist():
        mine = times[rank][column[rank]]
        others = [times[other][number] for other, number in enumerate(column) if other != rank and number >= 0]
        for label in set(mine).union(*others):
            excess[label] += mine[label] - float(np.median([of_other[label] for of_other in others]))
    return most_of(excess)


def most_of(excess: dict[str, float]) -> tuple[str, float]:
    """Return the label with the most time, with a * for layers unless one of them has most of it; and that time."""
    patterns: dict[str, float] = defaultdict(float)
    for label, nanoseconds in excess.items():
        patterns[pattern_of(label)] += nanoseconds
    if not patterns:
        return OUTSIDE, 0.0
    pattern, total = max(patterns.items(), key=lambda pair: pair[1])
    label, most = max(((label, ns) for label, ns in excess.items() if pattern_of(label) == pattern),
                      key=lambda pair: pair[1])
    return (label if most > MOST_OF * total else pattern), total
