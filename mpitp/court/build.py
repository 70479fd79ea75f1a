"""Make a Case of a dump: the whole weights, the inputs, and how the work is dealt over the ranks."""
from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from ..config import DecoderConfig
from ..errors import InputError, require
from ..sharding.decoder_specs import block_specs, decoder_specs
from ..sharding.partition import ranges
from .case import Case
from .dump import Dump, Tensor, decoder_config, title
from .layouts import take
from .programs.attention import features
from .ranks import Place

MOST_NUMBERS = 2 ** 28      # of the largest tensor between, such as the scores: 2 GiB in float64
DROPOUTS = ("weights.dropout", "attention.weights.dropout", "attention.dropout", "mlp.dropout", "embedding.dropout")
TARGETS = {"embedding": ("ids",), "decoder": ("ids", "targets"), "loss": ("logits", "targets"), "gradient_norm": ()}


def make_case(dump: Dump) -> tuple[Case, Case]:
    """Make the dense case of a dump, and that of its ranks.

    Parameters
    ----------
    dump : Dump

    Returns
    -------
    dense, on_ranks : Case
        The same computation on one rank, and on as many as the dump has.

    Raises
    ------
    InputError
        What the dense side does not know, what is missing, and shapes that do not fit each other.
    """
    inputs = whole_inputs(dump)
    weights = whole_gradients(dump) if dump.kind == "gradient_norm" else whole_weights(dump)
    config = config_of(dump, weights, inputs)
    check_shapes(dump.kind, config, weights, inputs)
    require_size(dump.kind, config, inputs, weights)
    tokens = tokens_place(dump)
    places = weight_places(dump, config, weights)
    by_tokens = tokens is not None and deals_tokens_alone(dump)
    if by_tokens:
        places = dict.fromkeys(places)
    heads, kv_heads = head_places(dump, config, places) if dump.kind in ("attention", "block", "decoder") else ((), ())
    options = dict(dump.options, eps=0.0)
    dense = Case(dump.kind, (config,), options, weights, (weights,), dict.fromkeys(places), inputs,
                 heads=everything(config.num_attention_heads), kv_heads=everything_kv(config),
                 smoothing=(options["label_smoothing"],))
    local = [{name: local_weight(name, w, places[name], rank) for name, w in weights.items() if name in places}
             for rank in range(dump.ranks)]
    on_ranks = Case(dump.kind, (config,) * dump.ranks, options, weights, tuple(local), places, inputs, tokens, by_tokens,
                    heads or everything(config.num_attention_heads) * dump.ranks,
                    kv_heads or everything_kv(config) * dump.ranks,
                    smoothing=(options["label_smoothing"],) * dump.ranks)
    return dense, on_ranks


def everything(count: int) -> tuple[Array, ...]:
    """Return the indices of all, as one rank has them."""
    return (np.arange(count),)


