"""Who waited for whom: the collectives of all ranks beside each other, and where the last one's time went.

Dimension key: P ranks, K collectives.
"""
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .spans import MPI, PRODUCTS, PYTHON, Span

# Collectives that no rank leaves before the last one has come.
ALL_WAIT = ("all_reduce", "all_gather", "reduce_scatter", "agreement", "any")
OUTSIDE = "the program, outside of layers"
MOST_OF = 0.8           # of a pattern's time in one layer: then that one is named


class Waiting(NamedTuple):
    """The collectives of all ranks in which all wait for the last.

    Attributes
    ----------
    number : (K,) array of int
        Of each among all collectives of a rank.
    arrived, left : (P, K) arrays of float
        When each rank entered and left it, in nanoseconds.
    """
    number: np.ndarray
    arrived: np.ndarray
    left: np.ndarray

    @property
    def complete(self) -> np.ndarray:
        """When the last rank arrived (K,)."""
        return self.arrived.max(axis=0)

    @property
    def waited(self) -> np.ndarray:
        """How long each rank waited for the last one (P, K); the rest of its time in it is transfer."""
        return np.minimum(self.complete, self.left) - self.arrived

    @property
    def last(self) -> np.ndarray:
        """The rank that arrived last (K,)."""
        return self.arrived.argmax(axis=0)

    @property
    def late(self) -> np.ndarray:
        """How long the last rank came after the last but one (K,)."""
        return self.complete - np.partition(self.arrived, -2, axis=0)[-2]


def collectives_of(spans: Sequence[Span]) -> list[Span]:
    """Return the collectives of a rank, in order."""
    return sorted((span for span in spans if span.track == MPI), key=lambda span: span.start)


def waiting_of(of_ranks: Sequence[Sequence[Span]]) -> Waiting:
    """Return the collectives in which all wait, of the spans of every rank. All ranks enter them in the same order."""
    lists = [collectives_of(spans) for spans in of_ranks]
    together = [(number, spans) for number, spans in enumerate(zip(*lists)) if spans[0].name in ALL_WAIT]
    arrived = np.array([[span.start for span in spans] for _, spans in together], float).reshape(-1, len(lists)).T
    left = np.array([[span.end for span in spans] for _, spans in together], float).reshape(-1, len(lists)).T
    return Waiting(np.array([number for number, _ in together], int), arrived, left)


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
    stretches = set(waiting.number[waiting.last == rank].tolist())
    times: list[dict[int, Counter]] = []
    for spans in of_ranks:
        found: dict[int, Counter] = defaultdict(Counter)
        for done, label, nanoseconds in own_times(spans):
            if done in stretches:
                found[done][label] += nanoseconds
        times.append(found)
    others = [found for other, found in enumerate(times) if other != rank]
    excess: dict[str, float] = defaultdict(float)
    for stretch in stretches:
        labels = set().union(*(found[stretch] for found in times))
        for label in labels:
            excess[label] += times[rank][stretch][label] - float(np.median([f[stretch][label] for f in others]))
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
