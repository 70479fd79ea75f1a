"""How query, key and value lie in one tensor, and gate and up: {module: Fused} of a config, for each way there is."""
from __future__ import annotations

from dataclasses import replace

from ...config import DecoderConfig
from .layout import Fused


def one_after_another(config: DecoderConfig) -> dict:
    """The fused tensor holds all of q, all of k, all of v."""
    return {f"attention.{part}": Fused(1, 3, config.hidden_size, i, i + 1)
            for i, part in enumerate(("query", "key", "value"))}


def head_by_head(config: DecoderConfig) -> dict:
    """The fused tensor holds q, k and v of head 0, then those of head 1, ..."""
    return {f"attention.{part}": Fused(config.num_attention_heads, 3, config.head_dim, i, i + 1)
            for i, part in enumerate(("query", "key", "value"))}


def by_group(config: DecoderConfig) -> dict:
    """The fused tensor holds the query heads that share a key/value head, its k, its v, then the next ones."""
    share = config.num_attention_heads // config.query_groups
    bounds = {"query": (0, share), "key": (share, share + 1), "value": (share + 1, share + 2)}
    return {f"attention.{part}": Fused(config.query_groups, share + 2, config.head_dim, *bound)
            for part, bound in bounds.items()}


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
