"""Phi 3 and 4 (arXiv 2404.14219, 2412.08905): Llamas whose q, k and v lie in one tensor, and gate and up in another."""
from __future__ import annotations

from dataclasses import dataclass

from ...attention_config import Rotary
from ...config import DecoderConfig
from .fused import in_turn
from .keys import Keys
from .llama import TENSORS
from .rope import Rope, chosen, scaled_rotary
from .tables import ABOVE_0, COMMON, GATED_RMS, Key, Table
from .windows import OneWindow, Windows

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


TABLE = Table({**COMMON, "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-5)}, GATED_RMS,
             rope=LongRope(part_key="partial_rotary_factor"), windows=OneWindow(None))


# resid_pdrop and embd_pdrop are of training; theirs drops no embedding.
FAMILIES = [TABLE.family("phi3", "Phi3ForCausalLM", PHI3_TENSORS, fused=in_turn,
                         without_effect=("resid_pdrop", "embd_pdrop", "original_max_position_embeddings",
                                         "interpolate_factor", "full_attn_mod"),
                         refused=(("attention_bias", (False,)), ("mlp_bias", (False,)), ("lm_head_bias", (False,))))]
