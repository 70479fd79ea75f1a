"""GPT-J (Wang and Komatsuzaki, 2021): attention and feed-forward side by side; part of each head rotates, neighbours
paired; a head with a bias."""
from __future__ import annotations

from dataclasses import dataclass

from ...attention_config import Rotary
from ...config import DecoderConfig
from .keys import Keys
from .tables import FLAG, OF_GPT, Key, Table
from .windows import Windows

TENSORS = {
    "embedding": "wte",
    "attention_norm": "h.{}.ln_1",
    "attention.query": "h.{}.attn.q_proj",
    "attention.key": "h.{}.attn.k_proj",
    "attention.value": "h.{}.attn.v_proj",
    "attention.out": "h.{}.attn.out_proj",
    "mlp.up": "h.{}.mlp.fc_in",
    "mlp.down": "h.{}.mlp.fc_out",
    "final_norm": "ln_f",
    "head": "lm_head",
}


@dataclass(frozen=True)
class RotaryDim:
    """config.json says how many features rotate, and nothing else of it."""

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> Rotary:
        """Return the Rotary of all layers."""
        default = None if "rotary_dim" in keys.values else 64           # null: all of a head
        return Rotary(dim=keys.count("rotary_dim", default=default), interleaved=True)

    def write(self, config: DecoderConfig) -> dict:
        """Return the key."""
        turns = config.rotary_of(0)
        return {"rotary_dim": turns and turns.dim or config.head_dim}


GPTJ = Table({**OF_GPT, "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", False)},
             dict(parallel_residual=True, shared_norm=True, qkv_bias=False, attention_bias=False, head_bias=True),
             rope=RotaryDim())

# resid_pdrop and embd_pdrop are of training, and theirs drops the two branches apart.
FAMILIES = [GPTJ.family("gptj", "GPTJForCausalLM", TENSORS, "transformer.", buffers=r".*\.attn\.(bias|masked_bias)",
                        without_effect=("resid_pdrop", "embd_pdrop", "n_positions", "rotary", "scale_attn_weights",
                                        "summary_type", "summary_use_proj", "summary_activation",
                                        "summary_proj_to_labels", "summary_first_dropout"))]
