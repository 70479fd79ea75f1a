"""Mistakes in what is computed: the scale of scores, rotary positions, masks, norms, activations."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ..case import Case
from ..ranks import Local
from ..rounding import stored
from .mistake import Mistake, Planted

ATTENTION = ("attention", "block", "decoder")
NORMS = ("norm", "block", "decoder")


def scales(case: Case) -> Planted:
    """Scale the scores by another size."""
    config = case.config
    if case.kind not in ATTENTION:
        return
    K, D, H = config.head_dim, config.hidden_size, config.num_attention_heads
    of_hidden = [("the square root of hidden_size in place of the head's features", D ** -0.5)]
    others = [("nothing: the scores are not scaled", 1.0), ("the head's features, not their square root", 1.0 / K),
              ("the square root of the head's features, twice", config.scale ** 2),
              ("the square root of the number of heads", H ** -0.5),
              ("the square root of all heads' features", (H * K) ** -0.5),
              ("the default, 1 / sqrt(features of a head), in place of attention_scale", K ** -0.5)]
    yield from one_scale(case, of_hidden)
    if case.ranks > 1:
        counts = [max(1, len(heads)) for heads in case.heads]
        for what, of_ranks in (("hidden_size over the heads of a rank", [(D / n) ** -0.5 for n in counts]),
                               ("all features of a rank's heads", [(n * K) ** -0.5 for n in counts]),
                               ("hidden_size over the ranks", [(D / case.ranks) ** -0.5] * case.ranks),
                               ("the head's features over the ranks", [(K / case.ranks) ** -0.5] * case.ranks),
                               ("a rank's number of heads", [n ** -0.5 for n in counts])):
            configs = tuple(dataclasses.replace(c, attention_scale=s) for c, s in zip(case.configs, of_ranks))
            yield f"attention's scores are scaled by the square root of {what} in place of the head's features", \
                dataclasses.replace(case, configs=configs)
    yield from one_scale(case, others)


def one_scale(case: Case, ways: list[tuple[str, float]]) -> Planted:
    """Scale the scores by the same wrong number on every rank."""
    for what, scale in ways:
        if scale != case.config.scale:
            yield f"attention's scores are scaled by {what}", case.with_config(attention_scale=scale)


def rotary(case: Case) -> Planted:
    """Turn queries and keys twice, not at all, by other pairs, or by other positions."""
    config = case.config
    if case.kind not in ATTENTION or config.position_embedding != "rotary":
        return
    turns = [config.rotary_of(layer) for layer in range(config.num_layers)]
    if all(turn is not None and turn.scaling is None for turn in turns):
        twice = tuple(dataclasses.replace(turn, scaling="linear", factor=0.5) for turn in turns if turn is not None)
        yield "rotary positions are applied twice", case.with_config(rotary=twice)
    flipped = tuple(dataclasses.replace(turn, interleaved=not turn.interleaved) for turn in turns if turn is not None)
    how = "halves in place of interleaved pairs" if turns[0] is not None and turns[0].interleaved else \
        "interleaved pairs in place of halves"
    yield f"rotary positions turn {how}", case.with_config(rotary=flipped)
    yield "rotary positions are not applied", case.with_config(position_embedding="none")
    for base in (1e4, 5e5, 1e6):
        if any(turn is not None and turn.base != base for turn in turns):
            based = tuple(dataclasses.replace(turn, base=base) for turn in turns if turn is not None)
            yield f"rotary positions have base {base:g}", case.with_config(rotary=based)
    for part in (2, 4):
        if all(turn is not None and turn.dim is None for turn in turns) and config.head_dim % (2 * part) == 0:
            dims = tuple(dataclasses.replace(turn, dim=config.head_dim // part) for turn in turns if turn is not None)
            yield f"rotary positions turn only 1/{part} of a head's features", case.with_config(rotary=dims)
    S = sequence_length(case)
    if case.ranks > 1:
        from_zero = np.concatenate([np.arange(stop - start) for start, stop in sequence_parts(case, S)])
        yield "positions of each rank's part of the sequence begin at 0", \
            case.with_faults({"positions": partial(same, value=from_zero)})


def sequence_length(case: Case) -> int:
    """Return how many positions there are."""
    return case.inputs["x" if "x" in case.inputs else "ids"].shape[1]


def sequence_parts(case: Case, S: int) -> list[tuple[int, int]]:
    """Return the positions of each rank: those of its tokens, or even parts."""
    if case.tokens is not None and case.tokens.axis == 1:
        return [(int(part.min(initial=S)), int(part.max(initial=-1)) + 1) if len(part) else (0, 0)
                for part in case.tokens.parts]
    bounds = [S * rank // case.ranks for rank in range(case.ranks + 1)]
    return list(zip(bounds, bounds[1:]))


def same(values: Local, value: np.ndarray) -> Local:
    """Give every rank the same."""
    return [value] * len(values)


def masks(case: Case) -> Planted:
    """Let queries see what they may not, or not see what they may."""
    if case.kind not in ATTENTION:
        return
    S = sequence_length(case)
    yield "the causal mask is missing: queries attend to later positions", case.with_faults({"allowed": see_all})
    yield "the causal mask is off by one: a query does not attend to itself", case.with_faults(
        {"allowed": partial(shift_mask, step=-1)})
    yield "the causal mask is off by one: a query attends to the next position", case.with_faults(
        {"allowed": partial(shift_mask, step=1)})
    windows = {case.config.window(layer) for layer in range(case.config.num_layers)}
    for window in sorted(window for window in windows if window is not None):
        for step, how in ((1, "more"), (-1, "less")):
            if window + step > 0:
                yield f"the sliding window has one position {how} than {window}", \
                    case.with_config(sliding_window=window + step)
        if window < S:
            yield "the sliding window is missing", case.with_config(sliding_window=None)
    if "mask" in case.inputs:
        inputs = {name: array for name, array in case.inputs.items() if name != "mask"}
        yield "the mask of keys is missing", dataclasses.replace(case, inputs=inputs)
    if case.config.position_embedding == "alibi" and case.ranks > 1:
        local = [np.arange(len(heads)) for heads in case.heads]
        yield "ALiBi's slopes are counted from head 0 on every rank", case.with_faults(
            {"alibi_heads": partial(each, found=local)})
        counts = [max(1, len(heads)) for heads in case.heads]
        yield "ALiBi's slopes are those of as many heads as a rank has: the number is local", case.with_faults(
            {"alibi_heads": partial(each, found=local), "alibi_count": partial(each, found=counts)})


def see_all(values: Local) -> Local:
    """Allow every pair."""
    return [np.ones_like(value) for value in values]


def shift_mask(values: Local, step: int) -> Local:
    """Allow keys up to `step` behind the query."""
    S = values[0].shape[-1]
    causal = np.arange(S) <= np.arange(S)[:, None] + step
    return [np.broadcast_to(causal, value.shape) for value in values]


def each(values: Local, found: Local) -> Local:
    """Give every rank its own of a list."""
    return found


def norms(case: Case) -> Planted:
    """Normalise with another epsilon, kind, or weight."""
    config = case.config
    if case.kind not in NORMS and not config.qk_norm:
        return
    for epsilon in (1e-5, 1e-6, 1e-8, 1e-12, 1e-7, 1e-4, 1e-3, 1e-2, 1e-300):
        if epsilon != config.norm_epsilon:
            yield f"the norm's epsilon is {epsilon:g} in place of {config.norm_epsilon:g}" if epsilon > 1e-200 else \
                f"the norm's epsilon, {config.norm_epsilon:g}, is missing", case.with_config(norm_epsilon=epsilon)
    other = "rmsnorm" if config.normalization == "layernorm" else "layernorm"
    yield f"the norm is of kind {other} in place of {config.normalization}", case.with_config(normalization=other)
    centred = "w in place of 1 + w" if config.zero_centered_gamma else "1 + w in place of w"
    yield f"the norm multiplies by {centred}", case.with_config(zero_centered_gamma=not config.zero_centered_gamma)
    if config.qk_norm:
        yield "the norms of query and key are missing", case.with_config(qk_norm=False)


def unbiased(case: Case) -> Planted:
    """Divide the variance by K - 1, as statistics do, not by K."""
    names = [name for name in case.whole if name == "weight" or name.endswith("norm.weight")]
    config = case.config
    if case.kind not in NORMS or config.normalization != "layernorm" or config.zero_centered_gamma or config.qk_norm:
        return
    K = len(case.whole[names[0]]) if names else 1
    if K > 1:                       # (var K / (K - 1) + e)^-1/2 = c (var + e c^2)^-1/2 with c^2 = (K - 1) / K
        c = ((K - 1) / K) ** 0.5
        local = [{**own, **{name: own[name] * c for name in names}} for own in case.weights]
        yield "the norm's variance is divided by one less than the number of features", \
            case.with_weights(local).with_config(norm_epsilon=config.norm_epsilon * c * c).with_faults(
                {"norm_weight_value": partial(multiplied, factor=c)})


def multiplied(values: Local, factor: float) -> Local:
    """Multiply by a number."""
    return [value * factor for value in values]


def activations(case: Case) -> Planted:
    """Take another activation."""
    if case.kind not in ("mlp", "block", "decoder"):
        return
    for name in ("gelu_tanh", "gelu", "silu", "relu", "identity"):
        if name != case.config.activation:
            yield f"the activation is {name} in place of {case.config.activation}", case.with_config(activation=name)


def short_inputs(case: Case) -> Planted:
    """Multiply numbers that were rounded to 16 bits."""
    if case.kind in ("gradient_norm", "loss"):
        return
    for dtype, name in (("BF16", "bfloat16"), ("F16", "float16")):
        short = partial(stored_all, dtype=dtype)
        inputs, local = short(case.inputs), [short(own) for own in case.weights]
        yield f"inputs and weights are rounded to {name} before they are multiplied", \
            dataclasses.replace(case, inputs=inputs, weights=tuple(local))
        yield f"weights are rounded to {name}", dataclasses.replace(case, weights=tuple(local))


def stored_all(arrays: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Round all floating-point arrays of a dict."""
    return {name: stored(a, dtype) if a.dtype.kind == "f" else a for name, a in arrays.items()}


MISTAKES = (Mistake("attention scale", scales), Mistake("rotary", rotary), Mistake("attention mask", masks),
            Mistake("norm", norms), Mistake("norm variance", unbiased), Mistake("activation", activations),
            Mistake("16 bits", short_inputs))
