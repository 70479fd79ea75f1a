"""Falcon (arXiv 2311.16867): attention and feed-forward side by side; q, k and v by key/value head.

7B: one key/value head and one norm for both branches. 40B and 180B ("new_decoder_architecture"): several key/value
heads, a norm for each branch. 11B: several key/value heads, one norm.
"""
from __future__ import annotations

from ...config import DecoderConfig
from .activations import THEIR_ACTIVATIONS
from .family import Family
from .keys import Keys
from .layout import Fused
from .rope import rope_keys, rotary

TENSORS = {
    "embedding": "word_embeddings",
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
TWO_NORMS_SIDE_BY_SIDE = {"attention_norm": "h.{}.ln_attn", "mlp_norm": "h.{}.ln_mlp"}


def read(keys: Keys) -> DecoderConfig:
    hidden, heads = keys.size("n_embed", "hidden_size"), keys.size("num_attention_heads", "n_head")
    new, bias = keys.flag("new_decoder_architecture", default=False), keys.flag("bias", default=False)
    side_by_side, norms = keys.flag("parallel_attn", default=True), keys.get("num_ln_in_parallel_attn", default=None)
    if norms not in (None, 1, 2) or norms == 2 and not new:
        keys.fail(["num_ln_in_parallel_attn"], norms, "1, or 2 with new_decoder_architecture")
    if new:
        keys.refuse({"parallel_attn": (True,)})
        groups = keys.size("num_kv_heads", "n_head_kv", default=heads)
    else:
        groups = 1 if keys.flag("multi_query", default=True) else heads
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"), hidden_size=hidden, num_layers=keys.layers("num_hidden_layers", "n_layer"),
        num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=keys.size("ffn_hidden_size", default=None),
        activation=keys.activation("activation", default="gelu"), rotary=rotary(keys, hidden // heads),
        norm_epsilon=keys.number("layer_norm_epsilon", default=1e-5, above=0), parallel_residual=side_by_side,
        shared_norm=side_by_side and not (new and norms in (None, 2)), qkv_bias=bias, attention_bias=bias,
        mlp_bias=bias, tie_word_embeddings=keys.flag("tie_word_embeddings", default=True),
        attention_dropout=keys.number("attention_dropout", default=0.0),
        init_method_std=keys.number("initializer_range", default=0.02))


def write(config: DecoderConfig) -> dict:
    """Return the old architecture where it has as many key/value heads and norms, else the new one."""
    side_by_side, groups = config.parallel_residual, config.query_groups
    old = config.shared_norm and groups == 1 or not side_by_side
    return dict(
        rope_keys(config.rotary_of(0)), vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads, num_kv_heads=groups,
        new_decoder_architecture=not old, multi_query=groups == 1, parallel_attn=side_by_side,
        num_ln_in_parallel_attn=None if old else 1 if config.shared_norm else 2, ffn_hidden_size=config.ffn_size,
        activation=THEIR_ACTIVATIONS[config.activation], layer_norm_epsilon=config.norm_epsilon, alibi=False,
        bias=config.mlp_bias, tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=config.attention_dropout, initializer_range=config.init_method_std)


def tensors(config: DecoderConfig) -> dict:
    return {**TENSORS, **(TWO_NORMS_SIDE_BY_SIDE if config.parallel_residual and not config.shared_norm else {})}


def by_group(config: DecoderConfig) -> dict:
    """The fused tensor holds the query heads that share a key/value head, its k, its v, then the next ones."""
    share = config.num_attention_heads // config.query_groups
    bounds = {"query": (0, share), "key": (share, share + 1), "value": (share + 1, share + 2)}
    return {f"attention.{part}": Fused(config.query_groups, share + 2, config.head_dim, *bound)
            for part, bound in bounds.items()}


FAMILIES = [Family("falcon", "FalconForCausalLM", read, write, tensors, "transformer.", by_group,
                   buffers=r".*\.rotary_emb\.inv_freq",
                   # The first two: each belongs to one of the two architectures, and the other does not read it.
                   without_effect=("multi_query", "num_kv_heads", "n_head_kv", "ff_factor"),
                   refused=(("alibi", (False,)), ("hidden_dropout", (0,)),  # theirs scales slopes, drops no embedding
                            ("apply_residual_connection_post_layernorm", (False,))))]
