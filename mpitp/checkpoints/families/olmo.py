"""OLMo 2 and 3 (arXiv 2501.00656, 2512.13961): norms after the branches, and over all query and all key heads.

OLMo 3 has sliding and full layers; scaling, where there is some, is that of the full ones.
"""
from __future__ import annotations

from .llama import ATTENTION_BIAS, TENSORS
from .rope import RopeOfTypes
from .tables import ABOVE_0, COMMON, Key, Table
from .windows import Typed

OLMO_TENSORS = {**TENSORS, "attention_post_norm": "layers.{}.post_attention_layernorm",
                "mlp_post_norm": "layers.{}.post_feedforward_layernorm"}
KEYS = {**COMMON, **ATTENTION_BIAS, "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-5)}
FIXED = dict(gated=True, normalization="rmsnorm", mlp_bias=False, norm_placement="after", qk_norm=True,
             qk_norm_over_heads=True)

OLMO2 = Table(KEYS, FIXED)
# The old rope_theta is that of the full layers alone: so transformers reads it.
OLMO3 = Table(KEYS, FIXED, rope=RopeOfTypes({"full_attention": ("rope_theta", 5e5), "sliding_attention": ("", 5e5)}),
              windows=Typed(4))

FAMILIES = [OLMO2.family("olmo2", "Olmo2ForCausalLM", OLMO_TENSORS),
            OLMO3.family("olmo3", "Olmo3ForCausalLM", OLMO_TENSORS)]
