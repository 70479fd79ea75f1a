"""Mistakes in which part of a weight a rank has: swapped, offset, dealt in turn, transposed, another rank's."""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from ..build import local_weight
from ..case import Case
from ..layouts import take
from .mistake import Mistake, Planted

Arrays = dict[str, np.ndarray]


def groups(case: Case) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (what to call them, names) of weights that are sliced together: one alone, its bias with it, all."""
    split = [name for name, place in case.places.items() if place is not None and name in case.whole]
    ends = sorted({name.split(".")[-2] if "." in name else "" for name in split})
    for end in ends:
        names = tuple(name for name in split if (name.split(".")[-2] if "." in name else "") == end)
        yield f"{end or 'weight'}'s slices", names
        weights = tuple(name for name in names if name.endswith("weight"))
        if weights != names:
            yield f"{end or 'the weight'}'s slices (not its bias)", weights
            yield f"{end or 'the weight'}'s slices of the bias alone", tuple(set(names) - set(weights))
    columns = tuple(name for name in split if case.places[name].axis == 0)      # type: ignore[union-attr]
    if len(ends) > 2:
        yield "the column-parallel slices", columns
    if len(ends) > 1:
        yield "all slices", tuple(split)


def orders(ranks: int) -> list[tuple[str, list[int]]]:
    """Return (what it is called, for each rank whose slice it takes)."""
    found = [("rank 0's on every rank", [0] * ranks)]
    every = list(range(ranks))
    found.append(("in reverse order over the ranks" if ranks > 2 else "swapped between the ranks", every[::-1]))
    if ranks > 2:
        found += [("of the next rank", every[1:] + every[:1]), ("of the rank before", every[-1:] + every[:-1])]
        for a, b in itertools.combinations(range(min(ranks, 6)), 2):
            swapped = list(every)
            swapped[a], swapped[b] = b, a
            found.append((f"of ranks {a} and {b} swapped", swapped))
    return found


def of_other_ranks(case: Case) -> Planted:
    """Give ranks the slices of other ranks; gradients then are those of the slices that they have."""
    if case.ranks == 1:
        return
    for what, names in groups(case):
        for how, order in orders(case.ranks):
            local = [{**own, **{name: case.weights[order[rank]][name] for name in names}}
                     for rank, own in enumerate(case.weights)]
            yield f"{what} are {how}", case.with_weights(local)


def in_turn(case: Case) -> Planted:
    """Deal single rows, or heads, to the ranks in turn, not in runs."""
    if case.ranks == 1:
        return
    for what, names in groups(case):
        local = []
        for rank, own in enumerate(case.weights):
            moved = {}
            for name in names:
                place = case.places[name]
                assert place is not None
                unit = case.config.head_dim if name.split(".")[-2:-1] in (["query"], ["out"]) else 1
                size = case.whole[name].shape[place.axis] // unit
                part = (np.arange(rank, size, case.ranks)[:, None] * unit + np.arange(unit)).ravel()
                moved[name] = take(case.whole[name], part, place.axis)
            local.append({**own, **moved})
        if all(a[name].shape == b[name].shape for a, b in zip(local, case.weights) for name in names):
            yield f"{what} are dealt to the ranks in turn, one by one, not in runs", case.with_weights(local)


def swapped_weights(case: Case) -> Planted:
    """Take two weights of one shape for each other."""
    for one, two in (("key", "value"), ("query", "key"), ("query", "value")):
        changed: Arrays = {}
        for name in case.whole:
            start, _, end = name.rpartition(f"{one}.")
            other = f"{start}{two}.{end}"
            if end in ("weight", "bias") and other in case.whole and case.whole[name].shape == case.whole[other].shape:
                changed.update({name: case.whole[other], other: case.whole[name]})
        if changed:
            yield f"{one} and {two} are swapped", resliced(case, changed)


def offset(case: Case) -> Planted:
    """Begin every slice but the first one too early, or one too late."""
    if case.ranks == 1:
        return
    for what, names in groups(case):
        for step, how in ((-1, "one too early"), (1, "one too late")):
            local = []
            for rank, own in enumerate(case.weights):
                moved = {}
                for name in names:
                    place = case.places[name]
                    assert place is not None
                    size = case.whole[name].shape[place.axis]
                    part = place.parts[rank]
                    part = np.clip(part + step, 0, size - 1) if rank or step > 0 else part
                    moved[name] = take(case.whole[name], part, place.axis)
                local.append({**own, **moved})
            yield f"{what} begin {how}", case.with_weights(local)


def transposed(case: Case) -> Planted:
    """Take a square weight's rows for its columns."""
    for name, whole in case.whole.items():
        if whole.ndim == 2 and whole.shape[0] == whole.shape[1] and case.kind != "gradient_norm":
            yield f"{name} is transposed", resliced(case, {name: whole.T})
    for name, place in case.places.items():
        shapes = {w[name].shape for w in case.weights if name in w}
        if place is not None and case.ranks > 1 and len(shapes) == 1 and len(shape := shapes.pop()) == 2 \
                and shape[0] == shape[1]:
            local = [{**own, name: own[name].T} for own in case.weights]
            yield f"each rank's slice of {name} is transposed", case.with_weights(local)


def resliced(case: Case, changed: Arrays) -> Case:
    """Return the case with other whole weights, sliced as before."""
    local = [{**own, **{name: local_weight(name, w, case.places[name], rank) for name, w in changed.items()}}
             for rank, own in enumerate(case.weights)]
    return case.with_weights(local)


def kv_numbering(case: Case) -> Planted:
    """Choose the key/value head of a query head by a wrong number."""
    config = case.config
    if case.kind not in ("attention", "block", "decoder"):
        return
    share, G = config.num_attention_heads // config.query_groups, config.query_groups
    ways = [("query heads use key/value head (head modulo groups) in place of neighbouring ones",
             tuple(heads % G for heads in case.heads))]
    if case.ranks > 1:
        ways += [("key/value heads are counted from 0 on every rank: all have rank 0's",
                  tuple(np.arange(len(heads)) // share % G for heads in case.heads)),
                 ("every rank's query heads share the key/value heads of the whole layer evenly",
                  tuple(np.arange(len(h)) // max(1, len(h) // G) % G for h in case.heads))]
    for sentence, kv_heads in ways:
        if any(not np.array_equal(a, b) for a, b in zip(kv_heads, case.kv_heads)):
            yield sentence, replace_kv(case, kv_heads)
    if case.ranks > 1 and len({len(heads) for heads in case.heads}) == 1:
        first = case.kv_heads[0]
        local = [{**own, **{name: w for name, w in case.weights[0].items() if ".query." in f".{name}"}}
                 for own in case.weights]
        yield "query, key and value rows are rank 0's on every rank", \
            replace_kv(case.with_weights(local), (first,) * case.ranks)


def replace_kv(case: Case, kv_heads: tuple) -> Case:
    """Return the case with other key/value heads."""
    return dataclasses.replace(case, kv_heads=kv_heads)


MISTAKES = (Mistake("slices of other ranks", of_other_ranks), Mistake("slices offset by one", offset),
            Mistake("slices in turn", in_turn), Mistake("weights swapped", swapped_weights),
            Mistake("transposed", transposed), Mistake("kv heads numbered wrongly", kv_numbering))
