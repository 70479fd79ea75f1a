"""Cohere's Command R and, with sliding layers that alone rotate, Command R7B and A (arXiv 2504.00698).

Attention and feed-forward side by side after one layer norm without bias; neighbours are rotated; logits have a factor.
"""
from __future__ import annotations

from .llama import ATTENTION_BIAS, TENSORS
from .rope import Rope
from .tables import ABOVE_0, COMMON, FLAG, NUMBER, Key, Table
from .windows import Typed

KEYS = {**COMMON, **ATTENTION_BIAS, "norm_epsilon": Key(ABOVE_0, "layer_norm_eps", 1e-5),
        "logits_multiplier": Key(NUMBER, "logit_scale", 0.0625),
        "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True)}
FIXED = dict(gated=True, norm_bias=False, mlp_bias=False, parallel_residual=True, shared_norm=True)
OWN_NORMS = {field: Key(FLAG, "use_qk_norm", False) for field in ("qk_norm", "qk_norm_by_head")}    # Command R+
COHERE = Table({**KEYS, **OWN_NORMS}, FIXED, rope=Rope(5e5, interleaved=True))
COHERE2 = Table(KEYS, FIXED, rope=Rope(interleaved=True, sliding_alone=True),
                windows=Typed(4, "sliding_window_pattern"))

# Of another program: what theirs is, whatever stands there.
WITHOUT_EFFECT = ("layer_switch", "order_of_interleaved_layers", "position_embedding_type", "rotary_pct",
                  "use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding",
                  "_sliding_window_pattern")
FAMILIES = [COHERE.family("cohere", "CohereForCausalLM", TENSORS),
            COHERE2.family("cohere2", "Cohere2ForCausalLM", TENSORS, without_effect=WITHOUT_EFFECT)]
