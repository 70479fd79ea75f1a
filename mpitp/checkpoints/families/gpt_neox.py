"""GPT-NeoX and Pythia (arXiv 2204.06745): attention and feed-forward side by side; q, k and v head by head."""
from __future__ import annotations

from ...config import DecoderConfig
from .activations import THEIR_ACTIVATIONS
from .family import Family
from .keys import Keys
from .layout import Fused
from .rope import rope_keys, rotary

TENSORS = {
    "embedding": "embed_in",
    "attention_norm": "layers.{}.input_layernorm",
    "attention.query": "layers.{}.attention.query_key_value",
    "attention.key": "layers.{}.attention.query_key_value",
    "attention.value": "layers.{}.attention.query_key_value",
    "attention.out": "layers.{}.attention.dense",
    "mlp_norm": "layers.{}.post_attention_layernorm",
    "mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "mlp.down": "layers.{}.mlp.dense_4h_to_h",
    "final_norm": "final_layer_norm",
    "head": "embed_out",
}


def read(keys: Keys) -> DecoderConfig:
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    keys.refuse({"head_dim": (hidden // heads,)})           # theirs turns as many features, whatever a head has
    side_by_side = keys.flag("use_parallel_residual", default=True)
    dropout, bias = keys.number("hidden_dropout", default=0.0), keys.flag("attention_bias", default=True)
    if side_by_side:
        keys.refuse({"hidden_dropout": (0,)})   # theirs drops the two branches apart, ours their sum
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"), hidden_size=hidden, num_layers=keys.layers("num_hidden_layers"),
        num_attention_heads=heads, ffn_hidden_size=keys.size("intermediate_size"),
        activation=keys.activation("hidden_act", default="gelu"),
        rotary=rotary(keys, hidden // heads, theta_key="rotary_emb_base", part=0.25, part_key="rotary_pct"),
        norm_epsilon=keys.number("layer_norm_eps", default=1e-5, above=0), parallel_residual=side_by_side,
        qkv_bias=bias, attention_bias=bias, tie_word_embeddings=keys.flag("tie_word_embeddings", default=False),
        hidden_dropout=dropout, attention_dropout=keys.number("attention_dropout", default=0.0),
        init_method_std=keys.number("initializer_range", default=0.02))


def write(config: DecoderConfig) -> dict:
    turns = config.rotary_of(0)
    return dict(
        rope_keys(turns, "rotary_emb_base"), vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
        intermediate_size=config.ffn_size, hidden_act=THEIR_ACTIVATIONS[config.activation],
        rotary_pct=(turns.dim or config.head_dim) / config.head_dim if turns else None,
        layer_norm_eps=config.norm_epsilon, use_parallel_residual=config.parallel_residual,
        attention_bias=config.attention_bias, tie_word_embeddings=config.tie_word_embeddings,
        hidden_dropout=0.0 if config.parallel_residual else config.hidden_dropout,
        attention_dropout=config.attention_dropout, initializer_range=config.init_method_std)


def tensors(config: DecoderConfig) -> dict:
    return TENSORS


def head_by_head(config: DecoderConfig) -> dict:
    """The fused tensor holds q, k and v of head 0, then those of head 1, ..."""
    return {f"attention.{part}": Fused(config.num_attention_heads, 3, config.head_dim, i, i + 1)
            for i, part in enumerate(("query", "key", "value"))}


FAMILIES = [Family("gpt_neox", "GPTNeoXForCausalLM", read, write, tensors, "gpt_neox.", head_by_head,
                   buffers=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
                   without_effect=("attention_probs_dropout_prob", "hidden_dropout_prob"))]
