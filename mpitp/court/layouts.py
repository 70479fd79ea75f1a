"""How a tensor lies on the ranks: all of it on each, a part along an axis, or a summand."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import InputError, is_integer

MOST_OF_AXIS = 2 ** 24      # an index of each is made: a file may claim more where another axis is 0
# Parts of the names of what several ranks may hold copies of: key/value heads that query heads of both use.
SHARED = {"key", "value", "key_rotated"}
LAYOUTS = ("replicated", "split", "partial")


@dataclass(frozen=True, eq=False)
class Layout:
    """A layout says which part of a whole tensor each rank holds.

    Parameters
    ----------
    how : str
        "replicated", "split" or "partial".
    axis : int
        Along which it is split, 0 where it is not.
    parts : tuple of array of int
        For each rank the indices along the axis that it holds, in order; empty where the tensor is not split.
    shape : tuple of int
        Of the whole tensor.
    """
    how: str
    axis: int
    parts: tuple[Array, ...]
    shape: tuple[int, ...]

    def of_rank(self, whole: Any, rank: int) -> Any:
        """Return this rank's part of a whole tensor, an array or a Magnitude."""
        return take(whole, self.parts[rank], self.axis) if self.how == "split" else whole

    def assemble(self, local: list[Array]) -> Array:
        """Return the whole tensor: the sum of summands, the parts in their places, or rank 0's."""
        if self.how == "partial":
            return np.sum([array.astype(np.float64) for array in local], axis=0)
        if self.how == "replicated":
            return local[0]
        whole = np.zeros(self.shape, local[0].dtype)
        for part, array in reversed(list(zip(self.parts, local))):      # the first rank's copy stays
            whole[(slice(None),) * self.axis + (part,)] = array
        return whole

    def holders(self, index: int) -> list[int]:
        """Return the ranks that hold this index along the axis."""
        return [rank for rank, part in enumerate(self.parts) if index in part]


def take(whole: Any, part: Array, axis: int) -> Any:
    """Return the indices `part` of an array or a Magnitude along an axis."""
    return whole[(slice(None),) * axis + (part,)]


def make_layout(where: str, entry: Any, shapes: list[tuple[int, ...]]) -> Layout:
    """Check what a dump says of a tensor against the shapes that its ranks have.

    Parameters
    ----------
    where : str
        The tensor's phase and name, for messages.
    entry : object
        Out of run.json.
    shapes : list of tuple of int
        Of each rank's array.

    Raises
    ------
    InputError
        An entry that says something else, and shapes or ranges that do not fit each other.
    """
    if any(size > MOST_OF_AXIS for shape in shapes for size in shape):
        raise InputError(f"{where}: found shapes {shapes[0]}, expected at most {MOST_OF_AXIS} along an axis")
    how = entry.get("layout") if isinstance(entry, dict) else None
    if how not in LAYOUTS:
        raise InputError(f"run.json: found layout {how!r:.60} of {where}, expected one of {', '.join(LAYOUTS)}")
    if how != "split":
        for rank, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise InputError(f"{where}: found shape {shape} on rank {rank}, expected {shapes[0]} as on rank 0, "
                                 f"since it is {how}")
        return Layout(how, 0, (), shapes[0])
    axis, ranges, ndim = entry.get("axis"), entry.get("ranges"), len(shapes[0])
    if not is_integer(axis) or not -ndim <= axis < ndim:
        raise InputError(f"run.json: found axis {axis!r:.60} of {where}, expected one of its {ndim}")
    axis %= ndim
    for rank, shape in enumerate(shapes):
        if len(shape) != ndim or shape[:axis] + shape[axis + 1:] != shapes[0][:axis] + shapes[0][axis + 1:]:
            raise InputError(f"{where}: found shape {shape} on rank {rank} and {shapes[0]} on rank 0, expected the "
                             f"same but for axis {axis}")
    lengths = [shape[axis] for shape in shapes]
    pairs = in_order(lengths) if ranges is None else checked_ranges(where, ranges, lengths)
    require_cover(where, pairs)
    parts = tuple(np.concatenate([np.arange(*pair) for pair in of_rank] or [np.arange(0)]) for of_rank in pairs)
    size = max((stop for of_rank in pairs for _, stop in of_rank), default=0)
    return Layout("split", axis, parts, (*shapes[0][:axis], size, *shapes[0][axis + 1:]))


def in_order(lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Return one range for each rank, each beginning where the one before ends."""
    stops = np.cumsum(lengths).tolist()
    return [[(stop - length, stop)] for length, stop in zip(lengths, stops)]


def checked_ranges(where: str, ranges: Any, lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Return the ranges of each rank as pairs. Raises InputError unless they have the ranks' lengths."""
    if not isinstance(ranges, list) or len(ranges) != len(lengths):
        raise InputError(f"run.json: found {len(ranges) if isinstance(ranges, list) else 'no'} ranges of {where}, "
                         f"expected one for each of {len(lengths)} ranks")
    found = []
    for rank, (of_rank, length) in enumerate(zip(ranges, lengths)):
        pairs = [of_rank] if isinstance(of_rank, list) and all(map(is_integer, of_rank)) and of_rank else of_rank
        good = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(map(is_integer, pair))
            and 0 <= pair[0] <= pair[1] < 2 ** 60 for pair in pairs)
        if not good:
            raise InputError(f"run.json: found range {of_rank!r:.60} of {where} on rank {rank}, expected "
                             f"[start, stop], or a list of such pairs")
        if sum(stop - start for start, stop in pairs) != length:
            raise InputError(f"{where}: found {length} along its axis on rank {rank}, expected as many as "
                             f"its range {of_rank!r:.60} has")
        found.append([(start, stop) for start, stop in pairs])
    return found


def require_cover(where: str, pairs: list[list[tuple[int, int]]]) -> None:
    """Raise InputError unless all ranges together have every index, and any two are apart or the same.

    Those of key/value heads may overlap: a head is held wherever a query head uses it.
    """
    end, before = 0, None
    for start, stop in sorted({pair for of_rank in pairs for pair in of_rank if pair[0] < pair[1]}):
        if start < end and not SHARED & set(where.replace(" ", ".").split(".")):
            raise InputError(f"{where}: found ranges {list(before or ())} and {[start, stop]} that overlap, expected "
                             f"ranges that are apart or the same")
        if start > end:
            raise InputError(f"{where}: found no rank with {[end, start]}, expected ranges without a gap")
        end, before = max(end, stop), (start, stop)
