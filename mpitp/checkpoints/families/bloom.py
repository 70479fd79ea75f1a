"""BLOOM (arXiv 2211.05100): ALiBi, a norm after the embedding; q, k and v head by head."""
from __future__ import annotations

from ...config import DecoderConfig
from .family import Family
from .gpt_neox import head_by_head
from .keys import Keys

TENSORS = {
    "embedding": "word_embeddings",
    "embedding_norm": "word_embeddings_layernorm",
    "attention_norm": "h.{}.input_layernorm",
    "attention.query": "h.{}.self_attention.query_key_value",
    "attention.key": "h.{}.self_attention.query_key_value",
    "attention.value": "h.{}.self_attention.query_key_value",
    "attention.out": "h.{}.self_attention.dense",
    "mlp_norm": "h.{}.post_attention_layernorm",
    "mlp.up": "h.{}.mlp.dense_h_to_4h",
    "mlp.down": "h.{}.mlp.dense_4h_to_h",
    "final_norm": "ln_f",
    "head": "lm_head",
}


def read(keys: Keys) -> DecoderConfig:
    if keys.flag("slow_but_exact", default=False):          # then theirs leaves biases out
        keys.refuse({"pretraining_tp": (1,)})
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"), hidden_size=keys.size("n_embed", "hidden_size"),
        num_layers=keys.layers("n_layer", "num_hidden_layers"),
        num_attention_heads=keys.size("n_head", "num_attention_heads"), activation="gelu_tanh",
        position_embedding="alibi", embedding_norm=True,
        norm_epsilon=keys.number("layer_norm_epsilon", default=1e-5, above=0),
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=True),
        attention_dropout=keys.number("attention_dropout", default=0.0),
        init_method_std=keys.number("initializer_range", default=0.02))


def write(config: DecoderConfig) -> dict:
    return dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, n_layer=config.num_layers,
        n_head=config.num_attention_heads, layer_norm_epsilon=config.norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings, attention_dropout=config.attention_dropout,
        initializer_range=config.init_method_std)


def tensors(config: DecoderConfig) -> dict:
    return TENSORS


FAMILIES = [Family("bloom", "BloomForCausalLM", read, write, tensors, "transformer.", head_by_head,
                   without_effect=("pretraining_tp", "attention_softmax_in_fp32", "bias_dropout_fusion",
                                   "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv",
                                   "n_inner"),
                   refused=(("apply_residual_connection_post_layernorm", (False,)),
                            ("hidden_dropout", (0,))))]     # ours would drop of the embedding, too
