"""The parameters of attention, of a block and of whole decoders, by arithmetic from their configs alone.

The layers ask for their own here; `inspect` and the checkpoints ask for those of a decoder that was never made.
Names are dotted: "layers.3.mlp.up.weight".
"""
from ..attention_config import AttentionConfig
from ..config import DecoderConfig
from .parameters import ParameterSpec, by_name
from .specs import column_parallel_specs, join, mlp_specs, norm_specs, row_parallel_specs


def attention_specs(config: AttentionConfig, init_std: float | None, output_init_std: float | None,
                    name: str) -> list[ParameterSpec]:
    """Return the parameters of ParallelAttention: "query", "key", "value", the norms of query and key, "out"."""
    D, H, G, K = config.hidden_size, config.num_attention_heads, config.query_groups, config.head_dim
    specs = []
    for part, heads, share in (("query", H, 1), ("key", G, H // G), ("value", G, H // G)):
        specs += column_parallel_specs(heads * K, D, config.qkv_bias, init_std, join(name, part), K, share)
    if config.qk_norm:
        for part, heads, share in (("query_norm", H, 1), ("key_norm", G, H // G)):
            start = 0.0 if config.zero_centered_gamma else 1.0
            if config.qk_norm_by_head:              # a row for each head
                specs.append(ParameterSpec(join(name, f"{part}.weight"), (heads, K), 0, decay=False, init_value=start,
                                           share=share))
            elif config.qk_norm_over_heads:         # split as the heads are
                specs.append(ParameterSpec(join(name, f"{part}.weight"), (heads * K,), 0, decay=False, multiple=K,
                                           init_value=start, share=share))
            else:
                specs += norm_specs(K, config.qk_norm_bias, config.zero_centered_gamma, join(name, part))
    return specs + row_parallel_specs(D, H * K, config.bias, output_init_std, join(name, "out"), K)


def block_specs(config: DecoderConfig, layer: int, name: str) -> list[ParameterSpec]:
    """Return the parameters of one block of a decoder: attention, feed-forward, and their norms."""
    std, output_std = config.init_method_std, output_init_std(config)
    specs = attention_specs(config.attention(layer), std, output_std, join(name, "attention"))
    specs += mlp_specs(config.hidden_size, config.ffn_size, config.gated, config.mlp_bias, std, output_std,
                       join(name, "mlp"))
    for norm in norm_names(config):
        specs += hidden_norm_specs(config, join(name, norm))
    return specs


def norm_names(config: DecoderConfig) -> list[str]:
    """Return the names of a block's norms."""
    names = []
    for part in ("attention", "mlp"):
        if config.norm_placement in ("before", "both") and not (part == "mlp" and config.shared_norm):
            names.append(f"{part}_norm")
        if config.norm_placement != "before":
            names.append(f"{part}_post_norm")
    return names


def hidden_norm_specs(config: DecoderConfig, name: str) -> list[ParameterSpec]:
    """Return the parameters of a norm over the hidden features."""
    return norm_specs(config.hidden_size, config.has_norm_bias, config.zero_centered_gamma, name)


def output_init_std(config: DecoderConfig) -> float:
    """Return the standard deviation of the output projections' initial weights."""
    return config.init_method_std / (2 * config.num_layers) ** 0.5


def decoder_specs(config: DecoderConfig) -> dict[str, ParameterSpec]:
    """Return {name: ParameterSpec} of Decoder(group, config), for any group. Nothing of the model's size is made."""
    V, D, std = config.vocab_size, config.hidden_size, config.init_method_std
    specs = [ParameterSpec("embedding.weight", (V, D), 0, std)]
    if config.position_embedding == "learned":
        assert config.max_position_embeddings is not None       # as DecoderConfig requires
        rows = config.position_offset + config.max_position_embeddings
        specs.append(ParameterSpec("position.weight", (rows, D), None, std))
    if config.embedding_norm:
        specs += hidden_norm_specs(config, "embedding_norm")
    for layer in range(config.num_layers):
        specs += block_specs(config, layer, f"layers.{layer}")
    if config.final_norm:
        specs += hidden_norm_specs(config, "final_norm")
    head = column_parallel_specs(V, D, config.head_bias, std, "head")
    return by_name(specs + [spec for spec in head if not (config.tie_word_embeddings and spec.name == "head.weight")])
