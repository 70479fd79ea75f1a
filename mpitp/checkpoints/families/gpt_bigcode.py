"""GPT-BigCode: SantaCoder and StarCoder (arXiv 2301.03988, 2305.06161), GPT-2 with one key/value head for all."""
from __future__ import annotations

from .fused import by_group
from .gpt2 import KEYS, OF_CLASSIFICATION, TENSORS
from .tables import OF_GPT, SIZE, Key, Table, flag_of

TABLE = Table({
    **KEYS, "activation": Key(OF_GPT["activation"].kind, "activation_function", "gelu_pytorch_tanh"),
    "max_position_embeddings": Key(SIZE, "n_positions max_position_embeddings", 1024),
    "num_query_groups": Key(flag_of(1, None), "multi_query", True),
}, dict(position_embedding="learned"), rope=None)

# The two dropouts are of training, and the rest of one program's kernels.
WITHOUT_EFFECT = tuple("""
    resid_pdrop embd_pdrop attention_softmax_in_fp32 scale_attention_softmax_in_fp32 num_key_value_heads
    inference_runner validate_runner_input pre_allocate_kv_cache pad_key_length max_batch_size
""".split())
FAMILIES = [TABLE.family("gpt_bigcode", "GPTBigCodeForCausalLM", TENSORS, "transformer.", fused=by_group,
                         buffers=r"(.*\.attn\.)?(bias|masked_bias)",
                         without_effect=(*WITHOUT_EFFECT, *OF_CLASSIFICATION))]
