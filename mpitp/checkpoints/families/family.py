"""What a family of checkpoints is: how its config.json and its tensors' names become a decoder's."""
from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

from ...config import DecoderConfig
from ...errors import InputError
from ...sharding.parameters import ParameterSpec
from .directions import read_directions
from .keys import REFUSED, WITHOUT_EFFECT, Keys
from .layout import Fused, Layout

OF_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def nothing_fused(config: DecoderConfig) -> dict:
    """Return the fused tensors of a family that has none."""
    return {}


@dataclass(frozen=True)
class Family:
    """A family is the checkpoints of one model_type.

    model_type, architecture : as config.json names them
    read : function of Keys -> DecoderConfig
    write : function of a DecoderConfig -> the keys of a config.json that says as much of it as the family can
    tensors : {module of ours: module of theirs}, {} standing for the number of a layer; or a function of the config
    prefix : in front of all of theirs but the head's; checkpoints of the bare model lack it
    fused : function of the config -> {module of ours: Fused}
    transposed : modules of ours whose weights are stored [in, out]
    buffers : pattern of stored tensors that are no parameters: the model computes their values itself
    without_effect : keys that change nothing in this family, beside those of keys.WITHOUT_EFFECT
    refused : (key, values that change nothing), beside those of keys.REFUSED
    reads : keys that `read` reads although keys.REFUSED names them
    other_prefixes : those that are read as well
    other_head : another name of the stored head that is read as well, "" for none
    other_parts : pattern of stored tensors of other parts of the model, such as one that sees images: left out
    saved_as : the family that a model is saved as, "" for this one
    both_directions : a key beside is_causal that has attention see later positions, too, "" for none
    """
    model_type: str
    architecture: str
    read: Callable[[Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict]
    tensors: Mapping[str, str] | Callable[[DecoderConfig], Mapping[str, str]]
    prefix: str
    fused: Callable[[DecoderConfig], Mapping[str, Fused]] = nothing_fused
    transposed: tuple = ()
    buffers: str = "(?!)"
    without_effect: tuple = ()
    refused: tuple = ()
    reads: frozenset = frozenset()
    other_prefixes: tuple = ()
    other_head: str = ""
    other_parts: str = "(?!)"
    saved_as: str = ""
    both_directions: str = ""

    def config(self, keys: Keys) -> DecoderConfig:
        """Read the config.json. Raises InputError for a value that is not supported."""
        refused = {name: neutral for name, neutral in REFUSED.items() if name not in self.reads}
        keys.refuse({**refused, **dict(self.refused)})
        keys.ignore(WITHOUT_EFFECT)
        keys.ignore(self.without_effect)
        try:
            return read_directions(keys, self.read(keys), self.both_directions)
        except InputError as error:
            text = str(error)                   # DecoderConfig's own checks do not name the file
            raise error if text.startswith(keys.where) else InputError(f"{keys.where}: {text}") from None

    def names(self, config: DecoderConfig) -> Mapping[str, str]:
        """Return {module of ours: module of theirs} for a model of this config."""
        return self.tensors(config) if callable(self.tensors) else self.tensors

    def layouts(self, config: DecoderConfig, specs: Mapping[str, ParameterSpec], prefix: str) -> dict[str, Layout]:
        """Return {name of ours: Layout} of all parameters."""
        tensors, fused, found = self.names(config), self.fused(config), {}
        for name, spec in specs.items():
            of_layer = OF_LAYER.fullmatch(name)
            layer, inside = of_layer.groups() if of_layer else (None, name)
            module, kind = inside.rsplit(".", 1)
            theirs = tensors[module].format(layer)          # {{}} becomes {}: a tensor for each row
            found[name] = Layout(f"{theirs if module == 'head' else prefix + theirs}.{kind}", spec.shape,
                                 kind == "weight" and module in self.transposed, fused.get(module))
        return found

    def head(self, config: DecoderConfig, names: Container[str]) -> str:
        """Return the stored tensor of the head's weight among a checkpoint's names; a tied model need not have it."""
        other = f"{self.other_head}.weight"
        return other if other in names else self.names(config)["head"] + ".weight"

    def embedding(self, config: DecoderConfig, prefix: str) -> str:
        """Return the stored tensor of the embedding's weight."""
        return f"{prefix}{self.names(config)['embedding']}.weight"

    def prefix_in(self, names: Iterable[str], config: DecoderConfig) -> str:
        """Return the prefix of the checkpoint's names: the family's, or none. Raises InputError for another one."""
        names, bare = set(names), self.embedding(config, "")
        for prefix in (self.prefix, *self.other_prefixes, ""):
            if prefix + bare in names:
                return prefix
        other = sorted(name.removesuffix(bare) for name in names if name.endswith(f".{bare}"))
        if other:
            raise InputError(f"found {other[0] + bare!r}, expected {self.prefix + bare!r} or {bare!r}: prefix "
                             f"{self.prefix!r} or none, as model_type {self.model_type} has it")
        return self.prefix if any(name.startswith(self.prefix) for name in names) else ""

    def is_buffer(self, name: str) -> bool:
        """Return whether a stored tensor is known to be no parameter."""
        return re.fullmatch(self.buffers, name) is not None

    def is_of_other_part(self, name: str) -> bool:
        """Return whether a stored tensor belongs to a part of the model that is left out."""
        return re.fullmatch(self.other_parts, name) is not None
