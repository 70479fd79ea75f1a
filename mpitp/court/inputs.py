"""What can be judged without computing anything: finite numbers, replicas, dropout masks, slices of weights."""
from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..errors import InputError
from .dump import Dump, Tensor
from .layouts import take

GIVEN = {"embedding": ("ids",), "decoder": ("ids", "targets"), "loss": ("logits", "targets"), "gradient_norm": ()}


def is_input(dump: Dump, key: tuple[str, str]) -> bool:
    """Return whether a tensor is given, not computed."""
    phase, name = key
    if phase == "backward":
        return dump.kind == "gradient_norm" or name == "y" and dump.kind != "decoder"
    return phase != "forward" or name in given_to(dump.kind) or name == "mask" or name.endswith(".dropout")


def given_to(kind: str) -> tuple[str, ...]:
    """Return what a kind takes in, beside weights and the gradient of y."""
    return GIVEN.get(kind, ("x",))


def require_finite(dump: Dump) -> None:
    """Raise InputError for an input or a weight that is not made of finite numbers."""
    for key, tensor in dump.tensors.items():
        if is_input(dump, key) and any(not np.isfinite(array).all() for array in tensor.local):
            raise InputError(f"{located(tensor)}; nothing can be judged without it")


def located(tensor: Tensor) -> str:
    """Return a line that says where a tensor is not made of finite numbers."""
    for rank, array in enumerate(tensor.local):
        bad = ~np.isfinite(array)
        if bad.any():
            at = [int(i) for i in np.argwhere(bad)[0]]
            return f"{tensor.phase} {tensor.name}, rank {rank}: found {array[tuple(at)]} at {at} and " \
                f"{int(bad.sum())} such number{'s' if bad.sum() > 1 else ''} in all, expected finite ones"
    return ""


def problem(tensor: Tensor) -> tuple[str, list[int]]:
    """Return what is wrong with an input, and on which ranks: "" where nothing is."""
    if tensor.layout.how == "replicated":
        other = [rank for rank, array in enumerate(tensor.local) if not np.array_equal(array, tensor.local[0])]
        if other:
            what = "the dropout mask" if tensor.name.endswith(".dropout") else tensor.title
            return f"{what}, which every rank must have, differs between ranks: {listed(other)} " \
                f"{'has' if len(other) == 1 else 'have'} another one than rank 0", other
    if tensor.layout.how == "split" and tensor.name.endswith(".dropout"):
        parts = tensor.layout.parts
        for a in range(len(parts)):
            for b in range(a):
                one, two = tensor.local[a], tensor.local[b]
                apart = not np.intersect1d(parts[a], parts[b]).size
                if apart and one.shape == two.shape and one.size >= 16 and np.array_equal(one, two) and \
                        len(np.unique(one)) > 1:
                    return f"the same dropout mask on the shards of ranks {b} and {a}, which must differ", [a]
    return "", []


def listed(ranks: list[int]) -> str:
    """Return ranks as words."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def short_name(why: str) -> str:
    """Return the name of what is wrong with an input."""
    if "dropout mask on the shards" in why:
        return "same dropout mask on shards"
    if "dropout mask" in why:
        return "other dropout mask on replicas"
    return "replicas differ" if "differs between ranks" in why else "slice of a weight"


# --- slices of weights -------------------------------------------------------------------------------------------

def slice_problem(tensor: Tensor, references: dict[str, Array]) -> tuple[str, list[int]]:
    """Return what is wrong with the ranks' slices of a weight, and where: "" where they are those of the whole one."""
    whole = references.get(tensor.name)
    if whole is None:
        return problem(tensor)
    bad, said = [], ""
    for rank, array in enumerate(tensor.local):
        expected = tensor.layout.of_rank(whole, rank) if tensor.layout.shape == whole.shape else None
        if expected is not None and np.array_equal(array, expected.astype(array.dtype)):
            continue
        bad.append(rank)
        said = said or f"rank {rank}'s slice of {tensor.name} {what_it_is(tensor, rank, references)}"
    return said, bad


def what_it_is(tensor: Tensor, rank: int, references: dict[str, Array]) -> str:
    """Say where a slice's numbers stand in the whole weights."""
    whole, array = references[tensor.name], tensor.local[rank]
    if tensor.layout.shape != whole.shape:
        return f"makes a whole {tensor.layout.shape} of one that is {whole.shape}"
    if not array.any():
        return "is 0 everywhere"
    if tensor.layout.how != "split":
        return "is not the whole weight" + (": it is transposed" if array.shape == whole.T.shape and
                                            np.array_equal(array, whole.T.astype(array.dtype)) else "")
    axis, parts = tensor.layout.axis, tensor.layout.parts
    for other, part in enumerate(parts):
        if other != rank and part.shape == parts[rank].shape and \
                np.array_equal(take(whole, part, axis).astype(array.dtype), array):
            return f"is rank {other}'s"
    if array.ndim == 2 and np.array_equal(take(whole, parts[rank], axis).T.astype(array.dtype), array):
        return "is transposed"
    if array.ndim == 2 and whole.shape[0] == whole.shape[1] and \
            np.array_equal(take(whole.T, parts[rank], axis).astype(array.dtype), array):
        return "is that of the transposed weight"
    return rows_found(tensor, rank, references)


def rows_found(tensor: Tensor, rank: int, references: dict[str, Array]) -> str:
    """Say which rows, along the axis of the split, of which weight a slice has."""
    axis, array = tensor.layout.axis, np.moveaxis(tensor.local[rank], tensor.layout.axis, 0)
    wanted = tensor.layout.parts[rank]
    for name in (tensor.name, *(other for other in references if other != tensor.name)):
        whole = references[name]
        if whole.ndim != array.ndim:
            continue
        rows = np.moveaxis(whole, axis, 0).astype(array.dtype)
        if rows.shape[1:] != array.shape[1:]:
            continue
        places = {row.tobytes(): i for i, row in reversed(list(enumerate(np.ascontiguousarray(rows))))}
        found = [places.get(row.tobytes(), -1) for row in np.ascontiguousarray(array)]
        if -1 in found or not found:
            continue
        steps = set(np.diff(found).tolist())
        how = f"{found[0]} to {found[-1]}" if steps <= {1} else f"{found[0]}, {found[1]}, ... {found[-1]}"
        turn = " (every second one)" if steps == {2} else " (backwards)" if steps == {-1} else ""
        of = "" if name == tensor.name else f" of {name}"
        shift = found[0] - int(wanted[0])
        by_one = f": offset by {shift}" if steps <= {1} and not of else ""
        return f"has rows {how}{turn}{of}, expected {int(wanted[0])} to {int(wanted[-1])}{by_one}"
    return "has numbers that are nowhere in the whole weights"
