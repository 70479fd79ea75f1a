"""Falcon (arXiv 2311.16867): attention and feed-forward side by side; q, k and v by key/value head.

7B: one key/value head and one norm for both branches. 40B and 180B ("new_decoder_architecture"): several key/value
heads, a norm for each branch. 11B: several key/value heads, one norm.
"""
from __future__ import annotations

from ...config import DecoderConfig
from .bloom import TENSORS as OF_BLOOM
from .fused import by_group
from .keys import Keys
from .tables import ABOVE_0, ACTIVATION, COMMON, FLAG, LAYERS, SIZE, Key, Kind, Table

TENSORS = {module: name for module, name in OF_BLOOM.items() if module != "embedding_norm"}
TWO_NORMS_SIDE_BY_SIDE = {"attention_norm": "h.{}.ln_attn", "mlp_norm": "h.{}.ln_mlp"}


def groups(keys: Keys, *names: str) -> int | None:
    """Return how many key/value heads there are, None for as many as query heads."""
    if keys.flag("new_decoder_architecture", default=False):
        keys.refuse({"parallel_attn": (True,)})
        return keys.size(*names, default=None)
    return 1 if keys.flag("multi_query", default=True) else None


def shares_norm(keys: Keys, name: str) -> bool:
    """Return whether both branches have one norm: where they lie side by side, unless the new architecture has two."""
    new, norms = keys.flag("new_decoder_architecture", default=False), keys.get(name, default=None)
    if norms not in (None, 1, 2) or norms == 2 and not new:
        keys.fail([name], norms, "1, or 2 with new_decoder_architecture")
    return keys.flag("parallel_attn", default=True) and not (new and norms in (None, 2))


def architecture(config: DecoderConfig) -> dict:
    """Return the old architecture where it has as many key/value heads and norms, else the new one."""
    old = config.shared_norm and config.query_groups == 1 or not config.parallel_residual
    return dict(new_decoder_architecture=not old, multi_query=config.query_groups == 1, alibi=False,
                num_ln_in_parallel_attn=None if old else 1 if config.shared_norm else 2)


def tensors(config: DecoderConfig) -> dict:
    return {**TENSORS, **(TWO_NORMS_SIDE_BY_SIDE if config.parallel_residual and not config.shared_norm else {})}


TABLE = Table({
    **{field: COMMON[field] for field in ("vocab_size", "attention_dropout", "init_method_std")},
    "hidden_size": Key(SIZE, "hidden_size n_embed"), "num_layers": Key(LAYERS, "num_hidden_layers n_layer"),
    "num_attention_heads": Key(SIZE, "num_attention_heads n_head"),
    "num_query_groups": Key(Kind(groups), "num_kv_heads n_head_kv"),
    "ffn_hidden_size": Key(SIZE, "ffn_hidden_size", None), "activation": Key(ACTIVATION, "activation", "gelu"),
    "norm_epsilon": Key(ABOVE_0, "layer_norm_epsilon", 1e-5), "parallel_residual": Key(FLAG, "parallel_attn", True),
    "shared_norm": Key(Kind(shares_norm), "num_ln_in_parallel_attn"),
    "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True),
    **{field: Key(FLAG, "bias", False) for field in ("qkv_bias", "attention_bias", "mlp_bias")},
}, {}, more=architecture)
OF_ONE_ARCHITECTURE = ("multi_query", "num_kv_heads", "n_head_kv", "ff_factor")
FAMILIES = [TABLE.family("falcon", "FalconForCausalLM", tensors, "transformer.", fused=by_group,
                         buffers=r".*\.rotary_emb\.inv_freq", without_effect=OF_ONE_ARCHITECTURE,
                         refused=(("alibi", (False,)), ("hidden_dropout", (0,)),    # scales slopes, no embedding
                                  ("apply_residual_connection_post_layernorm", (False,))))]
