"""Mistakes with matrices that are stored as one: gate and up; query, key and value."""
from __future__ import annotations

import itertools

import numpy as np

from ..case import Case
from ..programs.attention import features
from .mistake import Mistake, Planted
from .shards import Arrays, resliced


def gate_and_up(case: Case) -> Planted:
    """Swap gate and up, or take one fused matrix the other way."""
    prefixes = [name[:-len("gate.weight")] for name in case.whole if name.endswith("gate.weight")]
    if not prefixes:
        return
    ways = (("gate and up are swapped", swap_rows),
            ("gate and up are taken as even and odd rows of a matrix that has gate in front of up", read_interleaved),
            ("gate and up are taken as the halves of a matrix that has their rows in turn", read_halves))
    for sentence, change in ways:
        for keys, less in ((("weight", "bias"), ""), (("weight",), " (not their biases)")):
            changed: Arrays = {}
            for prefix in prefixes:
                for key in keys:
                    if f"{prefix}gate.{key}" in case.whole and f"{prefix}up.{key}" in case.whole:
                        gate, up = change(case.whole[f"{prefix}gate.{key}"], case.whole[f"{prefix}up.{key}"])
                        changed.update({f"{prefix}gate.{key}": gate, f"{prefix}up.{key}": up})
            if not less or any(f"{prefix}gate.bias" in case.whole for prefix in prefixes):
                yield sentence + less, resliced(case, changed)
    if case.ranks > 1:
        yield from fused_dealt(case, prefixes)


def swap_rows(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return up and gate."""
    return up, gate


def read_interleaved(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the even and the odd rows of gate in front of up."""
    fused = np.concatenate([gate, up])
    return fused[0::2], fused[1::2]


def read_halves(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the halves of gate's and up's rows in turn."""
    fused = np.stack([gate, up], axis=1).reshape(2 * len(gate), *gate.shape[1:])
    return fused[:len(gate)], fused[len(gate):]


def fused_dealt(case: Case, prefixes: list[str]) -> Planted:
    """Deal the rows of gate in front of up over the ranks as one matrix, and take halves on each rank."""
    ways = (("the rows of gate in front of up are dealt over the ranks as one matrix, so that a rank has only one of "
             "the two", np.concatenate),
            ("gate and up are interleaved row by row, dealt over the ranks as one matrix, and read as halves on each "
             "rank", interleaved))
    for sentence, fuse in ways:
        local = [dict(own) for own in case.weights]
        for prefix in prefixes:
            for key in ("weight", "bias"):
                names = [f"{prefix}gate.{key}", f"{prefix}up.{key}"]
                if all(name in case.whole for name in names):
                    deal(local, names, fuse([case.whole[name] for name in names]))
        yield sentence, case.with_weights(local)


def interleaved(pair: list[np.ndarray]) -> np.ndarray:
    """Return the rows of two matrices in turn."""
    return np.stack(pair, axis=1).reshape(2 * len(pair[0]), *pair[0].shape[1:])


def deal(local: list[dict], names: list[str], fused: np.ndarray) -> None:
    """Give each rank the next rows of a fused matrix, as many as it has of all names, in front to back order."""
    begin = 0
    for own in local:
        for name in names:
            n = len(own[name])
            own[name] = fused[begin:begin + n]
            begin += n


def fused_qkv(case: Case) -> Planted:
    """Store query, key and value rows fused in one order, and read them in another."""
    prefixes = [name[:-len("query.weight")] for name in case.whole if name.endswith("query.weight")]
    if not prefixes or case.kind == "gradient_norm":
        return
    config = case.config
    known = fused_orders(config.num_attention_heads, config.query_groups, config.head_dim)
    for (stored_as, rows), (read_as, wanted) in itertools.permutations(known.items(), 2):
        if np.array_equal(rows, wanted):
            continue
        changed: Arrays = {}
        for prefix in prefixes:
            for key in ("weight", "bias"):
                names = [f"{prefix}{part}.{key}" for part in ("query", "key", "value")]
                if not all(name in case.whole for name in names):
                    continue
                parts = [case.whole[name] for name in names]
                read = np.empty_like(np.concatenate(parts))
                read[wanted] = np.concatenate(parts)[rows]
                bounds = np.cumsum([0] + [len(part) for part in parts])
                changed.update({name: read[a:b] for name, a, b in zip(names, bounds, bounds[1:])})
        yield f"the fused query, key and value rows, stored {stored_as}, are read {read_as}", resliced(case, changed)
    if case.ranks > 1 and config.query_groups == config.num_attention_heads:
        for stored_as, rows in known.items():
            yield (f"the fused query, key and value rows, {stored_as}, are cut over the ranks like one matrix, and "
                   f"read as thirds on each rank"), qkv_dealt(case, prefixes, rows)


def qkv_dealt(case: Case, prefixes: list[str], order: np.ndarray) -> Case:
    """Deal the fused rows over the ranks, and take the rows of query, key and value one after the other on each."""
    local, K = [dict(own) for own in case.weights], case.config.head_dim
    for prefix in prefixes:
        for key in ("weight", "bias"):
            names = [f"{prefix}{part}.{key}" for part in ("query", "key", "value")]
            if not all(name in case.whole for name in names):
                continue
            fused, begin = np.concatenate([case.whole[name] for name in names])[order], 0
            for own, heads in zip(local, case.heads):
                mine = features(heads, K)
                for name in names:
                    part = fused[begin:begin + len(mine)]
                    begin += len(mine)
                    if name == names[0]:
                        own[name] = part
                    else:                               # whole on every rank, which uses the rows of its own heads
                        own[name] = case.whole[name].copy()
                        own[name][mine] = part
    return case.with_weights(local)


def fused_orders(H: int, G: int, K: int) -> dict[str, np.ndarray]:
    """Return for each way to fuse query, key and value the rows of [query; key; value] in that order."""
    query, key, value = (first + np.arange(heads * K).reshape(heads, K)
                         for first, heads in ((0, H), (H * K, G), ((H + G) * K, G)))
    by_group = [np.concatenate([query[g * (H // G):(g + 1) * (H // G)].ravel(), key[g], value[g]]) for g in range(G)]
    orders = {"as all queries, all keys, all values": np.arange((H + 2 * G) * K),
              "by groups of heads" if H != G else "by heads": np.concatenate(by_group)}
    if H == G:
        turns = np.stack([query, key, value], axis=2)               # (H, K, 3)
        orders["by features of each head"] = turns.ravel()
        orders["by features of all heads"] = np.stack([a.ravel() for a in (query, key, value)], axis=1).ravel()
    return orders


MISTAKES = (Mistake("gate and up", gate_and_up), Mistake("fused qkv", fused_qkv))
