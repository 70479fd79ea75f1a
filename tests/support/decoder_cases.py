"""Decoders of every kind, small and odd: 5 query heads, 1 key/value head, hidden 20 with heads of 6, sequences of 7."""
from mpitp import DecoderConfig, Rotary

COMMON = dict(vocab_size=27, hidden_size=20, num_layers=2, num_attention_heads=5, num_query_groups=1, kv_channels=6,
              ffn_hidden_size=23)
LLAMA = dict(normalization="rmsnorm", activation="silu", gated=True, qkv_bias=False, attention_bias=False,
             mlp_bias=False)
KINDS = {
    "llama, one kv head": dict(LLAMA),
    "gpt2": dict(num_query_groups=5, kv_channels=None, position_embedding="learned", max_position_embeddings=9,
                 tie_word_embeddings=True),
    "gpt_neox": dict(num_query_groups=5, parallel_residual=True, activation="gelu", rotary=Rotary(dim=2)),
    "falcon": dict(parallel_residual=True, shared_norm=True, mlp_bias=False, rotary=Rotary(interleaved=True)),
    "bloom": dict(num_query_groups=5, position_embedding="alibi", embedding_norm=True, tie_word_embeddings=True,
                  head_bias=True),
    "gemma3": dict(LLAMA, activation="gelu_tanh", num_attention_heads=6, num_query_groups=2, norm_placement="both",
                   qk_norm=True, zero_centered_gamma=True, embedding_multiplier=20 ** 0.5, tie_word_embeddings=True,
                   sliding_window=(3, None), attention_scale=0.3,
                   rotary=(Rotary(), Rotary(base=1e6, scaling="linear", factor=8.0))),
    "olmo2": dict(LLAMA, num_attention_heads=6, num_query_groups=3, norm_placement="after", qk_norm=True),
    "after the residual": dict(norm_placement="after_residual", final_norm=False, position_embedding="none",
                               norm_bias=False, activation="relu", qk_norm=True, parallel_residual=False),
    "neox with query norm": dict(parallel_residual=True, qk_norm=True, num_attention_heads=3, num_query_groups=1,
                                 ffn_hidden_size=2, rotary=Rotary(scaling="llama3", factor=8.0,
                                                                  original_max_positions=4)),
    "three heads, yarn": dict(LLAMA, num_attention_heads=3, num_query_groups=3,
                              rotary=Rotary(dim=4, scaling="yarn", factor=4.0, original_max_positions=4)),
}

# Kinds that tests/hashes.py, whose lines are compared with those of other versions, does not know.
NEWER_KINDS = {
    "gemma2": dict(LLAMA, activation="gelu_tanh", num_attention_heads=6, num_query_groups=2, norm_placement="both",
                   zero_centered_gamma=True, tie_word_embeddings=True, sliding_window=(3, None), attention_scale=0.9,
                   attention_softcap=2.0, logits_softcap=3.0, logits_multiplier=1.7, head_bias=True),
    "granite and nemotron": dict(LLAMA, normalization="layernorm", zero_centered_gamma=True, activation="relu2",
                                 residual_multiplier=0.3, logits_multiplier=0.4, rotary=(Rotary(dim=4), None)),
    "hunyuan, side by side": dict(LLAMA, num_attention_heads=3, num_query_groups=1, qk_norm=True, shared_norm=True,
                                  qk_norm_after_rotary=True, parallel_residual=True, residual_multiplier=1.5,
                                  rotary=Rotary(base=100.0, interleaved=True)),
    "olmo2, over all heads": dict(LLAMA, num_attention_heads=6, num_query_groups=3, norm_placement="after",
                                  qk_norm=True, qk_norm_over_heads=True, zero_centered_gamma=True),
    "one kv head, normed over heads": dict(LLAMA, qk_norm=True, qk_norm_over_heads=True, qkv_bias=True),
    "command r+, side by side": dict(LLAMA, normalization="layernorm", norm_bias=False, num_attention_heads=6,
                                     num_query_groups=2, qk_norm=True, qk_norm_by_head=True, parallel_residual=True,
                                     shared_norm=True, rotary=Rotary(interleaved=True)),
    "one kv head, norms by head": dict(LLAMA, qk_norm=True, qk_norm_by_head=True, zero_centered_gamma=True),
    "phi, normed": dict(num_attention_heads=6, num_query_groups=3, qk_norm=True, qk_norm_bias=True,
                        parallel_residual=True, shared_norm=True, rotary=Rotary(dim=4)),
    "one kv head, norms with bias": dict(qk_norm=True, qk_norm_bias=True),
    "opt": dict(position_embedding="learned", max_position_embeddings=9, position_offset=2, activation="relu"),
}


def config(kind, **more):
    return DecoderConfig(**{**COMMON, **{**KINDS, **NEWER_KINDS}[kind], **more})
