"""Layer norm and RMS norm, replicated: every rank has all features of its rows.

Dimension key: N rows (tokens), D features.
"""
from collections import Counter

from ..errors import require, require_positive
from ..ops.norm import KINDS, norm_backward, norm_forward
from ..sharding.parameters import ParameterSpec
from .base import ParallelLayer, join, require_saved


class Norm(ParallelLayer):
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * w + b (layernorm), y = x / sqrt(mean(x^2) + epsilon) * w (rmsnorm).

    Parameters
    ----------
    group : TensorParallelGroup
    hidden_size : D
    kind : "layernorm" or "rmsnorm"
    epsilon : above 0
    bias : whether there is a b; None: layer norms have one, RMS norms none
    zero_centered : multiply by 1 + w, where w starts from 0 (otherwise from 1)
    dtype : "float32" or "float64"
    name : prefix of the parameters' names, "weight" and "bias"

    Notes
    -----
    No collectives: x and dy are the same on every rank, and so are y, dx and the gradients, which are complete.
    Sources: Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467.
    Raises InputError for a size or epsilon that is not positive, an unknown kind or dtype, an x of another size, dtype
    or device.
    """

    def __init__(self, group, hidden_size, kind="layernorm", epsilon=1e-5, bias=None, zero_centered=False, *,
                 dtype="float32", name=""):
        require_positive(hidden_size=hidden_size)
        require(kind in KINDS, f"norm kind {kind!r}", f"one of {', '.join(KINDS)}")
        is_number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
        require(is_number and 0 < epsilon < 1, f"epsilon = {epsilon!r}", "a number above 0 and below 1")
        bias = kind == "layernorm" if bias is None else bias
        shape, start = (int(hidden_size),), 0.0 if zero_centered else 1.0
        specs = [ParameterSpec(join(name, "weight"), shape, None, decay=False, init_value=start)]
        if bias:
            specs.append(ParameterSpec(join(name, "bias"), shape, None, decay=False))
        super().__init__(group, specs, dtype, 0, name)
        self.hidden_size, self.kind, self.epsilon, self.zero_centered = shape[0], kind, epsilon, zero_centered

    def forward(self, x, *, saved=True):
        """x (..., D) -> y (..., D), a new array, and what backward needs (None if not saved). x itself may change."""
        w_D, b_D = self.parameter("weight"), self.parameter("bias")
        y_ND, kept = norm_forward(self.rows(x, self.hidden_size), w_D, b_D, self.kind, self.epsilon, self.zero_centered)
        return y_ND.reshape(x.shape), (kept if saved else None)

    def backward(self, dy, saved, *, out=None):
        """dy (..., D) -> dx (..., D) and {name: gradient}; out: an earlier backward's gradients, used again."""
        require_saved(saved)
        dy_ND, gradients = self.rows(dy, self.hidden_size, "dy", len(saved[0])), self.gradients(out)
        dx_ND, _, _ = norm_backward(dy_ND, saved, dw_out=gradients[join(self.name, "weight")],
                                    db_out=gradients.get(join(self.name, "bias")))
        return dx_ND.reshape(dy.shape), gradients

    def collectives(self, tokens=0):
        """The closed form: (forward, backward), both empty."""
        return Counter(), Counter()
