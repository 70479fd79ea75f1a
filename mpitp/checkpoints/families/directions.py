"""Attention in both directions, as models that embed texts have it: what a config.json says of it.

With `is_causal` false a query sees `sliding_window` positions before and behind itself, or all of them. With Gemma 3's
own key it sees half as many, rounded down. Ours counts the query itself: window - 1 before and behind.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...config import DecoderConfig
from .keys import Keys


def read_directions(keys: Keys, config: DecoderConfig, own_key: str) -> DecoderConfig:
    """Return the config in both directions where the keys say so; own_key: of the family, "" for none."""
    if own_key and keys.flag(own_key, default=False):
        config = with_windows(replace(config, causal=False), half_and_itself)
    if not keys.flag("is_causal", default=True):
        config = with_windows(replace(config, causal=False), and_itself)
    return config


def causal_form(config: DecoderConfig) -> tuple[DecoderConfig, dict]:
    """Return a config whose windows are those of config.json, and the key that says the directions."""
    if config.causal:
        return config, {}
    return with_windows(replace(config, causal=True), without_itself), {"is_causal": False}


def with_windows(config: DecoderConfig, change: Callable[[int], int]) -> DecoderConfig:
    """Return the config with another sliding window in each layer that has one."""
    windows = tuple(window if window is None else change(window) for window in config.windows)
    return replace(config, sliding_window=windows[0] if len(set(windows)) == 1 else windows)


def and_itself(window: int) -> int:
    """Return ours, of is_causal's."""
    return window + 1


def half_and_itself(window: int) -> int:
    """Return ours, of Gemma 3's."""
    return window // 2 + 1


def without_itself(window: int) -> int:
    """Return is_causal's, of ours."""
    return window - 1
