"""Gemma (arXiv 2403.08295) and Gemma 2 (2408.00118): norms multiply by 1 + w, embeddings by the hidden size's root.

Gemma 2 has norms on both sides of each branch, sliding and full layers, and keeps scores and logits in bounds.
"""
from __future__ import annotations

from typing import Any

from .activations import THEIR_ACTIVATIONS
from .keys import Keys
from .llama import ATTENTION_BIAS, TENSORS
from .tables import CAP, COMMON, FLAG, HEADS, SIZE, Key, Kind, Table
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
GEMMA2 = Table({**LATER, "attention_softcap": Key(CAP, "attn_logit_softcapping", 50.0),
                "logits_softcap": Key(CAP, "final_logit_softcapping", 30.0)},
               {**GEMMA.fixed, "norm_placement": "both"}, derived=scaled_embedding, windows=Typed(2))
# In transformers what this one does depends on the implementation of attention that is chosen there.
CAUSAL = ("use_bidirectional_attention", (False,))

FAMILIES = [GEMMA.family("gemma", "GemmaForCausalLM", TENSORS,
                         refused=(CAUSAL, ("hidden_activation", ("gelu_pytorch_tanh",)))),
            GEMMA2.family("gemma2", "Gemma2ForCausalLM", {**TENSORS, **NORMS}, without_effect=("hidden_act",),
                          refused=(CAUSAL,))]
