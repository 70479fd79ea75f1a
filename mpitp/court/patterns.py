"""What can be said of a wrong tensor by itself: a factor, parts in other places, summands left out.

Each pattern is recomputed from the right numbers, and holds only where the found ones match it to a few roundings.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..arrays import Array
from .dump import EPS, Tensor
from .layouts import take
from .rounding import stored
from .yardstick import Yardstick

LEAST = 4       # numbers, for a factor without a reason to mean anything
Pattern = Iterator[tuple[str, str, list[Array]]]        # name, sentence, what each rank would have


def exact_parts(tensor: Tensor, yard: Yardstick) -> list[Array]:
    """Return what each rank should have."""
    value = yard.value((tensor.phase, tensor.name)).value
    return [tensor.layout.of_rank(value, rank) for rank in range(len(tensor.local))]


def factors(tensor: Tensor, yard: Yardstick) -> Pattern:
    """Every number is the same multiple of the right one: 0, P, 1/P, or what it is."""
    exact, P = exact_parts(tensor, yard), yard.dump.ranks
    found = [array.astype(np.float64) for array in tensor.local]
    if all(not array.any() for array in found):
        yield "zero", f"{tensor.title} is 0 everywhere: it was not computed, or not stored", found
        return
    of_ranks = [scale_of(f, e) for f, e in zip(found, exact)]
    known = [c for c in of_ranks if c is not None]
    if not known:
        return
    c = known[int(np.argmax([e.size for e, of in zip(exact, of_ranks) if of is not None]))]
    for value, why in named_factors(P, yard.dump.options["loss_scale"], tokens_of(yard)):
        if abs(c - value) <= 0.02 * abs(value):
            text = f"{tensor.title} is {value:.6g} times the right one: {why}"
            yield f"times {why}", text, [e * value for e in exact]
    few = sum(e.size for e in exact) < LEAST        # any one number is some multiple of another one
    if not few and all(of is not None and abs(of - c) < 1e-3 * abs(c) for of in known):
        yield "a factor", f"{tensor.title} is {c:.6g} times the right one, which no count of ranks or tokens is", \
            [e * c for e in exact]


def scale_of(found: Array, exact: Array) -> float | None:
    """Return the multiple of `exact` that `found` is nearest to."""
    if found.shape != exact.shape or not exact.any():
        return None
    return float((found * exact).sum() / (exact * exact).sum())


def tokens_of(yard: Yardstick) -> int:
    """Return how many tokens there are."""
    for (phase, _), kept in yard.exact.items():
        if phase == "forward" and kept.values[0].ndim > 1:
            return int(np.prod(kept.values[0].shape[:-1]))
    return 1


def named_factors(P: int, loss_scale: float, tokens: int) -> list[tuple[float, str]]:
    """Return the factors that have a reason."""
    known: list[tuple[float, str]] = []
    if P > 1:
        known += [(float(P), f"P = {P}, a sum over the ranks too many"),
                  (1 / P, f"1/P with P = {P}, a division by the ranks too many or a sum too few"),
                  (float(P * P), f"P squared with P = {P}, two sums over the ranks too many"),
                  (1 / (P * P), f"1/P squared with P = {P}, two divisions by the ranks too many"),
                  (P ** 0.5, f"the square root of P = {P}"), (P ** -0.5, f"1 over the square root of P = {P}")]
    if loss_scale != 1:
        known += [(loss_scale, "the loss scale, applied once too often"), (1 / loss_scale, "1 over the loss scale")]
    known += [(2.0, "counted twice"), (0.5, "halved"), (-1.0, "its sign"), (float(tokens), "the number of tokens"),
              (1 / tokens, "1 over the number of tokens")]
    return known


def other_parts(tensor: Tensor, yard: Yardstick) -> Pattern:
    """Ranks have parts of other ranks, or parts that begin elsewhere."""
    layout, P = tensor.layout, yard.dump.ranks
    exact = exact_parts(tensor, yard)
    whole = yard.value((tensor.phase, tensor.name)).value
    if layout.how == "split" and P > 1:
        order = [next((q for q in range(P) if np.shape(exact[q]) == tensor.local[r].shape
                       and exact[q].size and yard.fits(tensor, r, exact[q]) <= 1), r) for r in range(P)]
        if order != list(range(P)):
            which = ", ".join(f"rank {r} has rank {q}'s" for r, q in enumerate(order) if r != q)
            yield "parts of other ranks", f"the parts of {tensor.title} are on other ranks: {which}", \
                [exact[q] for q in order]
        size = whole.shape[layout.axis]
        for step in (1, -1):
            moved = [take(whole, (part + step) % size, layout.axis) for part in layout.parts]
            late = "late" if step > 0 else "early"
            yield "parts offset by one", f"the parts of {tensor.title} begin one too {late}", moved
    if layout.how == "replicated" and P > 1:
        for axis, size in enumerate(whole.shape):
            bounds = [size * r // P for r in range(P + 1)]
            parts = [np.arange(a, b) for a, b in zip(bounds, bounds[1:])]
            for how, order in (("in reverse order", [*range(P)][::-1]), ("from the second rank on", [*range(1, P), 0])):
                moved = take(whole, np.concatenate([parts[q] for q in order]), axis)
                yield "gathered in another order", f"the ranks' parts of {tensor.title} along axis {axis} are put " \
                    f"together {how}", [moved] * P
    if whole.ndim == 2 and whole.shape[0] == whole.shape[1]:
        yield "transposed", f"{tensor.title} is transposed", \
            [layout.of_rank(whole.T, rank) for rank in range(P)]


def combined(tensor: Tensor, yard: Yardstick) -> Pattern:
    """Each rank has some multiples of the ranks' summands, found by least squares and rounded to plain numbers."""
    key, P = (tensor.phase, tensor.name), yard.dump.ranks
    summands = yard.right.summands.get(key)
    if summands is None or tensor.layout.how == "partial" or P == 1 or P > 16:
        return
    total, exact = sum(summands), yard.value(key).value
    if np.shape(total) != exact.shape:
        return
    rest = exact - total
    has_rest = np.abs(rest).max(initial=0) > 1e-9 * np.abs(exact).max(initial=0)
    basis = [*summands, rest] if has_rest else list(summands)
    out, said = [], []
    for rank in range(P):
        local = [tensor.layout.of_rank(one, rank) for one in basis]
        if tensor.local[rank].size < len(basis):
            return
        columns = np.stack([one.ravel() for one in local], axis=1)
        found = np.linalg.lstsq(columns, tensor.local[rank].astype(np.float64).ravel(), rcond=None)[0]
        rounded = [plain_number(c, P) for c in found]
        out.append(sum(c * one for c, one in zip(rounded, local)))
        said.append(f"rank {rank} has " + " + ".join(
            f"{c:.4g} x {f'rank {i}' if i < P else 'what is added after the sum'}" for i, c in enumerate(rounded)))
    yield "other multiples of the summands", f"{tensor.title} is not the sum of the ranks' summands: " + \
        "; ".join(said[:4]), out


