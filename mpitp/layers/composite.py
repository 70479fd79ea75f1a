"""A layer made of layers."""
from collections.abc import Sequence

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..sharding.parameters import by_name
from .base import ParallelLayer, Weights


class Composite(ParallelLayer):
    """A Composite is a layer made of layers: its parameters are theirs, under the same names and in the same arrays.

    A parameter that two of them share (tied embeddings) is one.
    """

    def __init__(self, group: TensorParallelGroup, layers: Sequence[ParallelLayer], dtype: str, name: str):
        self.group, self.name = group, name
        self.set_dtype(group, dtype)
        named = {id(spec): spec for layer in layers for spec in layer.specs.values()}
        self.specs = by_name(named.values())
        self.weights = Weights({name: layer.weights[name] for layer in layers for name in layer.specs})
        self.set_own()

    def gradients_of(self, layer: ParallelLayer, gradients: dict[str, Array]) -> dict[str, Array]:
        """Return the gradients of one of its layers."""
        return {name: gradients[name] for name in layer.specs}
