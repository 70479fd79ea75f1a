"""Which layers have a sliding window: what the config.json of a family says of it, and how it is written."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...config import DecoderConfig
from .keys import Keys

Windows = tuple["int | None", ...]      # of each layer; None: a query sees all earlier positions


class WindowKeys(Protocol):
    """The keys of config.json that sliding windows are read from and written to."""

    def read(self, keys: Keys, layers: int) -> Windows:
        """Return the window of each layer."""

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys."""


@dataclass(frozen=True)
class NoWindow:
    """No layer has one: a key that asks for one is refused."""

    def read(self, keys: Keys, layers: int) -> Windows:
        """Return None for each layer. Raises InputError for a window."""
        keys.refuse({"sliding_window": (), "attention_chunk_size": ()})
        require_one_type(keys, layers, None)
        return (None,) * layers

    def write(self, config: DecoderConfig) -> dict:
        """Return no key."""
        return {}


@dataclass(frozen=True)
class OneWindow:
    """All layers have the same: null is none, and `default` holds where there is no key."""
    default: int | None = 4096

    def read(self, keys: Keys, layers: int) -> Windows:
        """Return the window under the key for each layer. Raises InputError for layers of several types."""
        window = window_of(keys, self.default)
        require_one_type(keys, layers, window)
        return (window,) * layers

    def write(self, config: DecoderConfig) -> dict:
        """Return the key."""
        return {"sliding_window": config.window(0)}


@dataclass(frozen=True)
class Typed:
    """Each layer is a sliding or a full one, as layer_types has it.

    Where that key is absent every n-th layer is full.

    every : n; 0: no layer is full unless there is no window
    every_key : an old key of n, "" for none
    default : the window where there is no key
    """
    every: int = 0
    every_key: str = ""
    default: int | None = 4096

    def read(self, keys: Keys, layers: int) -> Windows:
        """Return the window of each layer. Raises InputError for sliding layers without a window."""
        window, kinds = window_of(keys, self.default), keys.layer_types(layers)
        if kinds is None and self.every_key:
            every = keys.count(self.every_key, default=self.every)
        else:
            every = self.every
            keys.ignore([self.every_key])           # layer_types says it
        if kinds is None and not every:
            return (window,) * layers
        kinds = kinds or [type_of(None if (i + 1) % every == 0 else 1) for i in range(layers)]
        return windows_of(keys, kinds, window)

    def write(self, config: DecoderConfig) -> dict:
        """Return layer_types and, if there is one, the window; transformers wants one, even where no layer slides."""
        said: dict = {"layer_types": list(map(type_of, config.windows))}
        if any(config.windows):
            said["sliding_window"] = max(filter(None, config.windows))
        return said


@dataclass(frozen=True)
class FromLayer:
    """The layers of a Qwen have windows where layer_types says so, else from max_window_layers on.

    None has one without use_sliding_window.
    """

    def read(self, keys: Keys, layers: int) -> Windows:
        """Return the window of each layer. Raises InputError for sliding layers without a window."""
        window = window_of(keys, 4096)
        window = window if keys.flag("use_sliding_window", default=False) else None
        first = keys.get("max_window_layers", default=28)
        if not isinstance(first, int):
            keys.fail(["max_window_layers"], first, "an integer")
        kinds = keys.layer_types(layers) or [type_of(window if i >= first else None) for i in range(layers)]
        return windows_of(keys, kinds, window)

    def write(self, config: DecoderConfig) -> dict:
        """Return all of its keys."""
        windows = config.windows
        return dict(use_sliding_window=any(windows), sliding_window=max(filter(None, windows), default=None),
                    layer_types=list(map(type_of, windows)),
                    max_window_layers=next((i for i, window in enumerate(windows) if window), config.num_layers))


def window_of(keys: Keys, default: int | None) -> int | None:
    """Return the sliding window: none where the key is null, the default where it is absent."""
    return keys.count("sliding_window", default=None if "sliding_window" in keys.values else default)


def windows_of(keys: Keys, kinds: Sequence[str], window: int | None) -> Windows:
    """Return the sliding window of each layer, by its type. Raises InputError for sliding layers without a window."""
    if window is None and "sliding_attention" in kinds:
        keys.fail(["layer_types"], "sliding_attention", "full_attention where there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def require_one_type(keys: Keys, layers: int, window: int | None) -> None:
    """Raise InputError for a layer_types that differs from the one type that all layers of the family have."""
    for kind in keys.layer_types(layers) or ():
        if kind != type_of(window):
            keys.fail(["layer_types"], kind, f"{type_of(window)} in every layer: model_type "
                                             f"{keys.get('model_type', default='')} has one kind")


def type_of(window: int | None) -> str:
    """Return the name that layer_types has for a layer with this window."""
    return "sliding_attention" if window else "full_attention"
