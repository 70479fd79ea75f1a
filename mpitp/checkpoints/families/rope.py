"""Rotary positions out of a config.json, in both of its styles.

rope_theta and rope_scaling {"type" or "rope_type", ...} beside the other keys; or rope_parameters with all of it, in
one object or in one for each kind of layer.
"""
import math

from ...config import Rotary
from ...errors import InputError

KINDS = ("default", "linear", "llama3", "yarn")
KNOWN = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
         "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
         "mscale_all_dim", "truncate", "finetuned"}     # what a type does not look at it does not have


def rotary(keys, head_dim, theta=10000.0, theta_key="rope_theta", part=1.0, part_key=None, layer_type=None,
           scaled=True):
    """The Rotary of the model, or of its layers of one type.

    keys : of the whole config.json
    theta, part : where it does not say it; part: of a head's features that turn
    theta_key, part_key : what the old style calls them; no part_key: all of a head turns in this family
    layer_type : the key of rope_parameters that its layers' object is under
    scaled : whether the old style's rope_scaling is theirs
    """
    theta = keys.number(theta_key, default=theta, above=0)
    if part_key is None:
        keys.refuse(partial_rotary_factor=1)
    else:
        part = keys.number(part_key, default=part, above=0)
    found = keys.inner("rope_parameters")
    if layer_type is not None and found is not None:
        found = found.inner(layer_type)
    if found is None and scaled:
        found = keys.inner("rope_scaling")
    if found is None:
        return Rotary(dim=turning(part, head_dim, keys), base=theta)
    theta = found.number("rope_theta", default=theta, above=0)
    if part_key is None:
        found.refuse(partial_rotary_factor=1)
    else:
        part = found.number("partial_rotary_factor", default=part, above=0)
    kind = found.get("rope_type", default=None) or found.get("type", default="default")
    if kind not in KINDS:
        raise InputError(f"{found.where}: found rope_type {kind!r}, expected one of {', '.join(KINDS)}")
    more = {} if kind == "default" else scaling(kind, found, keys)
    unknown = [name for name, value in found.values.items() if value is not None and name not in KNOWN]
    if unknown:
        raise InputError(f"{found.where}: found {unknown[0]!r}, expected no such key for rope_type {kind!r}: it may "
                         f"change the results and is not supported")
    return Rotary(dim=turning(part, head_dim, found), base=theta, **more)


def rope_keys(rotary, theta_key="rope_theta"):
    """What says so in the old style, which every transformers reads."""
    if rotary is None:
        return {}
    scaling = None
    if rotary.scaling is not None:
        scaling = {"rope_type": rotary.scaling, "factor": rotary.factor}
        if rotary.scaling != "linear":
            scaling["original_max_position_embeddings"] = rotary.original_max_positions
        more = {"llama3": ("low_freq_factor", "high_freq_factor"),
                "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate")}.get(rotary.scaling, ())
        scaling.update((name, getattr(rotary, name)) for name in more if getattr(rotary, name) is not None)
    return {theta_key: rotary.base, "rope_scaling": scaling}


def turning(part, head_dim, keys):
    """How many features of a head turn; None: all."""
    dim = int(head_dim * part)
    if not 0 < part <= 1 or dim % 2 or dim == 0:
        raise InputError(f"{keys.where}: found {part} of {head_dim} features that turn, expected an even number of "
                         f"them")
    return None if dim == head_dim else dim


def scaling(kind, found, keys):
    """The fields of Rotary that stretch the frequencies."""
    if kind == "linear":
        return dict(scaling=kind, factor=found.number("factor", above=0))
    longest = keys.count("max_position_embeddings", default=None)
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
    scale, scale_of_all = found.number("mscale", default=None), found.number("mscale_all_dim", default=None)
    if attention_factor is None and scale and scale_of_all:
        attention_factor = temperature(factor, scale) / temperature(factor, scale_of_all)
    if factor is None:
        raise InputError(f"{found.where}: found no factor, expected it there")
    return dict(scaling=kind, factor=factor, original_max_positions=original, attention_factor=attention_factor,
                beta_fast=found.number("beta_fast", default=32.0, above=0),
                beta_slow=found.number("beta_slow", default=1.0, above=0),
                truncate=found.flag("truncate", default=True))


def temperature(factor, scale):
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
