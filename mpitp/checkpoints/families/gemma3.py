"""Gemma 3, the text model (arXiv 2503.19786): norms on both sides of each branch, sliding and full layers."""
from ...config import DecoderConfig, Rotary
from .family import Family
from .llama import TENSORS, features, layer_types, sizes, type_of, window_of, write_sizes
from .rope import rope_keys, rotary

NORMS = {
    "attention_post_norm": "layers.{}.post_attention_layernorm",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "mlp_post_norm": "layers.{}.post_feedforward_layernorm",
}


def read(keys):
    found = sizes(keys, head_dim=256, tied=True, activation=("hidden_activation", "gelu_pytorch_tanh"))
    layers = found["num_layers"]
    bias = keys.flag("attention_bias", default=False)
    every = keys.count("sliding_window_pattern", default=6)
    kinds = layer_types(keys, layers) or \
        ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    window = window_of(keys)
    keys.refuse(use_bidirectional_attention=False)
    turns = {"full_attention": rotary(keys, features(found), 1e6, layer_type="full_attention"),
             "sliding_attention": rotary(keys, features(found), 1e4, "rope_local_base_freq",
                                         layer_type="sliding_attention", scaled=False)}
    return DecoderConfig(
        **found, qkv_bias=bias, attention_bias=bias, qk_norm=True, norm_placement="both", zero_centered_gamma=True,
        embedding_multiplier=found["hidden_size"] ** 0.5,
        attention_scale=keys.number("query_pre_attn_scalar", default=256.0, above=0) ** -0.5,
        sliding_window=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        rotary=tuple(turns[kind] for kind in kinds))


def write(config):
    windows = [config.window(i) for i in range(config.num_layers)]
    turns = {type_of(window): config.rotary_of(i) for i, window in enumerate(windows)}
    full, sliding = (turns.get(kind, Rotary()) for kind in ("full_attention", "sliding_attention"))
    keys = write_sizes(config)
    return dict(keys, **rope_keys(full), hidden_activation=keys.pop("hidden_act"), rope_local_base_freq=sliding.base,
                query_pre_attn_scalar=round(config.scale ** -2), attention_bias=config.qkv_bias,
                layer_types=list(map(type_of, windows)), sliding_window=max(filter(None, windows), default=None),
                sliding_window_pattern=6)


def tensors(config):
    return {**TENSORS, **NORMS}


FAMILIES = [Family("gemma3_text", "Gemma3ForCausalLM", read, write, tensors, "model.")]
