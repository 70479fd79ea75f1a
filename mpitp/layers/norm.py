"""Layer norm and RMS norm, replicated: every rank has all features of its rows.

Dimension key: N rows (tokens), D features.
"""
from collections import Counter
from typing import Any

import numpy as np

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..attention_config import NORMALIZATIONS
from ..config import DecoderConfig
from ..errors import InputError, one_of, require, require_positive
from ..ops.norm import norm_backward, norm_forward, overflow_text, overflows
from ..sharding.specs import join, norm_specs
from .base import ParallelLayer, require_saved


class NormOverflow(InputError):
    """The mean square of a row is not a finite number: its norm would be 0, and everything above it blind to the row.

    On a GPU, where asking would cost a wait, the norm is NaN, and what follows is not finite: in training the check of
    loss and gradients ends the step.
    """


class Norm(ParallelLayer):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * w + b (layernorm), y = x / sqrt(mean(x^2) + epsilon) * w (rmsnorm).

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    hidden_size : int
        D.
    kind : str
        "layernorm" or "rmsnorm".
    epsilon : float
        Above 0 and below 1.
    bias : bool, optional
        Whether there is a b; None: layer norms have one, RMS norms none.
    zero_centered : bool
        Multiply by 1 + w, where w starts from 0 (otherwise from 1).
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    name : str
        Prefix of the parameters' names, "weight" and "bias".

    Raises
    ------
    InputError
        For a size or epsilon that is not positive, an unknown kind or dtype; NormOverflow by forward.

    Notes
    -----
    No collectives: x and dy are the same on every rank, and so are y, dx and the gradients, which are complete. In
    sequence parallelism x is this rank's rows; NormSums adds up the gradients then.
    Sources: Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467.
    """

    def __init__(self, group: TensorParallelGroup, hidden_size: int, kind: str = "layernorm", epsilon: float = 1e-5,
                 bias: bool | None = None, zero_centered: bool = False, *, dtype: str = "float32", name: str = ""):
        require_positive(hidden_size=hidden_size)
        one_of("norm kind", kind, NORMALIZATIONS)
        is_number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
        require(is_number and 0 < epsilon < 1, f"epsilon = {epsilon!r}", "a number above 0 and below 1")
        self.hidden_size, self.kind, self.epsilon, self.zero_centered = int(hidden_size), kind, epsilon, zero_centered
        bias = kind == "layernorm" if bias is None else bias
        super().__init__(group, norm_specs(self.hidden_size, bias, zero_centered, name), dtype, 0, name)

    def forward(self, x: Array, *, rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y (..., D), a new array, and what backward needs (None if not save). x itself may change.

        rows: x is this rank's rows. One that overflows becomes NaN then: other ranks would wait for one that raises.
        """
        y_ND, kept = norm_forward(self.rows(x, self.hidden_size), self.own["weight"], self.own.get("bias"), self.kind,
                                  self.epsilon, self.zero_centered)
        if overflows(kept[1]):
            if rows is None:
                raise NormOverflow(overflow_text(self.name or "norm", kept[1], x.dtype))
            y_ND[kept[1][:, 0] == 0] = np.nan
        return y_ND.reshape(x.shape), ((self, kept) if save else None)

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx (..., D) of dy (..., D), and {name: gradient}; out: an earlier backward's gradients, used again."""
        (kept,) = require_saved(saved, self)
        dy_ND, gradients = self.rows(dy, self.hidden_size, "dy", len(kept[0])), self.gradients(out)
        if self.group.reproducible:             # the gradients' tree does not know which rank has which rows
            from .norm_sums import backward_of_all_rows
            return backward_of_all_rows(self, dy_ND, kept, gradients).reshape(dy.shape), gradients
        dx_ND, _, _ = norm_backward(dy_ND, kept, dw_out=gradients[join(self.name, "weight")],
                                    db_out=gradients.get(join(self.name, "bias")))
        return dx_ND.reshape(dy.shape), gradients

    def collectives(self, tokens: int = 0) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do: two empty Counters."""
        return Counter(), Counter()


def hidden_norm(group: TensorParallelGroup, config: DecoderConfig, dtype: str, name: str) -> Norm:
    """Return a norm over the hidden features of a decoder."""
    return Norm(group, config.hidden_size, config.normalization, config.norm_epsilon, config.has_norm_bias,
                config.zero_centered_gamma, dtype=dtype, name=name)
