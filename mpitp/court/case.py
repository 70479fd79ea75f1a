"""What a program runs on: the architecture, the weights of each rank, the inputs, and what goes wrong."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..arrays import Array
from ..config import DecoderConfig
from .ranks import Fault, Place


@dataclass(frozen=True, eq=False)
class Case:
    """A case is one computation on a number of ranks; mistakes make other cases of it.

    Parameters
    ----------
    kind : str
        As in run.json.
    configs : tuple of DecoderConfig
        Of each rank; without a mistake they are all the same.
    options : dict
        As in run.json.
    whole : dict
        The whole weights.
    weights : tuple of dict
        What each rank has of the weights.
    places : dict
        {name: Place or None}, how each weight is split.
    inputs : dict
        Whole tensors: "x", "ids", "targets", "logits", "mask", dropouts, and "dy".
    tokens : Place or None
        How x is split where tokens are dealt over the ranks.
    by_tokens : bool
        Whether each rank computes on its own tokens alone, with whole weights: data parallelism, or a norm under
        sequence parallelism.
    heads, kv_heads : tuple of array of int
        The query heads of each rank, and for each of them its key/value head.
    smoothing : tuple of float
        Label smoothing on each rank.
    faults : dict
        {role: function}.
    """
    kind: str
    configs: tuple[DecoderConfig, ...]
    options: Mapping[str, Any]
    whole: Mapping[str, Any]
    weights: tuple[Mapping[str, Any], ...]
    places: Mapping[str, Place | None]
    inputs: Mapping[str, Any]
    tokens: Place | None = None
    by_tokens: bool = False
    heads: tuple[Array, ...] = ()
    kv_heads: tuple[Array, ...] = ()
    smoothing: tuple[float, ...] = ()
    faults: Mapping[str, Fault] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.weights)

    @property
    def config(self) -> DecoderConfig:
        """Return the architecture, that of rank 0."""
        return self.configs[0]

    def with_faults(self, faults: Mapping[str, Fault]) -> Case:
        """Return the same case with these faults beside its own."""
        return dataclasses.replace(self, faults={**self.faults, **faults})

    def with_config(self, **changes: Any) -> Case:
        """Return the same case, every rank with these changes of the architecture."""
        return dataclasses.replace(self, configs=tuple(dataclasses.replace(c, **changes) for c in self.configs))

    def with_weights(self, weights: Sequence[Mapping[str, Any]]) -> Case:
        """Return the same case with other weights on the ranks."""
        return dataclasses.replace(self, weights=tuple(weights))


def part_of(weights: tuple[Mapping[str, Any], ...], name: str) -> list[dict[str, Any]]:
    """Return each rank's weights of one part, by their names inside it; all of them for the name ""."""
    start = f"{name}." if name else ""
    return [{key[len(start):]: w for key, w in of_rank.items() if key.startswith(start)} for of_rank in weights]
