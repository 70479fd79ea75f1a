"""OPT (arXiv 2205.01068): learned positions, two rows late in their table; norms before or after the branches."""
from __future__ import annotations

from .keys import Keys
from .tables import ACTIVATION, COMMON, FLAG, NUMBER, SIZE, Key, Kind, Table, flag_of

TENSORS = {
    "embedding": "embed_tokens",
    "position": "embed_positions",
    "attention_norm": "layers.{}.self_attn_layer_norm",
    "attention_post_norm": "layers.{}.self_attn_layer_norm",
    "attention.query": "layers.{}.self_attn.q_proj",
    "attention.key": "layers.{}.self_attn.k_proj",
    "attention.value": "layers.{}.self_attn.v_proj",
    "attention.out": "layers.{}.self_attn.out_proj",
    "mlp_norm": "layers.{}.final_layer_norm",
    "mlp_post_norm": "layers.{}.final_layer_norm",
    "mlp.up": "layers.{}.fc1",
    "mlp.down": "layers.{}.fc2",
    "final_norm": "final_layer_norm",
    "head": "lm_head",
}


def hidden_size(keys: Keys, name: str) -> int:
    """Return the features of a token; theirs may embed it in another number of them."""
    size = keys.size(name)
    keys.refuse({"word_embed_proj_dim": (size,)})
    return size


def no_last_norm(found: dict) -> dict:
    """Return that a model with norms after the residuals has no other one at its end."""
    return {"final_norm": found["final_norm"] and found["norm_placement"] == "before"}


TABLE = Table({
    **{field: COMMON[field] for field in ("vocab_size", "num_layers", "num_attention_heads", "attention_dropout")},
    "hidden_size": Key(Kind(hidden_size), "hidden_size"),
    "ffn_hidden_size": Key(SIZE, "ffn_dim"), "max_position_embeddings": Key(SIZE, "max_position_embeddings", 2048),
    "activation": Key(ACTIVATION, "activation_function", "relu"), "init_method_std": Key(NUMBER, "init_std", 0.02),
    "norm_placement": Key(flag_of("before", "after_residual"), "do_layer_norm_before", True),
    "final_norm": Key(flag_of(False, True), "_remove_final_layer_norm", False),
    "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True),
    **{field: Key(FLAG, "enable_bias", True) for field in ("qkv_bias", "attention_bias", "mlp_bias")},
}, dict(position_embedding="learned", position_offset=2), derived=no_last_norm, rope=None)

# The dropouts are of training: theirs drops no embedding, and whole layers.
FAMILIES = [TABLE.family("opt", "OPTForCausalLM", TENSORS, "model.decoder.", other_prefixes=("decoder.",),
                         without_effect=("dropout", "layerdrop", "activation_dropout"),
                         refused=(("layer_norm_elementwise_affine", (True,)),))]
