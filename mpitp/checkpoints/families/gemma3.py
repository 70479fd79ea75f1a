"""Gemma 3 (arXiv 2503.19786), and the text model of its folders with images.

Beside what Gemma 2 has: norms on query and key; sliding and full layers rotate at their own speeds.
"""
from __future__ import annotations

from dataclasses import replace

from ...config import DecoderConfig
from .gemma import GEMMA, LATER, NORMS, scaled_embedding
from .keys import Keys
from .llama import TENSORS
from .rope import RopeOfTypes
from .tables import CAP, Key, Table
from .windows import Typed

GEMMA3 = Table({**LATER, "logits_softcap": Key(CAP, "final_logit_softcapping", None)},
               {**GEMMA.fixed, "qk_norm": True, "norm_placement": "both"}, derived=scaled_embedding,
               rope=RopeOfTypes({"full_attention": ("rope_theta", 1e6),
                                 "sliding_attention": ("rope_local_base_freq", 1e4)}),
               windows=Typed(6, "sliding_window_pattern"))
BOTH_DIRECTIONS = "use_bidirectional_attention"

# What transformers has where the text_config inside a config.json, which says what differs, has no key.
TEXT_CONFIG = dict(vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                   num_attention_heads=8)


def read_text_part(keys: Keys) -> DecoderConfig:
    """Return the config of the text model inside a model that sees images, too."""
    text = keys.part("text_config", TEXT_CONFIG, dict(tie_word_embeddings=keys.flag("tie_word_embeddings",
                                                                                   default=True)))
    text.refuse({"model_type": ("gemma3_text",), BOTH_DIRECTIONS: (False,), "is_causal": (True,),
                 "final_logit_softcapping": ()})        # which theirs does not apply beside images
    return GEMMA3_TEXT.config(text)


GEMMA3_TEXT = GEMMA3.family("gemma3_text", "Gemma3ForCausalLM", {**TENSORS, **NORMS},
                            without_effect=("_sliding_window_pattern",), both_directions=BOTH_DIRECTIONS)
FAMILIES = [
    GEMMA3_TEXT,
    replace(GEMMA3_TEXT, model_type="gemma3", read=read_text_part, saved_as="gemma3_text", both_directions="",
            refused=(("is_causal", (True,)),),
            prefix="model.language_model.", other_prefixes=("language_model.model.",),
            other_head="language_model.lm_head",
            other_parts=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
            without_effect=("vision_config", "initializer_range", "mm_tokens_per_image", "boi_token_index",
                            "eoi_token_index", "image_token_index")),
]
