"""EXAONE 4 (arXiv 2507.11407): norms after the branches and on query and key; sliding layers, if any, alone rotate."""
from __future__ import annotations

from dataclasses import dataclass

from ...attention_config import Rotary
from ...config import DecoderConfig
from .keys import Keys
from .llama import TENSORS
from .rope import Rope
from .tables import ABOVE_0, COMMON, GATED_RMS, HEADS, Key, Table
from .windows import Typed, Windows, window_of

EXAONE4_TENSORS = {**TENSORS, "attention_post_norm": "layers.{}.post_attention_layernorm",
                   "mlp_post_norm": "layers.{}.post_feedforward_layernorm"}
WINDOW = 4096


@dataclass(frozen=True)
class SlidingAlone(Rope):
    """Full layers rotate nothing, unless config.json has no window at all: then all layers rotate."""
    sliding_alone: bool = True

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> Rotary | tuple[Rotary | None, ...]:
        """Return the Rotary of each layer, or of all."""
        rope = self if window_of(keys, WINDOW) else Rope()
        return Rope.read(rope, keys, head_dim, windows)

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys, that of no window at all among them where full layers rotate."""
        all_rotate = None not in config.rotaries and not any(config.windows)
        return {**super().write(config), **({"sliding_window": None} if all_rotate else {})}


TABLE = Table({**COMMON, "num_query_groups": Key(HEADS, "num_key_value_heads", 32),
               "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-5)},
              {**GATED_RMS, "qk_norm": True, "norm_placement": "after"}, rope=SlidingAlone(),
              windows=Typed(4, "sliding_window_pattern", WINDOW))

FAMILIES = [TABLE.family("exaone4", "Exaone4ForCausalLM", EXAONE4_TENSORS)]
