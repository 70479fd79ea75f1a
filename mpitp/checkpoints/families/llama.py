"""Llama (arXiv 2302.13971), and those that differ from it in what their config.json says, not in what they compute.

Mistral (2310.06825), Ministral, Qwen2 (2407.10671), Qwen3 (2505.09388), Seed-OSS; Helium's rotary pairs are neighbours.
"""
from __future__ import annotations

from .rope import Rope
from .tables import ABOVE_0, COMMON, FLAG, GATED_RMS, HEADS, NUMBER, SIZE, Key, Table
from .windows import FromLayer, OneWindow, Typed

TENSORS = {
    "embedding": "embed_tokens",
    "attention_norm": "layers.{}.input_layernorm",
    "attention.query": "layers.{}.self_attn.q_proj",
    "attention.key": "layers.{}.self_attn.k_proj",
    "attention.value": "layers.{}.self_attn.v_proj",
    "attention.out": "layers.{}.self_attn.o_proj",
    "attention.query_norm": "layers.{}.self_attn.q_norm",
    "attention.key_norm": "layers.{}.self_attn.k_norm",
    "mlp_norm": "layers.{}.post_attention_layernorm",
    "mlp.gate": "layers.{}.mlp.gate_proj",
    "mlp.up": "layers.{}.mlp.up_proj",
    "mlp.down": "layers.{}.mlp.down_proj",
    "final_norm": "norm",
    "head": "lm_head",
}
INVERSE_FREQUENCIES = r".*\.rotary_emb\.inv_freq"       # in old checkpoints

ATTENTION_BIAS = {"qkv_bias": Key(FLAG, "attention_bias", False), "attention_bias": Key(FLAG, "attention_bias", False)}
MLP_BIAS = {"mlp_bias": Key(FLAG, "mlp_bias", False)}

LLAMA = Table({**COMMON, **ATTENTION_BIAS, **MLP_BIAS}, dict(gated=True, normalization="rmsnorm"))
MISTRAL = Table({**COMMON, "num_query_groups": Key(HEADS, "num_key_value_heads", 8)}, GATED_RMS, windows=OneWindow())
MINISTRAL = Table(MISTRAL.keys, GATED_RMS, windows=Typed())
QWEN2 = Table({**COMMON, "num_query_groups": Key(HEADS, "num_key_value_heads", 32)}, {**GATED_RMS, "qkv_bias": True},
              windows=FromLayer())
QWEN3 = Table({**QWEN2.keys, **ATTENTION_BIAS, "kv_channels": Key(SIZE, "head_dim", 128)},
              dict(gated=True, normalization="rmsnorm", mlp_bias=False, qk_norm=True), windows=FromLayer())
SEED_OSS = Table({**COMMON, **MLP_BIAS, "num_query_groups": Key(HEADS, "num_key_value_heads", 8),
                  "kv_channels": Key(SIZE, "head_dim", 128), "qkv_bias": Key(FLAG, "attention_bias", True),
                  "attention_bias": Key(FLAG, "attention_out_bias", False),
                  "attention_dropout": Key(NUMBER, "attention_dropout", 0.1)},
                 dict(gated=True, normalization="rmsnorm"))
HELIUM = Table({**COMMON, **MLP_BIAS, "num_query_groups": Key(HEADS, "num_key_value_heads", 20),
                "kv_channels": Key(SIZE, "head_dim", 128), "qkv_bias": Key(FLAG, "attention_bias", False),
                "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-8)},
               dict(gated=True, normalization="rmsnorm", attention_bias=False), rope=Rope(1e5, interleaved=True))

FAMILIES = [
    table.family(model_type, architecture, TENSORS, buffers=INVERSE_FREQUENCIES, without_effect=without_effect,
                 refused=refused)
    for model_type, architecture, table, without_effect, refused in (
        ("llama", "LlamaForCausalLM", LLAMA, ("pretraining_tp", "is_llama_config"), (("rope_interleaved", (False,)),)),
        ("mistral", "MistralForCausalLM", MISTRAL, (), ()),
        ("ministral", "MinistralForCausalLM", MINISTRAL, (), ()),
        ("qwen2", "Qwen2ForCausalLM", QWEN2, (), (("use_mrope", (False,)),)),
        ("qwen3", "Qwen3ForCausalLM", QWEN3, (), ()),
        ("seed_oss", "SeedOssForCausalLM", SEED_OSS, ("pretraining_tp", "residual_dropout"), ()),
        ("helium", "HeliumForCausalLM", HELIUM, (), ()))
]
