"""SmolLM3: a Llama some of whose layers rotate nothing, every fourth one where config.json does not say which."""
from __future__ import annotations

from dataclasses import dataclass

from ...attention_config import Rotary
from ...config import DecoderConfig
from .keys import Keys
from .llama import ATTENTION_BIAS, MLP_BIAS, TENSORS
from .rope import Rope
from .tables import COMMON, FLAG, HEADS, Key, Table
from .windows import Typed, Windows, type_of, window_of, windows_of


def rotating(keys: Keys, layers: int) -> list[bool]:
    """Return whether each layer rotates: no_rope_layers has 1 for those that do."""
    interval = keys.count("no_rope_layer_interval", default=4)
    found = keys.get("no_rope_layers", default=[int((i + 1) % interval != 0) for i in range(layers)])
    if not (isinstance(found, list) and len(found) == layers and all(one in (0, 1) for one in found)):
        keys.fail(["no_rope_layers"], found, f"a list of {layers} times 0 or 1, one a layer")
    return list(map(bool, found))


@dataclass(frozen=True)
class SomeRotate(Rope):
    """The layers of no_rope_layers rotate in the same way."""
    theta: float = 2e6

    def read(self, keys: Keys, head_dim: int, windows: Windows) -> tuple[Rotary | None, ...]:
        """Return the Rotary of each layer."""
        found = super().read(keys, head_dim, windows)
        assert isinstance(found, Rotary)
        return tuple(found if rotates else None for rotates in rotating(keys, len(windows)))

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys, in the old style."""
        return {**super().write(config), "no_rope_layers": [int(turns is not None) for turns in config.rotaries]}


@dataclass(frozen=True)
class SomeSlide(Typed):
    """Layers slide as layer_types says; without it, with use_sliding_window, those that rotate nothing."""

    def read(self, keys: Keys, layers: int) -> Windows:
        """Return the window of each layer. Raises InputError for sliding layers without a window."""
        found, slides = window_of(keys, None), keys.flag("use_sliding_window", default=False)
        kinds = keys.layer_types(layers) or [type_of(None if one else slides and found) for one in rotating(keys, layers)]
        return windows_of(keys, kinds, found if slides else None)

    def write(self, config: DecoderConfig) -> dict:
        """Return all of its keys."""
        return {**super().write(config), "use_sliding_window": any(config.windows)}


TABLE = Table({**COMMON, **ATTENTION_BIAS, **MLP_BIAS, "num_query_groups": Key(HEADS, "num_key_value_heads", 4),
               "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True)},
              dict(gated=True, normalization="rmsnorm"), rope=SomeRotate(), windows=SomeSlide())

FAMILIES = [TABLE.family("smollm3", "SmolLM3ForCausalLM", TENSORS, without_effect=("max_window_layers",),
                         refused=(("rope_interleaved", (False,)),))]
