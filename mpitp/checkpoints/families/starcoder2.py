"""StarCoder2 (arXiv 2402.19173): layer norms, grouped queries, rotary positions, biases everywhere."""
from __future__ import annotations

from .llama import TENSORS
from .tables import ABOVE_0, ACTIVATION, COMMON, FLAG, HEADS, NUMBER, Key, Table
from .windows import OneWindow

STARCODER2_TENSORS = {**TENSORS, "mlp.up": "layers.{}.mlp.c_fc", "mlp.down": "layers.{}.mlp.c_proj"}

TABLE = Table({
    **COMMON, "num_query_groups": Key(HEADS, "num_key_value_heads", 2),
    "activation": Key(ACTIVATION, "hidden_act", "gelu_pytorch_tanh"),
    "norm_epsilon": Key(ABOVE_0, "norm_epsilon", 1e-5),
    "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True),
    "init_method_std": Key(NUMBER, "initializer_range", 0.018042),
    **{field: Key(FLAG, "use_bias", True) for field in ("qkv_bias", "attention_bias", "mlp_bias")},
}, {}, windows=OneWindow(None))

# The two dropouts are of training.
FAMILIES = [TABLE.family("starcoder2", "Starcoder2ForCausalLM", STARCODER2_TENSORS,
                         without_effect=("residual_dropout", "embedding_dropout", "mlp_type", "norm_type"))]
