"""StableLM (arXiv 2402.17834): layer norms in a Llama; a quarter of each head rotates.

StableLM 2 12B normalises queries and keys, each head by weights of its own, which are tensors of their own.
"""
from __future__ import annotations

from .llama import TENSORS
from .rope import Rope
from .tables import ABOVE_0, COMMON, FLAG, HEADS, Key, Table

STABLELM_TENSORS = {**TENSORS, **{f"attention.{part}_norm": f"layers.{{}}.self_attn.{part[0]}_layernorm.norms.{{{{}}}}"
                                  for part in ("query", "key")}}

TABLE = Table({
    **{field: key for field, key in COMMON.items() if field != "kv_channels"},
    "num_query_groups": Key(HEADS, "num_key_value_heads", 32),
    "norm_epsilon": Key(ABOVE_0, "layer_norm_eps", 1e-5),
    "qkv_bias": Key(FLAG, "use_qkv_bias", False),
    "parallel_residual": Key(FLAG, "use_parallel_residual", False),
    "shared_norm": Key(FLAG, "use_parallel_residual", False),
    **{field: Key(FLAG, "qk_layernorm", False) for field in ("qk_norm", "qk_norm_by_head")},
}, dict(gated=True, attention_bias=False, mlp_bias=False), rope=Rope(part=0.25, part_key="partial_rotary_factor"))

# is_causal: in transformers what it does depends on the implementation of attention that is chosen there.
# hidden_dropout is of training, and theirs drops the feed-forward branch alone.
FAMILIES = [TABLE.family("stablelm", "StableLmForCausalLM", STABLELM_TENSORS, without_effect=("hidden_dropout",),
                         refused=(("head_dim", ()), ("is_causal", (True,))))]
