"""Arcee's AFM: a Llama whose feed-forward block has no gate, and the square of relu."""
from __future__ import annotations

from .llama import ATTENTION_BIAS, MLP_BIAS, TENSORS
from .tables import ABOVE_0, ACTIVATION, COMMON, Key, Table

TABLE = Table({**COMMON, **ATTENTION_BIAS, **MLP_BIAS, "activation": Key(ACTIVATION, "hidden_act", "relu2"),
               "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-5)}, dict(normalization="rmsnorm"))

FAMILIES = [TABLE.family("arcee", "ArceeForCausalLM", TENSORS)]