def everything_kv(config: DecoderConfig) -> tuple[Array, ...]:
    """Return the key/value head of every query head."""
    return (np.arange(config.num_attention_heads) // (config.num_attention_heads // config.query_groups),)


def local_weight(name: str, whole: Array, place: Place | None, rank: int) -> Array:
    """Return a rank's slice of a weight."""
    return whole if place is None else take(whole, place.parts[rank], place.axis)


# --- inputs and weights ------------------------------------------------------------------------------------------

def whole_inputs(dump: Dump) -> dict[str, Array]:
    """Return the whole inputs of a dump's kind. Raises InputError for one that is missing."""
    forward, backward = dump.of_phase("forward"), dump.of_phase("backward")
    needed = TARGETS.get(dump.kind, ("x",))
    for name in needed:
        require(name in forward, f"no {name} in the forward phase", f"it, for a {dump.kind}")
    inputs = {name: forward[name].whole() for name in (*needed, "mask", *DROPOUTS) if name in forward}
    inputs.update({name: t.whole() for name, t in forward.items() if name.endswith(".dropout")})
    if dump.kind in ("loss", "decoder", "gradient_norm"):
        return inputs
    if "y" in backward:
        inputs["dy"] = backward["y"].whole()
    elif backward:
        raise InputError("found gradients but no y in the backward phase, expected the gradient of y there")
    return inputs


def whole_weights(dump: Dump) -> dict[str, Array]:
    """Return the whole weights: the reference's, and those that the ranks' slices make up."""
    found = {name: tensor.whole() for name, tensor in dump.of_phase("weights").items()}
    for name, tensor in dump.of_phase("weights").items():
        require(tensor.layout.how != "partial", f"weights {name}: layout partial", "replicated or split")
    return {**found, **{name: tensor.whole() for name, tensor in dump.of_phase("reference").items()}}


def whole_gradients(dump: Dump) -> dict[str, Array]:
    """Return the whole gradients, which a gradient norm is taken of."""
    found = {name: tensor.whole() for name, tensor in dump.of_phase("backward").items()}
    require(found, "no gradients in the backward phase", "those that the norm is taken of")
    return found


# --- the configuration, and whether shapes fit it ----------------------------------------------------------------

def config_of(dump: Dump, weights: dict[str, Array], inputs: dict[str, Array]) -> DecoderConfig:
    """Return the architecture: what the dump says, and where it does not, what its shapes say."""
    derived: dict[str, Any] = {"vocab_size": 1, "hidden_size": 1, "num_layers": dump.options["layer"] + 1,
                               "num_attention_heads": 1, "kv_channels": 2}
    given = dump.config
    if dump.kind in ("attention", "block", "decoder"):
        require("num_attention_heads" in given, f"no num_attention_heads in the config of {dump.kind}", "it")
    if "num_attention_heads" in given:
        del derived["kv_channels"]
    if "x" in inputs:
        require(inputs["x"].ndim > 0 and inputs["x"].shape[-1] > 0, f"x of shape {inputs['x'].shape}", "features")
        derived["hidden_size"] = inputs["x"].shape[-1]
    if "embedding.weight" in weights and weights["embedding.weight"].ndim == 2:
        derived["vocab_size"], derived["hidden_size"] = map(int, weights["embedding.weight"].shape)
    derived["gated"] = any(name.endswith("gate.weight") for name in weights)
    if "mlp.up.weight" in weights:
        derived["ffn_hidden_size"] = len(weights["mlp.up.weight"])
    if "layers.0.mlp.up.weight" in weights:
        derived["ffn_hidden_size"] = len(weights["layers.0.mlp.up.weight"])
    if dump.kind == "norm":
        derived["normalization"] = "layernorm" if "bias" in weights else given.get("normalization", "layernorm")
    for name in ("head_bias", "qkv_bias", "attention_bias", "mlp_bias", "norm_bias"):
        derived.setdefault(name, True)
    if dump.kind == "decoder":
        derived["tie_word_embeddings"] = "head.weight" not in weights
        require("num_layers" in given, "no num_layers in the config of decoder", "it")
    config = decoder_config(given, **derived)
    if dump.kind in ("attention", "block"):
        require(config.hidden_size == inputs["x"].shape[-1], f"x of {inputs['x'].shape[-1]} features",
                f"hidden_size = {config.hidden_size}")
    return config


def check_shapes(kind: str, config: DecoderConfig, weights: dict[str, Array], inputs: dict[str, Array]) -> None:
    """Raise InputError unless weights have the names and shapes of the kind, and ids and targets are in range."""
    expected = expected_shapes(kind, config, weights, inputs)
    for name, shape in expected.items():
        if name not in weights:
            require(name.endswith("bias"), f"no weight {name}", f"it, {shape}, for a {kind}")
        elif weights[name].shape != shape:
            raise InputError(f"{name}: found whole shape {weights[name].shape}, expected {shape}")
    for name in weights if kind != "gradient_norm" else ():
        require(name in expected, f"a weight {name}", f"one of {', '.join(expected)} for a {kind}"[:300])
    for name, size in vocabulary_of(kind, config, weights, inputs).items():
        array, ignored = inputs[name], -1 if name == "ids" else None
        good = (array >= 0) & (array < size)
        if ignored is None:
            good |= array == -100
        if not good.all() and name == "ids":
            raise InputError(f"{name}: found {int(array[~good][0])}, expected ids from 0 to {size - 1}")
    if kind in ("attention", "block"):
        require(inputs["x"].ndim == 3, f"x of shape {inputs['x'].shape}", "(B, S, D)")
    if "mask" in inputs:
        B, S = inputs["x" if "x" in inputs else "ids"].shape[:2]
        require(inputs["mask"].shape in ((B, S), (B, S, S)), f"a mask {inputs['mask'].shape}", f"{(B, S)} or {(B, S, S)}")


def vocabulary_of(kind: str, config: DecoderConfig, weights: dict[str, Array], inputs: dict[str, Array]) -> dict[str, int]:
    """Return {input: how many ids there are}."""
    if kind == "embedding":
        return {"ids": len(weights["weight"])}
    if kind == "decoder":
        require(inputs["ids"].ndim == 2, f"ids of shape {inputs['ids'].shape}", "(B, S)")
        require(inputs["targets"].shape == inputs["ids"].shape, f"targets {inputs['targets'].shape}", "as ids")
        return {"ids": config.vocab_size, "targets": config.vocab_size}
    if kind == "loss":
        shape = inputs["logits"].shape
        require(inputs["targets"].shape == shape[:-1] and len(shape) > 0,
                f"targets {inputs['targets'].shape} for logits {shape}", f"{shape[:-1]}")
        return {"targets": shape[-1]}
    return {}


def expected_shapes(kind: str, config: DecoderConfig, weights: dict[str, Array],
                    inputs: dict[str, Array]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of all weights that the kind may have; biases may be left out."""
    D = inputs["x"].shape[-1] if "x" in inputs else 0
    if kind in ("column_linear", "row_linear"):
        O = len(weights["weight"]) if "weight" in weights and weights["weight"].ndim else 0     # noqa: E741
        return {"weight": (O, D), "bias": (O,)}
    if kind == "norm":
        return {"weight": (D,), "bias": (D,)}
    if kind == "embedding":
        shape = weights["weight"].shape if "weight" in weights else ()
        return {"weight": shape if len(shape) == 2 else (0, 0)}
    if kind == "mlp":
        F = len(weights["up.weight"]) if "up.weight" in weights and weights["up.weight"].ndim else 0
        gate = {"gate.weight": (F, D), "gate.bias": (F,)} if "gate.weight" in weights else {}
        return {"up.weight": (F, D), "up.bias": (F,), **gate, "down.weight": (D, F), "down.bias": (D,)}
    if kind in ("attention", "block"):
        specs = block_specs(config, 0, "")
        shapes = {spec.name: spec.shape for spec in specs}
        start = "attention."
        return shapes if kind == "block" else {name[len(start):]: shape for name, shape in shapes.items()
                                               if name.startswith(start)}
    return {name: spec.shape for name, spec in decoder_specs(config).items()} if kind == "decoder" else {}


def require_size(kind: str, config: DecoderConfig, inputs: dict[str, Array], weights: dict[str, Array]) -> None:
    """Raise InputError for a computation whose tensors between would not fit a machine."""
    first = next((inputs[name] for name in ("x", "ids", "logits") if name in inputs), np.zeros(1))
    tokens = prod(first.shape[:-1]) if "ids" not in inputs else first.size
    largest = tokens * max((max(w.shape, default=1) for w in weights.values()), default=1)
    if kind in ("attention", "block", "decoder") and first.ndim >= 2:
        largest = max(largest, config.num_attention_heads * first.shape[0] * first.shape[1] ** 2)
    require(largest <= MOST_NUMBERS, f"a computation with a tensor of {largest} numbers",
            f"at most {MOST_NUMBERS}: fewer tokens show the same")


# --- how the work is dealt ---------------------------------------------------------------------------------------

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


