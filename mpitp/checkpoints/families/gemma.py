"""Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786), and the text model of its folders with images.

Norms multiply by 1 + w, embedded tokens by the root of the hidden size. Gemma 2 and 3 have norms on both sides of each
branch, sliding and full layers; those of Gemma 3 rotate at their own speeds, Gemma 2 keeps scores and logits in bounds.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...config import DecoderConfig
from .activations import THEIR_ACTIVATIONS
from .keys import Keys
from .llama import ATTENTION_BIAS, TENSORS
from .rope import RopeOfTypes
from .tables import COMMON, FLAG, HEADS, SIZE, Key, Kind, Table
from .windows import Typed

NORMS = {
    "attention_post_norm": "layers.{}.post_attention_layernorm",
    "mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "mlp_post_norm": "layers.{}.post_feedforward_layernorm",
}


def activation(keys: Keys, name: str, default: str) -> str:
    """Return the activation; the first release wrote "gelu" and meant its tanh form."""
    return "gelu_tanh" if keys.get(name, default=default) == "gelu" else keys.activation(name, default)


def root(keys: Keys, name: str, default: float) -> float:
    """Return the factor of the scores, whose inverse square config.json has."""
    return keys.number(name, default=default, above=0) ** -0.5


def inverse_square(scale: float) -> Any:
    """Return what config.json has, a whole number."""
    return round(scale ** -2)


def cap(keys: Keys, name: str, default: float) -> float | None:
    """Return a softcap: none where the key is null, the default where it is absent."""
    return keys.number(name, default=None if name in keys.values else default, above=0)


def scaled_embedding(found: dict) -> dict:
    """Return the multiplier of embedded tokens."""
    return {"embedding_multiplier": found["hidden_size"] ** 0.5}


OF_ALL = {**COMMON, **ATTENTION_BIAS, "kv_channels": Key(SIZE, "head_dim", 256),
          "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True)}
GEMMA = Table({**OF_ALL, "num_query_groups": Key(HEADS, "num_key_value_heads", 16),
               "activation": Key(Kind(activation, THEIR_ACTIVATIONS.__getitem__), "hidden_act", "gelu_pytorch_tanh")},
              dict(gated=True, normalization="rmsnorm", mlp_bias=False, zero_centered_gamma=True),
              derived=scaled_embedding)
LATER = {**OF_ALL, "num_query_groups": Key(HEADS, "num_key_value_heads", 4),
         "activation": Key(COMMON["activation"].kind, "hidden_activation", "gelu_pytorch_tanh"),
         "attention_scale": Key(Kind(root, inverse_square), "query_pre_attn_scalar", 256.0)}
GEMMA2 = Table({**LATER, "attention_softcap": Key(Kind(cap), "attn_logit_softcapping", 50.0),
                "logits_softcap": Key(Kind(cap), "final_logit_softcapping", 30.0)},
               {**GEMMA.fixed, "norm_placement": "both"}, derived=scaled_embedding, windows=Typed(2))
GEMMA3 = Table(LATER, {**GEMMA.fixed, "qk_norm": True, "norm_placement": "both"}, derived=scaled_embedding,
               rope=RopeOfTypes({"full_attention": ("rope_theta", 1e6),
                                 "sliding_attention": ("rope_local_base_freq", 1e4)}),
               windows=Typed(6, "sliding_window_pattern"))
BOTH_DIRECTIONS = "use_bidirectional_attention"
# In transformers what this one does depends on the implementation of attention that is chosen there.
CAUSAL = (BOTH_DIRECTIONS, (False,))

# What transformers has where the text_config inside a config.json, which says what differs, has no key.
TEXT_CONFIG = dict(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                   num_attention_heads=8)


def read_text_part(keys: Keys) -> DecoderConfig:
    """Return the config of the text model inside a model that sees images, too."""
    text = keys.part("text_config", dict(TEXT_CONFIG, tie_word_embeddings=keys.flag("tie_word_embeddings",
                                                                                  default=True)))
    text.refuse({"model_type": ("gemma3_text",), BOTH_DIRECTIONS: (False,), "is_causal": (True,)})
    return GEMMA3_TEXT.config(text)


GEMMA3_TEXT = GEMMA3.family("gemma3_text", "Gemma3ForCausalLM", {**TENSORS, **NORMS},
                            without_effect=("_sliding_window_pattern",), both_directions=BOTH_DIRECTIONS)
FAMILIES = [
    GEMMA.family("gemma", "GemmaForCausalLM", TENSORS,
                 refused=(CAUSAL, ("hidden_activation", ("gelu_pytorch_tanh",)))),
    GEMMA2.family("gemma2", "Gemma2ForCausalLM", {**TENSORS, **NORMS}, without_effect=("hidden_act",),
                  refused=(CAUSAL,)),
    GEMMA3_TEXT,
    replace(GEMMA3_TEXT, model_type="gemma3", read=read_text_part, saved_as="gemma3_text", both_directions="",
            refused=(("is_causal", (True,)),),
            prefix="model.language_model.", other_prefixes=("language_model.model.",),
            other_parts=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
            without_effect=("vision_config", "initializer_range", "mm_tokens_per_image", "boi_token_index",
                            "eoi_token_index", "image_token_index")),
]
