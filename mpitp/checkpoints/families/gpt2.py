"""GPT-2 (Radford et al., 2019): learned positions; weights stored [in, out]; q, k and v in one tensor."""
from __future__ import annotations

from ...config import DecoderConfig
from ...errors import InputError
from .activations import THEIR_ACTIVATIONS
from .family import Family
from .keys import Keys
from .layout import Fused

TENSORS = {
    "embedding": "wte",
    "position": "wpe",
    "attention_norm": "h.{}.ln_1",
    "attention.query": "h.{}.attn.c_attn",
    "attention.key": "h.{}.attn.c_attn",
    "attention.value": "h.{}.attn.c_attn",
    "attention.out": "h.{}.attn.c_proj",
    "mlp_norm": "h.{}.ln_2",
    "mlp.up": "h.{}.mlp.c_fc",
    "mlp.down": "h.{}.mlp.c_proj",
    "final_norm": "ln_f",
    "head": "lm_head",
}
CONV1D = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")


def read(keys: Keys) -> DecoderConfig:
    of_embedding, of_branches = (keys.number(name, default=0.1) for name in ("embd_pdrop", "resid_pdrop"))
    if of_embedding != of_branches:
        raise InputError(f"config.json: found embd_pdrop = {of_embedding} and resid_pdrop = {of_branches} (0.1 where "
                         f"config.json has none), expected one value: two are not supported")
    return DecoderConfig(
        vocab_size=keys.size("vocab_size"), hidden_size=keys.size("n_embd", "hidden_size"),
        num_layers=keys.layers("n_layer", "num_hidden_layers"),
        num_attention_heads=keys.size("n_head", "num_attention_heads"),
        ffn_hidden_size=keys.size("n_inner", default=None),
        activation=keys.activation("activation_function", default="gelu_new"), position_embedding="learned",
        max_position_embeddings=keys.size("n_positions", "max_position_embeddings"),
        norm_epsilon=keys.number("layer_norm_epsilon", default=1e-5, above=0),
        attention_scale=None if keys.flag("scale_attn_weights", default=True) else 1.0,
        tie_word_embeddings=keys.flag("tie_word_embeddings", default=True), hidden_dropout=of_embedding,
        attention_dropout=keys.number("attn_pdrop", default=0.1),
        init_method_std=keys.number("initializer_range", default=0.02))


def write(config: DecoderConfig) -> dict:
    return dict(
        vocab_size=config.vocab_size, n_embd=config.hidden_size, n_layer=config.num_layers,
        n_head=config.num_attention_heads, n_inner=config.ffn_size,
        activation_function=THEIR_ACTIVATIONS[config.activation], n_positions=config.max_position_embeddings,
        layer_norm_epsilon=config.norm_epsilon, scale_attn_weights=config.scale != 1.0,
        tie_word_embeddings=config.tie_word_embeddings, embd_pdrop=config.hidden_dropout,
        resid_pdrop=config.hidden_dropout, attn_pdrop=config.attention_dropout,
        initializer_range=config.init_method_std)


def tensors(config: DecoderConfig) -> dict:
    return TENSORS


def fused(config: DecoderConfig) -> dict:
    """The fused tensor holds all of q, all of k, all of v."""
    return {f"attention.{part}": Fused(1, 3, config.hidden_size, i, i + 1)
            for i, part in enumerate(("query", "key", "value"))}


FAMILIES = [Family("gpt2", "GPT2LMHeadModel", read, write, tensors, "transformer.", fused, CONV1D,
                   r".*\.attn\.(bias|masked_bias)",
                   ("reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
                    "summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout"),
                   (("scale_attn_by_inverse_layer_idx", (False,)),))]
