"""A head whose logits are multiplied, or kept within bounds: its own layer, so that others pay nothing for it.

Dimension key: V vocabulary; p marks the axis that is split over the ranks.
"""
from typing import Any

from ..arrays import Array, scaled
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..ops.softcap import softcap_forward, softcap_slope
from .base import ParallelLayer, require_saved
from .linear import ColumnParallelLinear


class ScaledHead(ColumnParallelLinear):
    """z = m (x W^T + b), then c tanh(z / c), m and c the config's logits_multiplier and logits_softcap.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    config : DecoderConfig
        Sizes and choices.
    dtype : str
        "float32" or "float64"; on a GPU, without a softcap, "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights; None for zeros.
    tied_to : layer or None
        The embedding whose weight stands in for an own one.
    name : str
        Prefix of the parameters' names, "weight" and "bias".

    Notes
    -----
    Collectives: those of ColumnParallelLinear. Source: Gemma 2, arXiv 2408.00118.
    """

    def __init__(self, group: TensorParallelGroup, config: DecoderConfig, *, dtype: str, seed: int | None,
                 tied_to: ParallelLayer | None, name: str):
        super().__init__(group, config.hidden_size, config.vocab_size, config.head_bias, dtype=dtype, seed=seed,
                         init_std=config.init_method_std, tied_to=tied_to, name=name)
        self.multiplier, self.softcap = config.logits_multiplier, config.logits_softcap

    def forward(self, x: Array, *, rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return z (..., V p), and what backward needs, z itself among it: do not change it until then."""
        z, of_linear = super().forward(x, rows=rows, save=save)
        scaled(z, self.multiplier, out=z)
        if self.softcap is not None:
            softcap_forward(z, self.softcap)
        return z, ((self, of_linear, z) if save else None)

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx and {name: gradient} as ColumnParallelLinear does."""
        of_linear, z = require_saved(saved, self)
        dz = scaled(dy, self.multiplier)
        if self.softcap is not None:
            dz *= softcap_slope(z, self.softcap)
        return super().backward(dz, of_linear, out=out)
