"""GPT-BigCode: SantaCoder and StarCoder (arXiv 2301.03988, 2305.06161), GPT-2 with one key/value head for all."""
from __future__ import annotations

from .falcon import by_group
from .gpt2 import TENSORS
from .keys import Keys
from .tables import FLAG, OF_GPT, NUMBER, SIZE, Key, Kind, Table


def one_head(keys: Keys, name: str, default: bool) -> int | None:
    """Return the number of key/value heads, None for as many as query heads."""
    return 1 if keys.flag(name, default=default) else None


def is_one(groups: int) -> bool:
    """Return the flag of one key/value head."""
    return groups == 1


def unscaled(keys: Keys, name: str, default: bool) -> float | None:
    """Return the factor of the scores, None for the usual one."""
    return None if keys.flag(name, default=default) else 1.0


def is_scaled(scale: float) -> bool:
    """Return the flag of the usual factor."""
    return scale != 1.0


TABLE = Table({
    **OF_GPT, "activation": Key(OF_GPT["activation"].kind, "activation_function", "gelu_pytorch_tanh"),
    "max_position_embeddings": Key(SIZE, "n_positions max_position_embeddings", 1024),
    "num_query_groups": Key(Kind(one_head, is_one), "multi_query", True),
    "attention_scale": Key(Kind(unscaled, is_scaled), "scale_attn_weights", True),
    "attention_dropout": Key(NUMBER, "attn_pdrop", 0.1),
    "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True),
}, dict(position_embedding="learned"), rope=None)

# The two dropouts are of training, and the rest of one program's kernels and of classification.
WITHOUT_EFFECT = tuple("""
    resid_pdrop embd_pdrop attention_softmax_in_fp32 scale_attention_softmax_in_fp32 num_key_value_heads
    inference_runner validate_runner_input pre_allocate_kv_cache pad_key_length max_batch_size
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
""".split())
FAMILIES = [TABLE.family("gpt_bigcode", "GPTBigCodeForCausalLM", TENSORS, "transformer.", fused=by_group,
                         buffers=r"(.*\.attn\.)?(bias|masked_bias)",
                         without_effect=WITHOUT_EFFECT)]
