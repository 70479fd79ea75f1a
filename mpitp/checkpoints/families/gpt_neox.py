"""GPT-NeoX and Pythia (arXiv 2204.06745): attention and feed-forward side by side; q, k and v head by head."""
from __future__ import annotations

from ...config import DecoderConfig
from .fused import head_by_head
from .keys import Keys
from .rope import Rope
from .tables import ABOVE_0, ACTIVATION, COMMON, FLAG, Key, Kind, Table

TENSORS = {
    "embedding": "embed_in",
    "attention_norm": "layers.{}.input_layernorm",
    **{f"attention.{part}": "layers.{}.attention.query_key_value" for part in ("query", "key", "value")},
    "attention.out": "layers.{}.attention.dense",
    "mlp_norm": "layers.{}.post_attention_layernorm",
    "mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "mlp.down": "layers.{}.mlp.dense_4h_to_h",
    "final_norm": "final_layer_norm",
    "head": "embed_out",
}


def heads(keys: Keys, name: str) -> int:
    """Return how many there are; theirs turns as many features as head_dim says, whatever a head has."""
    count = keys.size(name)
    keys.refuse({"head_dim": (keys.size("hidden_size") // count,)})
    return count


def dropout(keys: Keys, name: str, default: float) -> float:
    """Return the probability; side by side theirs drops the two branches apart, ours their sum."""
    if keys.flag("use_parallel_residual", default=True):
        keys.refuse({name: (0,)})
    return keys.number(name, default=default)


def dropout_key(config: DecoderConfig) -> dict:
    """Return the key of the dropout, none side by side."""
    return {"hidden_dropout": 0.0 if config.parallel_residual else config.hidden_dropout}


TABLE = Table({
    **{field: key for field, key in COMMON.items() if field not in ("num_query_groups", "kv_channels")},
    "num_attention_heads": Key(Kind(heads), "num_attention_heads"),
    "activation": Key(ACTIVATION, "hidden_act", "gelu"), "norm_epsilon": Key(ABOVE_0, "layer_norm_eps", 1e-5),
    "parallel_residual": Key(FLAG, "use_parallel_residual", True),
    "hidden_dropout": Key(Kind(dropout), "hidden_dropout", 0.0),
    **{field: Key(FLAG, "attention_bias", True) for field in ("qkv_bias", "attention_bias")},
}, {}, rope=Rope(part=0.25, part_key="rotary_pct", theta_key="rotary_emb_base"), more=dropout_key)

FAMILIES = [TABLE.family("gpt_neox", "GPTNeoXForCausalLM", TENSORS, "gpt_neox.", fused=head_by_head,
                         buffers=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
                         without_effect=("attention_probs_dropout_prob", "hidden_dropout_prob"))]
