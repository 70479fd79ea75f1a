"""Gemma 3, the text model (arXiv 2503.19786): norms on both sides of each branch, sliding and full layers."""
from __future__ import annotations

from ...attention_config import Rotary
from ...config import DecoderConfig
from .family import Family
from .keys import Keys
from .llama import TENSORS, head_features, sizes, type_of, window_of, windows_of, write_sizes
from .rope import rope_keys, rotary_of_layer_types

NORMS = {
    "attention_post_norm": "layers.{}.post_attention_layernorm",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "mlp_post_norm": "layers.{}.post_feedforward_layernorm",
}


def read(keys: Keys) -> DecoderConfig:
    found = sizes(keys, groups=4, head_dim=256, tied=True, activation=("hidden_activation", "gelu_pytorch_tanh"))
    layers = found["num_layers"]
    bias = keys.flag("attention_bias", default=False)
    every = keys.count("sliding_window_pattern", default=6)
    kinds = keys.layer_types(layers) or \
        ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    turns = rotary_of_layer_types(keys, head_features(found), {
        "full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)})
    return DecoderConfig(
        **found, qkv_bias=bias, attention_bias=bias, qk_norm=True, norm_placement="both", zero_centered_gamma=True,
        embedding_multiplier=found["hidden_size"] ** 0.5,
        attention_scale=keys.number("query_pre_attn_scalar", default=256.0, above=0) ** -0.5,
        sliding_window=windows_of(keys, kinds, window_of(keys)),
        rotary=tuple(turns[kind] for kind in kinds))


def write(config: DecoderConfig) -> dict:
    windows = [config.window(i) for i in range(config.num_layers)]
    turns = {type_of(window): config.rotary_of(i) for i, window in enumerate(windows)}
    full, sliding = (turns.get(kind) or Rotary() for kind in ("full_attention", "sliding_attention"))
    keys = write_sizes(config)
    return dict(keys, **rope_keys(full), hidden_activation=keys.pop("hidden_act"), rope_local_base_freq=sliding.base,
                query_pre_attn_scalar=round(config.scale ** -2), attention_bias=config.qkv_bias,
                layer_types=list(map(type_of, windows)), sliding_window=max(filter(None, windows), default=None),
                sliding_window_pattern=6)


def tensors(config: DecoderConfig) -> dict:
    return {**TENSORS, **NORMS}


FAMILIES = [Family("gemma3_text", "Gemma3ForCausalLM", read, write, tensors, "model.",
                   without_effect=("_sliding_window_pattern",), refused=(("use_bidirectional_attention", (False,)),))]
