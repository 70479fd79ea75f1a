"""Which mistake explains what was found: each known one is made on purpose, and its numbers are compared."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .case import Case
from .dump import Tensor, title
from .mistakes import MISTAKES
from .patterns import PATTERNS, exact_parts, narrow
from .ranks import Key, Ranks, add_up
from .run import run
from .yardstick import Yardstick, by_layout


# What holds of a wrong tensor but names no mistake.
FACTS = ("a factor", "times its sign", "other multiples of the summands")


@dataclass
class Explanation:
    """A mistake whose numbers are those that were found.

    Parameters
    ----------
    name : str
        Short.
    text : str
        One sentence.
    explains : list of str
        The wrong tensors that it accounts for.
    leaves : list of str
        Those that it does not, and right ones that it would have made wrong.
    complete : bool
        Whether it accounts for all of them.
    distance : float
        How far its numbers are from the found ones, in what rounding explains.
    """
    name: str
    text: str
    explains: list[str]
    leaves: list[str]
    complete: bool
    distance: float

    @property
    def is_named(self) -> bool:
        """Whether it is a mistake, and not only something that can be said of the numbers."""
        return self.name not in FACTS


def explain(first: Key, wrong: dict[Key, bool], case: Case, yard: Yardstick) -> list[Explanation]:
    """Find what explains the first wrong tensor on every rank.

    Parameters
    ----------
    first : (phase, name)
    wrong : dict
        {(phase, name): whether it is wrong} of all results, in the order of computation.
    case : Case
        The computation on the ranks.
    yard : Yardstick

    Returns
    -------
    list of Explanation
        Those that account for all tensors first.
    """
    found = planted(first, wrong, case, yard)
    found.sort(key=lambda one: (not one.complete, -len(one.explains), len(one.leaves)))      # likelier ones first
    if not any(one.complete for one in found):
        tensor = yard.dump.tensors[first]
        alone = patterns(tensor, wrong, yard)
        few = 16 if yard.noise else 4                   # a wrong forward value that many numbers match is no accident
        found = found + alone if found and tensor.local[0].size > few else alone + found
        found.sort(key=lambda one: not one.is_named)
        small = narrow(tensor, yard) if not any(one.is_named for one in found) else None
        if small is not None:
            found.insert(0, Explanation(*small, [tensor.title], [], False, 0.0))
    return found


def planted(first: Key, wrong: dict[Key, bool], case: Case, yard: Yardstick) -> list[Explanation]:
    """Make every known mistake, and keep those whose numbers match."""
    found: list[Explanation] = []
    for mistake in MISTAKES:
        for text, other in mistake.plant(case):
            try:
                ranks = run(other)
            except (ValueError, IndexError):            # shapes that the mistake cannot have: it was not made
                continue
            distance = distance_of(yard.dump.tensors[first], ranks, yard)
            if distance > 1 or not is_as_far(yard.dump.tensors[first], ranks, yard):
                continue
            explains: list[str] = []
            leaves: list[str] = []
            before = False
            for key, is_wrong in wrong.items():
                fits = distance_of(yard.dump.tensors[key], ranks, yard) <= 1
                (explains if fits else leaves).append(title(*key))
                before = before or (not fits and not is_wrong and list(wrong).index(key) < list(wrong).index(first))
            if before:
                continue
            only = [title(*key) for key, is_wrong in wrong.items() if is_wrong and title(*key) in explains]
            found.append(Explanation(mistake.name, text, only, leaves, not leaves, distance))
    return found


def distance_of(tensor: Tensor, ranks: Ranks, yard: Yardstick) -> float:
    """Return how far the found numbers are from those of a run, on the rank where it is most."""
    key = (tensor.phase, tensor.name)
    if key not in ranks.kept:
        return np.inf
    predicted = by_layout(ranks.kept[key], tensor.layout)
    if predicted is None:
        return distance_of_sum(tensor, ranks, yard)
    return max(yard.fits(tensor, rank, other) for rank, other in enumerate(predicted))


def distance_of_sum(tensor: Tensor, ranks: Ranks, yard: Yardstick) -> float:
    """Return how far the sum of found summands is from a run's."""
    key = (tensor.phase, tensor.name)
    if tensor.layout.how != "partial":
        return np.inf
    total = add_up(ranks.summands[key]) if key in ranks.summands else ranks.kept[key].values[0]
    whole = Tensor(tensor.phase, tensor.name, tensor.dtype, tensor.layout, [tensor.whole()])
    return yard.fits(whole, 0, np.asarray(total))


def is_as_far(tensor: Tensor, ranks: Ranks, yard: Yardstick) -> bool:
    """Return whether a run is about as far from the right numbers as the found ones are: it is not right itself."""
    predicted = by_layout(ranks.kept[tensor.phase, tensor.name], tensor.layout)
    if predicted is None:
        return True
    exact = exact_parts(tensor, yard)
    off = sum(float(np.sum((p - e) ** 2)) for p, e in zip(predicted, exact))
    found = sum(float(np.sum((f.astype(np.float64) - e) ** 2)) for f, e in zip(tensor.local, exact))
    return off >= 0.25 * found


def patterns(tensor: Tensor, wrong: dict[Key, bool], yard: Yardstick) -> list[Explanation]:
    """Return what holds of the first wrong tensor by itself."""
    found = []
    for pattern in PATTERNS if tensor.layout.how != "partial" else ():
        for name, text, predicted in pattern(tensor, yard):
            distance = max(yard.fits(tensor, rank, np.asarray(other)) for rank, other in enumerate(predicted))
            if distance <= 1:
                others = [title(*key) for key, is_wrong in wrong.items()
                          if is_wrong and key != (tensor.phase, tensor.name)]
                found.append(Explanation(name, text, [tensor.title], others, not others, distance))
    return found
