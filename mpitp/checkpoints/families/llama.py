"""Llama (arXiv 2302.13971), and those that follow it: Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388)."""
from __future__ import annotations

from ...config import DecoderConfig
from .activations import THEIR_ACTIVATIONS
from .family import Family
from .keys import Keys
from .rope import rope_keys, rotary

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
NO_WINDOWS = (("sliding_window", ()), ("attention_chunk_size", ()))


def sizes(keys: Keys, groups: int | None = None, head_dim: int | None = None, tied: bool = False,
          activation: tuple[str, str] = ("hidden_act", "silu")) -> dict:
    """Return the fields of DecoderConfig that all families of this kind have under the same keys.

    groups : the key/value heads of a family whose config.json lacks the key; null means as many as query heads
    head_dim, tied : what the family has where config.json does not say it
    activation : the family's key of it, and what it has without
    """
    if "num_key_value_heads" in keys.values:
        groups = None
    return dict(
        vocab_size=keys.size("vocab_size"), hidden_size=keys.size("hidden_size"),
        num_layers=keys.layers("num_hidden_layers"), num_attention_heads=keys.size("num_attention_heads"),
        num_query_groups=keys.size("num_key_value_heads", default=groups),
        kv_channels=keys.size("head_dim", default=head_dim), ffn_hidden_size=keys.size("intermediate_size"),
        activation=keys.activation(*activation), gated=True, normalization="rmsnorm",
        norm_epsilon=keys.number("rms_norm_eps", default=1e-6, above=0),
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=tied),
        attention_dropout=keys.number("attention_dropout", default=0.0),
        init_method_std=keys.number("initializer_range", default=0.02), mlp_bias=False)


def head_features(found: dict) -> int:
    """Return how many features a head has."""
    return found["kv_channels"] or found["hidden_size"] // found["num_attention_heads"]


def window_of(keys: Keys) -> int | None:
    """Return the sliding window: none where the key is null, 4096 where it is absent."""
    return keys.count("sliding_window", default=None if "sliding_window" in keys.values else 4096)


def windows(keys: Keys, found: dict) -> tuple | None:
    """Return each layer's sliding window in a Qwen: where layer_types says so, else from max_window_layers on."""
    layers, window = found["num_layers"], window_of(keys)
    window = window if keys.flag("use_sliding_window", default=False) else None
    first = keys.get("max_window_layers", default=28)
    if not isinstance(first, int):
        keys.fail(["max_window_layers"], first, "an integer")
    kinds = keys.layer_types(layers) or [type_of(window if i >= first else None) for i in range(layers)]
    return windows_of(keys, kinds, window) if window or "sliding_attention" in kinds else None


def windows_of(keys: Keys, kinds: list[str], window: int | None) -> tuple:
    """Return the sliding window of each layer, by its type. Raises InputError for sliding layers without a window."""
    if window is None and "sliding_attention" in kinds:
        keys.fail(["layer_types"], "sliding_attention", "full_attention where there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def require_one_type(keys: Keys, layers: int, window: int | None) -> None:
    """Raise InputError for a layer_types that differs from the one type that all layers of the family have."""
    for kind in keys.layer_types(layers) or ():
        if kind != type_of(window):
            keys.fail(["layer_types"], kind, f"{type_of(window)} in every layer: model_type "
                                             f"{keys.get('model_type', default='')} has one kind")


def read_llama(keys: Keys) -> DecoderConfig:
    found = sizes(keys)
    require_one_type(keys, found["num_layers"], None)
    bias = keys.flag("attention_bias", default=False)
    return DecoderConfig(**{**found, "mlp_bias": keys.flag("mlp_bias", default=False)}, qkv_bias=bias,
                         attention_bias=bias, rotary=rotary(keys, head_features(found)))


def read_mistral(keys: Keys) -> DecoderConfig:
    found, window = sizes(keys, groups=8), window_of(keys)
    require_one_type(keys, found["num_layers"], window)
    return DecoderConfig(**found, qkv_bias=False, attention_bias=False, sliding_window=window,
                         rotary=rotary(keys, head_features(found)))


def read_qwen2(keys: Keys) -> DecoderConfig:
    found = sizes(keys, groups=32)
    return DecoderConfig(**found, qkv_bias=True, attention_bias=False, sliding_window=windows(keys, found),
                         rotary=rotary(keys, head_features(found)))


def read_qwen3(keys: Keys) -> DecoderConfig:
    found = sizes(keys, groups=32, head_dim=128)
    bias = keys.flag("attention_bias", default=False)
    return DecoderConfig(**found, qkv_bias=bias, attention_bias=bias, qk_norm=True, sliding_window=windows(keys, found),
                         rotary=rotary(keys, head_features(found)))


def write_sizes(config: DecoderConfig) -> dict:
    """Return the keys that sizes() reads."""
    return dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.query_groups,
        head_dim=config.head_dim, intermediate_size=config.ffn_size, hidden_act=THEIR_ACTIVATIONS[config.activation],
        rms_norm_eps=config.norm_epsilon, tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=config.attention_dropout, initializer_range=config.init_method_std)


def write_llama(config: DecoderConfig) -> dict:
    return dict(write_sizes(config), **rope_keys(config.rotary_of(0)), attention_bias=config.qkv_bias,
                mlp_bias=config.mlp_bias)


def write_mistral(config: DecoderConfig) -> dict:
    return dict(write_sizes(config), **rope_keys(config.rotary_of(0)), sliding_window=config.window(0))


def write_qwen2(config: DecoderConfig) -> dict:
    windows = [config.window(i) for i in range(config.num_layers)]
    return dict(write_sizes(config), **rope_keys(config.rotary_of(0)), use_sliding_window=any(windows),
                sliding_window=max(filter(None, windows), default=None), layer_types=list(map(type_of, windows)),
                max_window_layers=next((i for i, window in enumerate(windows) if window), config.num_layers))


def write_qwen3(config: DecoderConfig) -> dict:
    return dict(write_qwen2(config), attention_bias=config.qkv_bias)


def type_of(window: int | None) -> str:
    """Return the name that layer_types has for a layer with this window."""
    return "sliding_attention" if window else "full_attention"


def tensors(config: DecoderConfig) -> dict:
    return TENSORS


FAMILIES = [
    Family(model_type, architecture, read, write, tensors, "model.", buffers=INVERSE_FREQUENCIES,
           without_effect=without_effect, refused=refused)
    for model_type, architecture, read, write, without_effect, refused in (
        ("llama", "LlamaForCausalLM", read_llama, write_llama, ("pretraining_tp", "is_llama_config"),
         (*NO_WINDOWS, ("rope_interleaved", (False,)))),
        ("mistral", "MistralForCausalLM", read_mistral, write_mistral, (), ()),
        ("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2, (), (("use_mrope", (False,)),)),
        ("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3, (), ()))
]
