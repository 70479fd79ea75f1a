"""Nemotron-4 and Minitron (arXiv 2402.16819, 2407.14679): layer norms by 1 + w, the square of relu, half rotary."""
from __future__ import annotations

from .llama import ATTENTION_BIAS, MLP_BIAS, TENSORS
from .rope import Rope
from .tables import ABOVE_0, ACTIVATION, COMMON, NUMBER, Key, Table

TABLE = Table({**COMMON, **ATTENTION_BIAS, **MLP_BIAS, "activation": Key(ACTIVATION, "hidden_act", "relu2"),
               "norm_epsilon": Key(ABOVE_0, "norm_eps", 1e-5),
               "init_method_std": Key(NUMBER, "initializer_range", 0.0134)},
              dict(zero_centered_gamma=True), rope=Rope(part=0.5, part_key="partial_rotary_factor"))

# hidden_dropout is read by none of theirs.
FAMILIES = [TABLE.family("nemotron", "NemotronForCausalLM", TENSORS, without_effect=("hidden_dropout",),
                         refused=(("is_causal", (True,)),))]        # as in stablelm.py
