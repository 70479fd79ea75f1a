"""Make a Case of a dump: the whole weights, the inputs, and how the work is dealt over the ranks."""
from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..arrays import Array
from ..config import DecoderConfig
from ..errors import InputError, require
from ..sharding.decoder_specs import block_specs, decoder_specs
from .case import Case
from .dealing import deals_tokens_alone, head_places, tokens_place, weight_places
from .dump import Dump, decoder_config
from .inputs import given_to
from .layouts import take
from .ranks import Place

MOST_NUMBERS = 2 ** 28      # of the largest tensor between, such as the scores: 2 GiB in float64
DROPOUTS = ("weights.dropout", "attention.weights.dropout", "attention.dropout", "mlp.dropout", "embedding.dropout")


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
    check_shapes(dump.kind, config, weights, inputs, dump.options["ignore_index"])
    inputs.setdefault("dy", np.zeros(shape_of_y(dump.kind, weights, inputs)))       # of forward alone
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
    on_ranks = Case(dump.kind, (config,) * dump.ranks, options, weights, tuple(local), places, inputs, tokens,
                    by_tokens, heads or everything(config.num_attention_heads) * dump.ranks,
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
    needed = given_to(dump.kind)
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


def shape_of_y(kind: str, weights: dict[str, Array], inputs: dict[str, Array]) -> tuple[int, ...]:
    """Return the shape of y, for kinds that have one."""
    if kind in ("column_linear", "row_linear"):
        return (*inputs["x"].shape[:-1], len(weights["weight"]))
    if kind == "embedding":
        return (*inputs["ids"].shape, weights["weight"].shape[1])
    return inputs["x"].shape if "x" in inputs else ()


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


def check_shapes(kind: str, config: DecoderConfig, weights: dict[str, Array], inputs: dict[str, Array],
                 ignored: int) -> None:
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
        array = inputs[name]
        good = (array >= 0) & (array < size) | (name == "targets") & (array == ignored)
        if not good.all():
            also = f", or {ignored}" if name == "targets" else ""
            raise InputError(f"{name}: found {int(array[~good][0])}, expected ids from 0 to {size - 1}{also}")
    if kind == "decoder" and config.position_embedding == "learned":
        most, S = config.max_position_embeddings or 0, inputs["ids"].shape[1]
        require(most >= S, f"ids of {S} positions", f"at most max_position_embeddings = {most}")
    if kind in ("attention", "block"):
        require(inputs["x"].ndim == 3, f"x of shape {inputs['x'].shape}", "(B, S, D)")
    if "mask" in inputs:
        B, S = inputs["x" if "x" in inputs else "ids"].shape[:2]
        require(inputs["mask"].shape in ((B, S), (B, S, S)), f"a mask {inputs['mask'].shape}",
                f"{(B, S)} or {(B, S, S)}")


def vocabulary_of(kind: str, config: DecoderConfig, weights: dict[str, Array],
                  inputs: dict[str, Array]) -> dict[str, int]:
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
