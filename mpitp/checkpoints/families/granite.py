"""Granite 3: a Llama with a factor for the embedded tokens, the scores, each branch, and the logits."""
from __future__ import annotations

from .keys import Keys
from .llama import ATTENTION_BIAS, MLP_BIAS, TENSORS
from .tables import COMMON, NUMBER, Key, Kind, Table


def inverse(keys: Keys, name: str, default: float) -> float:
    """Return the factor of the logits, which theirs are divided by."""
    return 1 / keys.number(name, default=default, above=0)


def divisor(multiplier: float) -> float:
    """Return what theirs are divided by."""
    return 1 / multiplier


TABLE = Table({
    **COMMON, **ATTENTION_BIAS, **MLP_BIAS,
    "attention_scale": Key(NUMBER, "attention_multiplier", 1.0),
    "embedding_multiplier": Key(NUMBER, "embedding_multiplier", 1.0),
    "residual_multiplier": Key(NUMBER, "residual_multiplier", 1.0),
    "logits_multiplier": Key(Kind(inverse, divisor), "logits_scaling", 1.0),
}, dict(gated=True, normalization="rmsnorm"))

FAMILIES = [TABLE.family("granite", "GraniteForCausalLM", TENSORS)]
