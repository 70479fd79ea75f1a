"""GLM-4 and its successors (arXiv 2406.12793): half of each head rotates, in pairs of neighbours."""
from __future__ import annotations

from dataclasses import replace

from .fused import gate_then_up
from .llama import TENSORS
from .rope import Rope
from .tables import ABOVE_0, COMMON, FLAG, HEADS, SIZE, Key, Table

GLM_TENSORS = {**TENSORS, "mlp.gate": "layers.{}.mlp.gate_up_proj", "mlp.up": "layers.{}.mlp.gate_up_proj"}
GLM4_TENSORS = {**GLM_TENSORS, "attention_post_norm": "layers.{}.post_self_attn_layernorm",
                "mlp_post_norm": "layers.{}.post_mlp_layernorm"}

GLM = Table({**COMMON, "num_query_groups": Key(HEADS, "num_key_value_heads", 2),
             "kv_channels": Key(SIZE, "head_dim", 128), "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1.5625e-07),
             "qkv_bias": Key(FLAG, "attention_bias", True)},
            dict(gated=True, normalization="rmsnorm", attention_bias=False, mlp_bias=False),
            rope=Rope(part=0.5, part_key="partial_rotary_factor", interleaved=True))
GLM4 = replace(GLM, fixed={**GLM.fixed, "norm_placement": "both"})

FAMILIES = [GLM.family("glm", "GlmForCausalLM", GLM_TENSORS, fused=gate_then_up),
            GLM4.family("glm4", "Glm4ForCausalLM", GLM4_TENSORS, fused=gate_then_up)]
