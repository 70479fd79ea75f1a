"""How the work of a dump is dealt over its ranks: by its layouts, and where they do not say it, evenly."""
from __future__ import annotations

import numpy as np

from ..arrays import Array
from ..config import DecoderConfig
from ..sharding.partition import ranges
from .dump import Dump, Tensor
from .programs.attention import features
from .ranks import Place


def tokens_place(dump: Dump) -> Place | None:
    """Return how the tokens are dealt, where x, or logits or ids, are split along an axis of the tokens."""
    forward = dump.of_phase("forward")
    name = next((name for name in ("x", "logits", "ids") if name in forward), None)
    found = forward[name] if name is not None else None
    for other in ("y", "loss"):
        if found is not None and found.layout.how != "split" and other in forward and dump.kind != "decoder":
            found = forward[other] if forward[other].layout.how == "split" else found
    if found is None or found.layout.how != "split" or dump.ranks == 1:
        return None
    ndim = len(found.layout.shape)
    last = ndim - 1 if found.name != "ids" else ndim
    assert name is not None
    whole = forward[name].layout.shape
    if len(whole) <= found.layout.axis or whole[found.layout.axis] != found.layout.shape[found.layout.axis]:
        return None                             # y does not fit x: that is said of y
    return Place(found.layout.axis, found.layout.parts) if found.layout.axis < last else None


def deals_tokens_alone(dump: Dump) -> bool:
    """Return whether nothing but the tokens is split, so that each rank computes with whole weights."""
    if dump.kind in ("norm", "loss"):
        return True
    if dump.of_phase("forward").get("x", dump).__class__ is not Tensor:
        return False
    token_axis = tokens_place(dump)
    assert token_axis is not None
    split = [t for (phase, name), t in dump.tensors.items() if t.layout.how == "split"
             and not (phase in ("forward", "backward") and is_activation(name) and t.layout.axis == token_axis.axis)]
    gradients = [t for name, t in dump.of_phase("backward").items() if not is_activation(name)]
    x_split = dump.of_phase("forward")["x"].layout.how == "split"
    return x_split and not split and bool(gradients) and token_axis.axis == 0


def is_activation(name: str) -> bool:
    """Return whether a tensor is no weight."""
    return not name.endswith(("weight", "bias"))


def weight_places(dump: Dump, config: DecoderConfig, weights: dict[str, Array]) -> dict[str, Place | None]:
    """Return how each weight is split: as the dump says of it or of its neighbours, else as evenly as can be."""
    if dump.kind == "gradient_norm":
        return {name: Place(t.layout.axis, t.layout.parts) if t.layout.how == "split" else None
                for name, t in dump.of_phase("backward").items()}
    places: dict[str, Place | None] = dict.fromkeys(weights)
    if dump.ranks == 1:
        return places
    for name, w in weights.items():
        prefix, _, last = name.rpartition(".")
        group, _, part = prefix.rpartition(".")
        if dump.kind == "column_linear":
            places[name] = Place(0, parts_of(dump, [("weight", 0), ("bias", 0), ("y", -1)], len(w)))
        elif dump.kind == "row_linear" and last == "weight" or name == "weight" and dump.kind == "row_linear":
            places[name] = Place(1, parts_of(dump, [("weight", 1), ("x", -1)], w.shape[1]))
        elif dump.kind == "embedding":
            places[name] = embedding_place(dump, name, w)
        elif name in ("embedding.weight", "head.weight", "head.bias"):
            places[name] = Place(0, parts_of(dump, [("embedding.weight", 0), ("head.weight", 0), ("head.bias", 0),
                                                    ("logits", -1)], len(w)))
        elif part in ("up", "gate") or prefix in ("up", "gate"):
            places[name] = Place(0, ffn_parts(dump, group, len(w)))
        elif name.endswith("down.weight"):
            places[name] = Place(1, ffn_parts(dump, group, w.shape[1]))
        elif part == "query":
            places[name] = Place(0, query_parts(dump, config, group))
        elif name.endswith("out.weight"):
            places[name] = Place(1, query_parts(dump, config, group))
    if dump.kind == "loss":
        parts = dump.of_phase("forward")["logits"].layout
        on_vocabulary = parts.how == "split" and parts.axis == len(parts.shape) - 1
        places["logits"] = Place(parts.axis, parts.parts) if on_vocabulary else None
    return places


def embedding_place(dump: Dump, name: str, w: Array) -> Place | None:
    """Return how an embedding is split, by rows or by columns."""
    for phase in ("weights", "backward"):
        tensor = dump.tensors.get((phase, name))
        if tensor is not None and tensor.layout.how == "split":
            return Place(tensor.layout.axis, tensor.layout.parts)
    y = dump.of_phase("forward").get("y")
    if y is not None and y.layout.how == "split" and y.layout.axis == len(y.layout.shape) - 1:
        return Place(1, y.layout.parts)
    return Place(0, even(len(w), dump.ranks))


def parts_of(dump: Dump, names: list[tuple[str, int]], size: int) -> tuple[Array, ...]:
    """Return the parts of the first of these tensors that is split along its axis, once over; else even ones."""
    for name, axis in names:
        for phase in ("weights", "backward", "forward"):
            tensor = dump.tensors.get((phase, name))
            if tensor is None or tensor.layout.how != "split":
                continue
            layout = tensor.layout
            if layout.axis == axis % len(layout.shape) and layout.shape[layout.axis] == size and \
                    sum(map(len, layout.parts)) == size:
                return layout.parts
    return even(size, dump.ranks)


def even(size: int, ranks: int) -> tuple[Array, ...]:
    """Return contiguous parts, as equal as can be."""
    bounds = ranges(size, ranks)
    return tuple(np.arange(start, stop) for start, stop in zip(bounds, bounds[1:]))


def ffn_parts(dump: Dump, group: str, F: int) -> tuple[Array, ...]:
    """Return how the features of a feed-forward block are dealt."""
    start = f"{group}." if group else ""
    return parts_of(dump, [(f"{start}up.weight", 0), (f"{start}down.weight", 1), (f"{start}gate.weight", 0),
                           (f"{start}up.bias", 0), (f"{start}hidden", -1), (f"{start}up", -1)], F)


def query_parts(dump: Dump, config: DecoderConfig, group: str) -> tuple[Array, ...]:
    """Return how the features of the query heads are dealt, whole heads together."""
    start, H, K = f"{group}." if group else "", config.num_attention_heads, config.head_dim
    for name, axis in (("query.weight", 0), ("out.weight", 1), ("query.bias", 0), ("context", -1)):
        parts = parts_of(dump, [(f"{start}{name}", axis)], H * K)
        heads = [np.unique(part // K) for part in parts]
        if all(np.array_equal(features(h, K), part) for h, part in zip(heads, parts)) and \
                any(not np.array_equal(a, b) for a, b in zip(parts, even(H * K, dump.ranks))):
            return parts
    parts = parts_of(dump, [(f"{start}query", 2)], H)
    return tuple(features(part, K) for part in parts)


def head_places(dump: Dump, config: DecoderConfig, places: dict) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the query heads of each rank, and the key/value head of each of them."""
    share = config.num_attention_heads // config.query_groups
    name = next((name for name in places if name.endswith("query.weight")), None)
    if name is None or places[name] is None:
        return (), ()
    heads = tuple(np.unique(part // config.head_dim) for part in places[name].parts)
    return heads, tuple(h // share for h in heads)
