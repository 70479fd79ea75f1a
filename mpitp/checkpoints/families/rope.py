"""Rotary positions out of a config.json, in both of its styles.

Old: rope_theta and rope_scaling {"type" or "rope_type", ...} beside the other keys. New: rope_parameters with all of
it, in one object or in one for each kind of layer. Where both exist, rope_scaling counts, as in transformers.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ...attention_config import Rotary
from ...config import DecoderConfig
from ...errors import InputError
from .keys import Keys
from .windows import Windows, type_of

KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# The keys of any kind. A key that this kind does not read changes nothing in it; all others are refused.
KNOWN = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
         "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
         "mscale_all_dim", "truncate", "finetuned", "short_factor", "long_factor"}


class RopeKeys(Protocol):
    """The keys of config.json that rotary positions are read from and written to."""

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> Rotary | tuple[Rotary | None, ...]:
        """Return the Rotary of all layers, or of each."""

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys."""


@dataclass(frozen=True)
class Rope:
    """All layers rotate in the same way, or those alone that have a sliding window.

    theta, part : where config.json does not say them; part: the share of a head's features that are rotated
    part_key : the name of that share in the old style, None where all of a head turns in this family
    theta_key : the name of theta in the old style
    interleaved : as Rotary has it
    sliding_alone : whether layers without a window rotate nothing
    """
    theta: float = 10000.0
    part: float = 1.0
    part_key: str | None = None
    interleaved: bool = False
    sliding_alone: bool = False
    theta_key: str = "rope_theta"

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> Rotary | tuple[Rotary | None, ...]:
        """Return the Rotary of all layers, or of each. Raises InputError for a value that is not supported."""
        found = rotary(keys, head_dim, self.theta, self.theta_key, self.part, self.part_key)
        found = replace(found, interleaved=self.interleaved)
        return tuple(found if window else None for window in windows) if self.sliding_alone else found

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys, in the old style."""
        found = next(filter(None, config.rotaries), None)
        said = rope_keys(found, self.theta_key)
        if found and self.part_key:
            said[self.part_key] = (found.dim or config.head_dim) / config.head_dim
        return said


@dataclass(frozen=True)
class RopeOfTypes:
    """The layers of each type in layer_types rotate in their own way.

    thetas : {layer type: (its rope_theta's name in the old style, default)}, an empty name where there was none
    """
    thetas: Mapping[str, tuple[str, float]]

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> tuple[Rotary, ...]:
        """Return the Rotary of each layer. Raises InputError for a value that is not supported."""
        turns = rotary_of_layer_types(keys, head_dim, self.thetas)
        return tuple(turns[type_of(window)] for window in windows)

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys, in the old style as far as it can say them."""
        turns = dict(zip(map(type_of, config.windows), config.rotaries))
        full, sliding = turns.get("full_attention"), turns.get("sliding_attention")
        said = rope_keys(full, self.thetas["full_attention"][0])
        key = self.thetas["sliding_attention"][0]
        if sliding and key:
            said[key] = sliding.base
        return said


def rotary(keys: Keys, head_dim: int, theta: float = 10000.0, theta_key: str = "rope_theta", part: float = 1.0,
           part_key: str | None = None) -> Rotary:
    """Return the Rotary of all layers.

    Parameters
    ----------
    keys : Keys
        Of the whole config.json.
    head_dim : int
        Features of a head.
    theta, part : float, optional
        Where config.json does not say them; part: the share of a head's features that are rotated.
    theta_key, part_key : str, optional
        Their names in the old style; no part_key: all of a head turns in this family.
    """
    theta = keys.number(theta_key, default=theta, above=0)
    if part_key is None:
        keys.refuse({"partial_rotary_factor": (1,)})
    else:
        part = keys.number(part_key, default=part, above=0)
    return scaled_rotary(keys, chosen(keys), head_dim, theta, part, part_key is not None)


def chosen(keys: Keys) -> Keys:
    """Return the object that counts where config.json has one for all layers: rope_scaling, unless it is empty."""
    old, new = keys.inner("rope_scaling"), keys.inner("rope_parameters")
    return (old if old is not None and old.values else new) or Keys({})


def rotary_of_layer_types(keys: Keys, head_dim: int, thetas: Mapping[str, tuple[str, float]]) -> dict[str, Rotary]:
    """Return {layer type: Rotary} where rope_parameters has an object for each type of layer.

    rope_scaling, of the old style, is added to that of the "full_attention" layers, where a "type", which
    transformers 4 obeys and 5 does not, is refused. What the whole config.json says of trained positions has no effect.

    Parameters
    ----------
    keys : Keys
        Of the whole config.json.
    head_dim : int
    thetas : {layer type: (its rope_theta's name in the old style, default)}
    """
    keys.refuse({"partial_rotary_factor": (1,)})
    old, new = keys.inner("rope_scaling"), keys.inner("rope_parameters")
    other = sorted(new.values.keys() - thetas.keys()) if new else []
    if new and other:
        raise InputError(f"{new.where}: found {other[0]!r}, expected an object for each of {', '.join(thetas)}")
    turns, of_all = {}, Keys({"max_position_embeddings": keys.values.get("max_position_embeddings")}, keys.where)
    for layer_type, (key, theta) in thetas.items():
        theta = keys.number(key, default=theta, above=0) if key else theta
        found = (new and new.inner(layer_type)) or Keys({}, f"{keys.where}: rope_parameters: {layer_type}")
        if layer_type == "full_attention" and old:
            kind = found.get("rope_type", default=None) or found.get("type", default="default")
            if "rope_type" not in old.values:
                old.refuse({"type": (kind,)})
            found = Keys({"rope_type": kind, **found.values, **old.values}, old.where)
        found.refuse({"truncate": (True,)})             # which theirs reads outside of these objects
        turns[layer_type] = scaled_rotary(of_all, found, head_dim, theta, 1.0, False)
    return turns


def scaled_rotary(keys: Keys, found: Keys, head_dim: int, theta: float, part: float, partial: bool) -> Rotary:
    """Return the Rotary of one object of the new style; theta, part: where the object does not say them."""
    theta = found.number("rope_theta", default=theta, above=0)
    if partial:
        part = found.number("partial_rotary_factor", default=part, above=0)
    else:
        found.refuse({"partial_rotary_factor": (1,)})
    kind = found.get("rope_type", default=None) or found.get("type", default="default")
    if kind not in KINDS:
        raise InputError(f"{found.where}: found rope_type {kind!r}, expected one of {', '.join(KINDS)}")
    more = {} if kind == "default" else scaling(kind, found, keys)
    unknown = [name for name, value in found.values.items() if value is not None and name not in KNOWN]
    if unknown:
        raise InputError(f"{found.where}: found {unknown[0]!r}, expected no such key for rope_type {kind!r}: it may "
                         f"change the results and is not supported")
    return Rotary(dim=rotated_features(part, head_dim, found), base=theta, **more)


def rope_keys(rotary: Rotary | None, theta_key: str = "rope_theta") -> dict:
    """Return the keys of a Rotary in the old style, which every transformers reads."""
    if rotary is None:
        return {}
    scaling = None
    if rotary.scaling is not None:
        scaling = {"rope_type": rotary.scaling, "factor": rotary.factor}
        if rotary.scaling == "dynamic":
            return {theta_key: rotary.base, "rope_scaling": scaling,
                    "max_position_embeddings": rotary.original_max_positions}
        if rotary.scaling != "linear":
            scaling["original_max_position_embeddings"] = rotary.original_max_positions
        if rotary.scaling == "longrope":
            assert rotary.short_factors and rotary.long_factors
            scaling.update(short_factor=list(rotary.short_factors), long_factor=list(rotary.long_factors))
        more = {"llama3": ("low_freq_factor", "high_freq_factor"), "longrope": ("attention_factor",),
                "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate")}.get(rotary.scaling, ())
        scaling.update((name, getattr(rotary, name)) for name in more if getattr(rotary, name) is not None)
    return {theta_key: rotary.base, "rope_scaling": scaling}


def rotated_features(part: float, head_dim: int, keys: Keys) -> int | None:
    """Return how many features of a head are rotated; None for all."""
    dim = int(head_dim * part)
    if not 0 < part <= 1 or dim % 2 or dim == 0:
        raise InputError(f"{keys.where}: found {part} of {head_dim} features that are rotated, expected an even "
                         f"number of them")
    return None if dim == head_dim else dim


def scaling(kind: str, found: Keys, keys: Keys) -> dict:
    """Return the fields of Rotary that stretch the frequencies."""
    if kind == "linear":
        return dict(scaling=kind, factor=found.number("factor", above=0))
    longest = keys.count("max_position_embeddings", default=None)
    if kind == "dynamic":
        if longest is None:
            raise InputError(f"{keys.where}: found no max_position_embeddings, expected it there")
        return dict(scaling=kind, factor=found.number("factor", above=0), original_max_positions=longest)
    original = keys.count("original_max_position_embeddings", default=None) or \
        found.count("original_max_position_embeddings", default=longest)
    if original is None:
        raise InputError(f"{found.where}: found no original_max_position_embeddings, expected it there")
    if kind == "llama3":
        low, high = found.number("low_freq_factor", above=0), found.number("high_freq_factor", above=0)
        if not low < high:
            raise InputError(f"{found.where}: found low_freq_factor = {low}, high_freq_factor = {high}, expected the "
                             f"second to be larger")
        return dict(scaling=kind, factor=found.number("factor", above=0), original_max_positions=original,
                    low_freq_factor=low, high_freq_factor=high)
    factor = found.number("factor", default=longest and longest / original, above=0)
    attention_factor = found.number("attention_factor", default=None)
    if kind == "longrope":
        short, long = (of_pairs(found, name) for name in ("short_factor", "long_factor"))
        if factor is None and attention_factor is None:
            raise InputError(f"{found.where}: found no factor, expected it there")
        return dict(scaling=kind, factor=factor or 1.0, original_max_positions=original, short_factors=short,
                    long_factors=long, attention_factor=attention_factor)
    scale, scale_of_all = found.number("mscale", default=None), found.number("mscale_all_dim", default=None)
    if attention_factor is None and scale and scale_of_all:
        attention_factor = temperature(factor, scale) / temperature(factor, scale_of_all)
    if factor is None:
        raise InputError(f"{found.where}: found no factor, expected it there")
    return dict(scaling=kind, factor=factor, original_max_positions=original, attention_factor=attention_factor,
                beta_fast=found.number("beta_fast", default=32.0, above=0),
                beta_slow=found.number("beta_slow", default=1.0, above=0),
                truncate=found.flag("truncate", default=True))


def of_pairs(found: Keys, name: str) -> tuple[float, ...]:
    """Return a number above 0 for each pair of features."""
    numbers = found.get(name)
    good = isinstance(numbers, list) and numbers and all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < 1e300 for one in numbers)
    if not good:
        found.fail([name], numbers, "a list of numbers above 0, one for each pair of features")
    return tuple(map(float, numbers))


def temperature(factor: float, scale: float) -> float:
    """Return the attention factor of yarn (arXiv 2309.00071, section 3.4), with DeepSeek's mscale."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
