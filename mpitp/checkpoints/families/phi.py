"""Phi 1, 1.5 and 2 (arXiv 2306.11644, 2309.05463): attention and feed-forward side by side after one norm."""
from __future__ import annotations

from .llama import TENSORS
from .rope import Rope
from .tables import ABOVE_0, ACTIVATION, COMMON, FLAG, Key, Table

PHI_TENSORS = {
    **TENSORS,
    "attention.out": "layers.{}.self_attn.dense",
    **{f"attention.{part}_norm": f"layers.{{}}.self_attn.{part[0]}_layernorm" for part in ("query", "key")},
    "mlp.up": "layers.{}.mlp.fc1",
    "mlp.down": "layers.{}.mlp.fc2",
    "final_norm": "final_layernorm",
}

TABLE = Table({**COMMON, "activation": Key(ACTIVATION, "hidden_act", "gelu_new"),
             "norm_epsilon": Key(ABOVE_0, "layer_norm_eps", 1e-5),
             **{field: Key(FLAG, "qk_layernorm", False) for field in ("qk_norm", "qk_norm_bias")}},
            dict(parallel_residual=True, shared_norm=True, head_bias=True),
            rope=Rope(part=0.5, part_key="partial_rotary_factor"))

# resid_pdrop and embd_pdrop are of training, and theirs drops the two branches apart.
FAMILIES = [TABLE.family("phi", "PhiForCausalLM", PHI_TENSORS, without_effect=("resid_pdrop", "embd_pdrop"))]
