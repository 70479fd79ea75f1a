"""What a family of checkpoints is: how its config.json and its tensors' names become a decoder's."""
import re
from dataclasses import dataclass
from typing import Callable

from .layout import Layout

OF_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def nothing_fused(config):
    return {}


@dataclass(frozen=True)
class Family:
    """One model_type.

    model_type, architecture : as config.json names them
    read : function of Keys -> DecoderConfig
    write : function of a DecoderConfig -> the keys of a config.json that says as much of it as the family can
    tensors : function of the config -> {module of ours: module of theirs}, {} standing for the number of a layer
    prefix : in front of all of theirs but the head's; checkpoints of the bare model lack it
    fused : function of the config -> {module of ours: Fused}
    transposed : modules of ours whose weights are stored [in, out]
    ignored : pattern of stored tensors that are no parameters
    """
    model_type: str
    architecture: str
    read: Callable
    write: Callable
    tensors: Callable
    prefix: str
    fused: Callable = nothing_fused
    transposed: tuple = ()
    ignored: str = "(?!)"

    def layouts(self, config, specs, prefix):
        """{name of ours: Layout} of all parameters."""
        tensors, fused, found = self.tensors(config), self.fused(config), {}
        for name, spec in specs.items():
            of_layer = OF_LAYER.fullmatch(name)
            layer, inside = of_layer.groups() if of_layer else (None, name)
            module, kind = inside.rsplit(".", 1)
            theirs = tensors[module].format(layer)
            found[name] = Layout(f"{theirs if module == 'head' else prefix + theirs}.{kind}", spec.shape,
                                kind == "weight" and module in self.transposed, fused.get(module))
        return found

    def prefix_in(self, names):
        """The prefix that the checkpoint's names have: the family's, or none."""
        return self.prefix if any(name.startswith(self.prefix) for name in names) else ""

    def is_no_parameter(self, name, config):
        """Whether a stored tensor beside the parameters is known to be none: a buffer, or the copy of a tied head."""
        if config.tie_word_embeddings and name == self.tensors(config)["head"] + ".weight":
            return True
        return re.fullmatch(self.ignored, name) is not None
