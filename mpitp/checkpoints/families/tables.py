"""Families that say the fields of DecoderConfig key by key: tables, which are read and written in one way.

A table is {field of DecoderConfig: Key(kind, key of config.json, what holds without it)}. What a family does not say
because it is always so is `fixed`; rotary positions and sliding windows, which take more than a key, are objects of
rope.py and windows.py. A new family is another's table with changes: docs/families.md shows one.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import eq
from typing import Any

from ...config import DecoderConfig
from .activations import THEIR_ACTIVATIONS
from .family import Family
from .keys import REQUIRED, Keys
from .rope import Rope, RopeKeys
from .windows import NoWindow, WindowKeys

# Fields that may be None in DecoderConfig, and its property that has them filled in.
FILLED_IN = {"num_query_groups": "query_groups", "kv_channels": "head_dim", "ffn_hidden_size": "ffn_size",
             "attention_scale": "scale"}


def as_it_is(value: Any) -> Any:
    """Return the value."""
    return value


@dataclass(frozen=True)
class Kind:
    """How the value of a key becomes that of a field, and back.

    read : function of (Keys, *names of the key, default=)
    write : function of the field's value
    """
    read: Callable[..., Any]
    write: Callable[[Any], Any] = as_it_is


class Key:
    """A key of config.json that says one field.

    kind : Kind
    names : of the key, the one that is written first; several for one that has other names in old files
    default : what the field is without the key, in config.json's terms; none: the key must be there
    """

    def __init__(self, kind: Kind, names: str, default: Any = REQUIRED):
        self.kind, self.names = kind, names.split()
        self.default = {} if default is REQUIRED else {"default": default}

    def read(self, keys: Keys) -> Any:
        """Return the field's value. Raises InputError for a value that the key must not have."""
        return self.kind.read(keys, *self.names, **self.default)


def above_0(keys: Keys, *names: str, default: Any = REQUIRED) -> Any:
    """Return a number above 0."""
    return keys.number(*names, default=default, above=0)


def key_value_heads(keys: Keys, name: str, default: Any = None) -> Any:
    """Return how many there are: as many as query heads where the key is null, the default where it is absent."""
    return keys.size(name, default=None if name in keys.values else default)


def cap(keys: Keys, name: str, default: Any = None) -> Any:
    """Return a number above 0: none where the key is null, the default where it is absent."""
    return keys.number(name, default=None if name in keys.values else default, above=0)


def one_of_two(yes: Any, no: Any, keys: Keys, name: str, default: bool) -> Any:
    """Return what a flag of config.json stands for."""
    return yes if keys.flag(name, default=default) else no


def flag_of(yes: Any, no: Any) -> Kind:
    """Return the kind of a flag that stands for one of two values of a field."""
    return Kind(partial(one_of_two, yes, no), partial(eq, yes))


SIZE, LAYERS, FLAG, NUMBER = Kind(Keys.size), Kind(Keys.layers), Kind(Keys.flag), Kind(Keys.number)
ABOVE_0, HEADS, CAP = Kind(above_0), Kind(key_value_heads), Kind(cap)
ACTIVATION = Kind(Keys.activation, THEIR_ACTIVATIONS.__getitem__)

# What nearly all families since Llama have in common.
COMMON = {
    "vocab_size": Key(SIZE, "vocab_size"),
    "hidden_size": Key(SIZE, "hidden_size"),
    "num_layers": Key(LAYERS, "num_hidden_layers"),
    "num_attention_heads": Key(SIZE, "num_attention_heads"),
    "num_query_groups": Key(HEADS, "num_key_value_heads", None),
    "kv_channels": Key(SIZE, "head_dim", None),
    "ffn_hidden_size": Key(SIZE, "intermediate_size"),
    "activation": Key(ACTIVATION, "hidden_act", "silu"),
    "norm_epsilon": Key(ABOVE_0, "rms_norm_eps", 1e-6),
    "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", False),
    "attention_dropout": Key(NUMBER, "attention_dropout", 0.0),
    "init_method_std": Key(NUMBER, "initializer_range", 0.02),
}
GATED_RMS = dict(gated=True, normalization="rmsnorm", qkv_bias=False, attention_bias=False, mlp_bias=False)
# GPT-2's names of the same.
OF_GPT = {
    "vocab_size": Key(SIZE, "vocab_size"),
    "hidden_size": Key(SIZE, "n_embd hidden_size"),
    "num_layers": Key(LAYERS, "n_layer num_hidden_layers"),
    "num_attention_heads": Key(SIZE, "n_head num_attention_heads"),
    "ffn_hidden_size": Key(SIZE, "n_inner", None),
    "activation": Key(ACTIVATION, "activation_function", "gelu_new"),
    "norm_epsilon": Key(ABOVE_0, "layer_norm_epsilon", 1e-5),
    "attention_dropout": Key(NUMBER, "attn_pdrop", 0.0),
    "init_method_std": Key(NUMBER, "initializer_range", 0.02),
}


def nothing(found: Any) -> dict:
    """Return no more fields, or no more keys."""
    return {}


@dataclass(frozen=True)
class Table:
    """What the config.json of a family says.

    keys : {field of DecoderConfig: Key}
    fixed : {field: value} that all of the family have
    derived : function of the fields so far -> more fields
    rope : of rotary positions, None where there are none
    windows : of the layers' sliding windows
    more : function of the config -> keys that are written beside those
    """
    keys: Mapping[str, Key]
    fixed: Mapping[str, Any]
    derived: Callable[[dict], dict] = nothing
    rope: RopeKeys | None = Rope()
    windows: WindowKeys = NoWindow()
    more: Callable[[DecoderConfig], dict] = nothing

    def read(self, keys: Keys) -> DecoderConfig:
        """Return the config. Raises InputError for a value that is not supported."""
        found = {name: key.read(keys) for name, key in self.keys.items()}
        found.update(self.fixed)
        found.update(self.derived(found))
        windows = self.windows.read(keys, found["num_layers"])
        found["sliding_window"] = windows[0] if len(set(windows)) == 1 else windows
        if self.rope is not None:
            head_dim = found.get("kv_channels") or found["hidden_size"] // found["num_attention_heads"]
            found["rotary"] = self.rope.read(keys, head_dim, windows)
        return DecoderConfig(**found)

    def write(self, config: DecoderConfig) -> dict:
        """Return the keys of a config.json that says as much of the config as it can."""
        said = {} if self.rope is None else self.rope.write(config)
        said.update(self.windows.write(config))
        for name, key in self.keys.items():
            said[key.names[0]] = key.kind.write(getattr(config, FILLED_IN.get(name, name)))
        return {**said, **self.more(config)}

    def family(self, model_type: str, architecture: str,
               tensors: Mapping[str, str] | Callable[[DecoderConfig], Mapping[str, str]], prefix: str = "model.",
               **more: Any) -> Family:
        """Return the Family of the table: more as Family has it."""
        reads = {name for key in self.keys.values() for name in key.names}
        return Family(model_type, architecture, self.read, self.write, tensors, prefix, reads=frozenset(reads), **more)