def plain_number(c: float, P: int) -> float:
    """Return the integer, or the multiple of 1/P, that c is close to."""
    for value in (round(c), round(c * P) / P, round(c * 2) / 2):
        if abs(c - value) < 0.05:
            return float(value)
    return c


def stale(tensor: Tensor, yard: Yardstick) -> Pattern:
    """The gradient is that of the step before, or all but it."""
    before = yard.dump.tensors.get(("previous", tensor.name))
    if tensor.phase != "backward" or before is None or before.layout.shape != tensor.layout.shape:
        return
    whole = before.whole()
    old = [tensor.layout.of_rank(whole, rank) for rank in range(len(tensor.local))]
    yield "stale gradient", f"{tensor.title} is that of the step before", old
    yield "gradient not cleared", f"{tensor.title} has that of the step before added to it", \
        [a + b for a, b in zip(exact_parts(tensor, yard), old)]


PATTERNS: tuple[Callable[[Tensor, Yardstick], Pattern], ...] = (stale, other_parts, combined, factors)


# --- 16 bits -----------------------------------------------------------------------------------------------------

def narrow(tensor: Tensor, yard: Yardstick) -> tuple[str, str] | None:
    """Return (name, sentence) where 16 bits show: in the digits of longer numbers, or in errors without a pattern."""
    exact = np.concatenate([part.ravel() for part in exact_parts(tensor, yard)])
    found = np.concatenate([array.astype(np.float64).ravel() for array in tensor.local])
    error, size = found - exact, np.linalg.norm(exact)
    if found.size < 8 or not error.any() or not size:
        return None
    relative = np.linalg.norm(error) / size
    if tensor.dtype in ("F32", "F64"):
        claimed = f"where {full_name(tensor.dtype)} is claimed"
        for dtype in ("BF16", "F16"):
            if relative < 4 * EPS[dtype] and np.array_equal(stored(found, dtype), found):
                return "16 bits", f"{tensor.title} has numbers of {full_name(dtype)} {claimed}: it was added up, " \
                    f"stored or sent in 16 bits"
        digits = 2.0 ** 16 * np.frexp(found)[0]         # all of them, of a sum of numbers of 16 bits
        if relative < 4 * EPS["BF16"] and np.array_equal(digits, np.round(digits)):
            return "16 bits", f"{tensor.title} has numbers of at most 16 digits {claimed}: a sum of numbers of 16 bits"
        return None
    aligned = abs((error * exact).sum()) / (np.linalg.norm(error) * size)
    most = 1.5
    if yard.dump.kind in ("column_linear", "row_linear") and tensor.name == "y":        # one sum of K products
        most = max(most, 0.35 * yard.dump.tensors["forward", "x"].layout.shape[-1] ** 0.5)
    if aligned < 3 / found.size ** 0.5 and relative < most * EPS[tensor.dtype]:
        times = f"{relative / EPS[tensor.dtype]:.2g} eps of {full_name(tensor.dtype)}"
        return "16 bits", f"the errors of {tensor.title} have no pattern and are {times} in norm: more than storing " \
            f"makes, as adding up in 16 bits does"
    return None


def full_name(dtype: str) -> str:
    """Return a dtype by its long name."""
    return {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
