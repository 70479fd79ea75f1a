"""Llama (arXiv 2302.13971), and those that follow it: Mistral (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388)."""
from ...config import DecoderConfig
from .activations import THEIR_ACTIVATIONS
from .family import Family
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
INVERSE_FREQUENCIES = r".*\.rotary_emb\.inv_freq"       # old checkpoints have them


def sizes(keys, head_dim=None, tied=False, activation=("hidden_act", "silu")):
    """The fields of DecoderConfig that all families of this kind have under the same keys.

    head_dim, tied : what the family has where config.json does not say it
    activation : the family's key of it, and what it has without
    """
    return dict(
        vocab_size=keys.size("vocab_size"), hidden_size=keys.size("hidden_size"),
        num_layers=keys.layers("num_hidden_layers"), num_attention_heads=keys.size("num_attention_heads"),
        num_query_groups=keys.size("num_key_value_heads", default=None),
        kv_channels=keys.size("head_dim", default=head_dim), ffn_hidden_size=keys.size("intermediate_size"),
        activation=keys.activation(*activation), gated=True, normalization="rmsnorm",
        norm_epsilon=keys.number("rms_norm_eps", default=1e-6, above=0),
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=tied),
        attention_dropout=keys.number("attention_dropout", default=0.0),
        init_method_std=keys.number("initializer_range", default=0.02), mlp_bias=False)


def features(found):
    """Of a head."""
    return found["kv_channels"] or found["hidden_size"] // found["num_attention_heads"]


def window_of(keys):
    """The sliding window; null is none, nothing said is 4096."""
    return keys.count("sliding_window", default=None if "sliding_window" in keys.values else 4096)


def windows(keys, found):
    """The sliding window of each layer: of those that layer_types names so, else of those from max_window_layers on."""
    layers = found["num_layers"]
    if not keys.flag("use_sliding_window", default=False):
        return None
    window = window_of(keys)
    if window is None:
        return None
    first = keys.get("max_window_layers", default=28)
    if not isinstance(first, int):
        keys.fail(["max_window_layers"], first, "an integer")
    kinds = layer_types(keys, layers) or \
        ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def layer_types(keys, layers):
    """What config.json says about each layer; None: nothing."""
    kinds = keys.of_layers("layer_types", layers)
    for kind in kinds or ():
        if kind not in ("sliding_attention", "full_attention"):
            keys.fail(["layer_types"], kind, "sliding_attention or full_attention")
    return kinds


def read_llama(keys):
    found = sizes(keys)
    bias = keys.flag("attention_bias", default=False)
    return DecoderConfig(**{**found, "mlp_bias": keys.flag("mlp_bias", default=False)}, qkv_bias=bias,
                         attention_bias=bias, rotary=rotary(keys, features(found)))


def read_mistral(keys):
    found = sizes(keys)
    if found["num_query_groups"] is None and "num_key_value_heads" not in keys.values:
        found["num_query_groups"] = 8
    return DecoderConfig(**found, qkv_bias=False, attention_bias=False, sliding_window=window_of(keys),
                         rotary=rotary(keys, features(found)))


def read_qwen2(keys):
    found = sizes(keys)
    return DecoderConfig(**found, qkv_bias=True, attention_bias=False, sliding_window=windows(keys, found),
                         rotary=rotary(keys, features(found)))


def read_qwen3(keys):
    found = sizes(keys, head_dim=128)
    bias = keys.flag("attention_bias", default=False)
    return DecoderConfig(**found, qkv_bias=bias, attention_bias=bias, qk_norm=True, sliding_window=windows(keys, found),
                         rotary=rotary(keys, features(found)))


def write_sizes(config):
    """What sizes() reads."""
    return dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads, num_key_value_heads=config.query_groups,
        head_dim=config.head_dim, intermediate_size=config.ffn_size, hidden_act=THEIR_ACTIVATIONS[config.activation],
        rms_norm_eps=config.norm_epsilon, tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=config.attention_dropout, initializer_range=config.init_method_std)


def write_llama(config):
    return dict(write_sizes(config), **rope_keys(config.rotary_of(0)), attention_bias=config.qkv_bias,
                mlp_bias=config.mlp_bias)


def write_mistral(config):
    return dict(write_sizes(config), **rope_keys(config.rotary_of(0)), sliding_window=config.window(0))


def write_qwen2(config):
    windows = [config.window(i) for i in range(config.num_layers)]
    return dict(write_sizes(config), **rope_keys(config.rotary_of(0)), use_sliding_window=any(windows),
                sliding_window=max(filter(None, windows), default=None), layer_types=list(map(type_of, windows)),
                max_window_layers=next((i for i, window in enumerate(windows) if window), config.num_layers))


def write_qwen3(config):
    return dict(write_qwen2(config), attention_bias=config.qkv_bias)


def type_of(window):
    return "sliding_attention" if window else "full_attention"


def tensors(config):
    return TENSORS


FAMILIES = [
    Family(model_type, architecture, read, write, tensors, "model.", ignored=INVERSE_FREQUENCIES)
    for model_type, architecture, read, write in (
        ("llama", "LlamaForCausalLM", read_llama, write_llama),
        ("mistral", "MistralForCausalLM", read_mistral, write_mistral),
        ("qwen2", "Qwen2ForCausalLM", read_qwen2, write_qwen2),
        ("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3))
]
