"""The feed-forward block of a transformer, split over the ranks.

Dimension key: N rows (tokens), D hidden, F feed-forward; p marks an axis split over the ranks, b the part of it
in one block.
"""
from collections import Counter
from typing import Any

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..comm.sums import Sum
from ..errors import one_of, require_positive
from ..ops.activation import ACTIVATIONS, activation_backward, activation_forward, gated_backward, gated_forward
from ..ops.linear import add_bias, bias_backward
from ..sharding.partition import Block
from ..sharding.specs import join, mlp_specs
from .base import ParallelLayer, require_saved
from .products import (column_parallel_backward, column_parallel_forward, copy_to_ranks_backward, copy_to_ranks_forward,
                       reduce_from_ranks_backward, reduce_from_ranks_forward, row_parallel_backward,
                       row_parallel_forward, rows_of, two_column_parallel_forward)


class ParallelMLP(ParallelLayer):
    """y = act(x U^T + b_u) V^T + b_v, the up projection U split by rows, the down projection V by columns.

    gated: y = (act(x G^T + b_g) * (x U^T + b_u)) V^T + b_v (Shazeer, arXiv 2002.05202), the gate G split as U.

    Rank p holds some of the F features of the middle, and all that leads to them, so that the activation needs no
    other rank; only the partial results of V are added up.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    hidden_size, ffn_hidden_size : int
        D and F of the whole block, any on any number of ranks; F defaults to 4 D.
    activation : str
        "gelu_tanh", "gelu", "silu", "relu", "relu2" (its square) or "identity".
    gated, bias : bool
        See the equations.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights N(0, 1/in), the same for any number of ranks; None for zeros.
    init_std, output_init_std : float, optional
        Of the initial weights of up and gate, and of down, in place of in^-0.5.
    name : str
        Prefix of the parameters' names: "up.weight" [F, D], "gate.weight" [F, D], "down.weight" [D, F],
        "up.bias" [F], "gate.bias" [F], "down.bias" [D].

    Raises
    ------
    InputError
        For sizes that are not positive, an unknown dtype or activation.

    Notes
    -----
    Collectives, N = tokens: forward one all-reduce of N x D (g), backward one of N x D (f, which up and gate share);
    2 (P-1)/P N D itemsize bytes a rank each (Megatron-LM, arXiv 1909.08053, section 3).
    """

    def __init__(self, group: TensorParallelGroup, hidden_size: int, ffn_hidden_size: int | None = None,
                 activation: str = "gelu_tanh", gated: bool = False, bias: bool = True, *, dtype: str = "float32",
                 seed: int | None = 0, init_std: float | None = None, output_init_std: float | None = None,
                 name: str = ""):
        require_positive(hidden_size=hidden_size)
        ffn_hidden_size = 4 * int(hidden_size) if ffn_hidden_size is None else ffn_hidden_size
        require_positive(ffn_hidden_size=ffn_hidden_size)
        one_of("activation", activation, tuple(ACTIVATIONS))
        D, F = int(hidden_size), int(ffn_hidden_size)           # NumPy's integers would overflow
        super().__init__(group, mlp_specs(D, F, gated, bias, init_std, output_init_std, name), dtype, seed, name)
        self.hidden_size, self.ffn_hidden_size, self.activation, self.gated = D, F, activation, gated
        self.set_partition(group.partition(F))

    def forward(self, x: Array, *, rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y of x (..., D), both complete, or with `rows` both this rank's (see Rows); and what backward needs.

        What backward needs includes x itself, not a copy: do not change x until then. save=False: None in its place.
        """
        x_ND = self.rows(copy_to_ranks_forward(x, rows), self.hidden_size)                          # f
        total, kept = self.group.sum(self.partition, x_ND.shape, self.dtype), {}
        for block, (y_ND, of_block) in self.group.each(self.block_forward, self.own_blocks, x_ND, total, save):
            total.add(block, y_ND)
            kept[block.index] = of_block
        y_ND = reduce_from_ranks_forward(total, rows)                                               # g
        self.add_bias(y_ND)
        return y_ND.reshape(x.shape), ((self, rows.kept(x, x_ND) if rows else x_ND, kept, rows) if save else None)

    def block_forward(self, block: Block, x_ND: Array, total: Sum | None, save: bool) -> tuple[Array, Any]:
        """Return a block's summand of y (N, D): product, activation, product; and what backward needs."""
        own, part = self.own, block.local
        of_activation: Any
        b_Fb = rows_of(own.get("up.bias"), part)
        if self.gated:
            gate_NFb, up_NFb = two_column_parallel_forward(x_ND, own["gate.weight"], own["up.weight"], part)
            gate_b_Fb = rows_of(own.get("gate.bias"), part)
            a_NFb, of_activation = gated_forward(self.activation, gate_NFb, up_NFb, gate_b_Fb, b_Fb, save)
        else:                                               # act'(h), which backward needs, overwrites h
            up_NFb = column_parallel_forward(x_ND, own["up.weight"], part)
            a_out, slope_out = (None, up_NFb) if save else (up_NFb, None)
            a_NFb, of_activation = activation_forward(self.activation, up_NFb, a_out, slope_out, b_Fb)
        y_ND = row_parallel_forward(a_NFb, own["down.weight"], part, total)
        return y_ND, ((a_NFb, of_activation) if save else None)

    def add_bias(self, y_ND: Array) -> None:
        """Add b_v on every rank, after the sum, so that it counts once."""
        add_bias(y_ND, self.own.get("down.bias"))

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx (..., D), complete, of dy (..., D), complete; and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        x_ND, kept, rows = require_saved(saved, self)
        x_ND = rows.again(x_ND) if rows else x_ND
        dy_ND = self.rows(reduce_from_ranks_backward(dy, rows), self.hidden_size, "dy", len(x_ND))  # g*
        gradients = self.gradients(out)
        self.bias_backward(dy_ND, gradients)
        total = self.group.sum(self.partition, x_ND.shape, self.dtype)
        for block, dx_ND in self.group.each(self.block_backward, self.own_blocks, dy_ND, x_ND, kept, gradients, total):
            total.add(block, dx_ND)
        dx_ND = copy_to_ranks_backward(total, rows)                                                 # f*
        return dx_ND.reshape(dy.shape), gradients

    def block_backward(self, block: Block, dy_ND: Array, x_ND: Array, kept: dict, gradients: dict[str, Array],
                       total: Sum) -> Array:
        """Return a block's summand of dx (N, D), and write the gradients of its weights and biases."""
        (a_NFb, of_activation), part = kept[block.index], block.local
        da_NFb = row_parallel_backward(dy_ND, a_NFb, self.own["down.weight"], part,
                                       gradients[join(self.name, "down.weight")])
        if not self.gated:
            dup_NFb = activation_backward(da_NFb, of_activation, out=da_NFb)
            return self.projection_backward("up", dup_NFb, x_ND, part, gradients, total)
        dgate_NFb, dup_NFb = gated_backward(da_NFb, of_activation)
        dx_ND = self.projection_backward("up", dup_NFb, x_ND, part, gradients, total)
        return self.projection_backward("gate", dgate_NFb, x_ND, part, gradients, total, dx_ND)

    def projection_backward(self, projection: str, dh_NFb: Array, x_ND: Array, part: slice,
                            gradients: dict[str, Array], total: Sum, dx_ND: Array | None = None) -> Array:
        """Return what up or gate adds to dx, added to dx_ND if given; write the gradients of its weight and bias."""
        if projection + ".bias" in self.own:
            bias_backward(dh_NFb, out=rows_of(gradients[join(self.name, projection + ".bias")], part))
        return column_parallel_backward(dh_NFb, x_ND, self.own[projection + ".weight"], part,
                                        gradients[join(self.name, projection + ".weight")], total, dx_ND)

    def bias_backward(self, dy_ND: Array, gradients: dict[str, Array]) -> None:
        """Write the gradient of b_v, which is complete on every rank, since dy is."""
        if "down.bias" in self.own:
            bias_backward(dy_ND, out=gradients[join(self.name, "down.bias")])

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        one = {Collective("all_reduce", tokens * self.hidden_size, self.dtype.name): 1}
        return Counter(one), Counter(one)
