"""Phi 1, 1.5 and 2 (arXiv 2306.11644, 2309.05463), and Phi 3 and 4 (2404.14219, 2412.08905).

The first ones have attention and feed-forward side by side after one norm, and a head with a bias. The later ones are
Llamas whose q, k and v lie in one tensor, and gate and up in another.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from ...attention_config import Rotary
from ...config import DecoderConfig
from .keys import Keys
from .layout import Fused
from .llama import TENSORS
from .rope import Rope, chosen, scaled_rotary
from .tables import COMMON, GATED_RMS, ABOVE_0, ACTIVATION, Key, Table
from .windows import OneWindow, Windows

PHI_TENSORS = {
    **TENSORS,
    "attention.out": "layers.{}.self_attn.dense",
    "mlp.up": "layers.{}.mlp.fc1",
    "mlp.down": "layers.{}.mlp.fc2",
    "final_norm": "final_layernorm",
}
PHI3_TENSORS = {
    **TENSORS,
    **{f"attention.{part}": "layers.{}.self_attn.qkv_proj" for part in ("query", "key", "value")},
    "mlp.gate": "layers.{}.mlp.gate_up_proj",
    "mlp.up": "layers.{}.mlp.gate_up_proj",
}

@dataclass(frozen=True)
class LongRope(Rope):
    """Phi 3's only scaling is longrope, under three names; what the model was trained on stands outside of it."""
    trained: int = 4096

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> Rotary:
        """Return the Rotary of all layers. Raises InputError for another scaling."""
        found, theta = chosen(keys), keys.number("rope_theta", default=self.theta, above=0)
        part = keys.number("partial_rotary_factor", default=self.part, above=0)
        trained = keys.count("original_max_position_embeddings", default=self.trained)
        kind = found.values.get("rope_type") or found.values.get("type") or "default"
        if kind not in ("default", "longrope", "su", "yarn"):
            found.fail(["rope_type", "type"], kind, "default, or longrope, which su and yarn are here, too")
        if kind != "default":
            more = dict(rope_type="longrope", original_max_position_embeddings=trained)
            found = Keys({**found.values, **more}, found.where)
        return scaled_rotary(keys, found, head_dim, theta, part, True)

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys."""
        turns = config.rotary_of(0)
        trained = turns and turns.longest
        return {**super().write(config), **({"original_max_position_embeddings": trained} if trained else {})}


PHI = Table({**COMMON, "activation": Key(ACTIVATION, "hidden_act", "gelu_new"),
             "norm_epsilon": Key(ABOVE_0, "layer_norm_eps", 1e-5)},
            dict(parallel_residual=True, shared_norm=True, head_bias=True),
            rope=Rope(part=0.5, part_key="partial_rotary_factor"))
PHI3 = Table({**COMMON, "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-5)}, GATED_RMS,
             rope=LongRope(part_key="partial_rotary_factor"), windows=OneWindow(None))


def gate_then_up(config: DecoderConfig) -> dict:
    """The fused tensor holds all of gate, then all of up."""
    return {"mlp.gate": Fused(1, 2, config.ffn_size, 0, 1), "mlp.up": Fused(1, 2, config.ffn_size, 1, 2)}


def in_turn(config: DecoderConfig) -> dict:
    """The fused tensors hold all of q, all of k, all of v, and all of gate, all of up."""
    heads, groups, whole = config.num_attention_heads, config.query_groups, Fused(1, 1, config.head_dim, 0, 1)
    bounds = {"query": (0, heads), "key": (heads, heads + groups), "value": (heads + groups, heads + 2 * groups)}
    return {**gate_then_up(config),
            **{f"attention.{part}": replace(whole, parts=heads + 2 * groups, first=first, last=last)
               for part, (first, last) in bounds.items()}}


# resid_pdrop and embd_pdrop are of training, and theirs drop the branches of phi apart, no embedding in phi3.
FAMILIES = [
    PHI.family("phi", "PhiForCausalLM", PHI_TENSORS, without_effect=("resid_pdrop", "embd_pdrop"),
               refused=(("qk_layernorm", (False,)),)),
    PHI3.family("phi3", "Phi3ForCausalLM", PHI3_TENSORS, fused=in_turn,
                without_effect=("resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "interpolate_factor",
                                "full_attn_mod"),
                refused=(("attention_bias", (False,)), ("mlp_bias", (False,)), ("lm_head_bias", (False,)))),
]
