"""BLOOM (arXiv 2211.05100): ALiBi, a norm after the embedding; q, k and v head by head."""
from __future__ import annotations

from .fused import head_by_head
from .keys import Keys
from .tables import ABOVE_0, COMMON, FLAG, LAYERS, SIZE, Key, Kind, Table

TENSORS = {
    "embedding": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "attention_norm": "h.{}.input_layernorm",
    **{f"attention.{part}": "h.{}.self_attention.query_key_value" for part in ("query", "key", "value")},
    "attention.out": "h.{}.self_attention.dense",
    "mlp_norm": "h.{}.post_attention_layernorm",
    "mlp.up": "h.{}.mlp.dense_h_to_4h",
    "mlp.down": "h.{}.mlp.dense_4h_to_h",
    "final_norm": "ln_f",
    "head": "lm_head",
}


def vocabulary(keys: Keys, name: str) -> int:
    """Return its size. Raises InputError for slow_but_exact in parts, of which theirs leaves the biases out."""
    if keys.flag("slow_but_exact", default=False):
        keys.refuse({"pretraining_tp": (1,)})
    return keys.size(name)


TABLE = Table({
    **{field: COMMON[field] for field in ("attention_dropout", "init_method_std")},
    "vocab_size": Key(Kind(vocabulary), "vocab_size"), "hidden_size": Key(SIZE, "hidden_size n_embed"),
    "num_layers": Key(LAYERS, "n_layer num_hidden_layers"),
    "num_attention_heads": Key(SIZE, "n_head num_attention_heads"),
    "norm_epsilon": Key(ABOVE_0, "layer_norm_epsilon", 1e-5),
    "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True),
}, dict(activation="gelu_tanh", position_embedding="alibi", embedding_norm=True), rope=None)

FAMILIES = [TABLE.family("bloom", "BloomForCausalLM", TENSORS, "transformer.", fused=head_by_head,
                         without_effect=("pretraining_tp", "attention_softmax_in_fp32", "bias_dropout_fusion",
                                         "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv",
                                         "n_inner"),
                         refused=(("apply_residual_connection_post_layernorm", (False,)),
                                  ("hidden_dropout", (0,))))]       # ours would drop of the embedding, too
