"""The two parallel linears: y = x W^T + b with W [out, in] split by rows or by columns.

Dimension key: N rows (tokens), I in features, O out features; p marks an axis split over the ranks, b the part
of it in one block.
"""
from collections import Counter
from typing import Any

from ..arrays import Array
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..comm.sums import Sum
from ..errors import require_positive
from ..ops.linear import add_bias, bias_backward
from ..sharding.partition import Block
from ..sharding.specs import column_parallel_specs, join, row_parallel_specs
from .base import ParallelLayer, Weights, require_saved
from .gather import (gather_from_ranks_backward, gather_from_ranks_forward, scatter_to_ranks_backward,
                     scatter_to_ranks_forward)
from .products import (column_parallel_backward, column_parallel_forward, columns_of, copy_to_ranks_backward,
                       copy_to_ranks_forward, reduce_from_ranks_backward, reduce_from_ranks_forward,
                       row_parallel_backward, row_parallel_forward, rows_of)


class ColumnParallelLinear(ParallelLayer):
    """y = x W^T + b, W and b split by out features: rank p computes columns p of y from all of x.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    in_features, out_features : int
        Sizes of the whole layer; any, on any number of ranks.
    bias : bool
        Whether there is a b, split like the rows of W.
    gather_output : bool
        Give y whole on every rank (one all-gather) instead of this rank's columns.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights N(0, 1/in), the same for any number of ranks; None for zeros.
    init_std : float, optional
        Of the initial weights, in place of in^-0.5.
    tied_to : layer, optional
        Its "weight" [out, in], split by rows, stands in for an own one: a head tied to an embedding.
    name : str
        Prefix of the parameters' names, "weight" and "bias".

    Raises
    ------
    InputError
        For sizes that are not positive, an unknown dtype.

    Notes
    -----
    f before, nothing after (Megatron-LM, arXiv 1909.08053, section 3). Collectives, N = tokens: forward none
    (gather_output: one all-gather of N x out), backward one all-reduce of N x in.
    """

    def __init__(self, group: TensorParallelGroup, in_features: int, out_features: int, bias: bool = True,
                 gather_output: bool = False, *, dtype: str = "float32", seed: int | None = 0,
                 init_std: float | None = None, tied_to: ParallelLayer | None = None, name: str = ""):
        require_positive(in_features=in_features, out_features=out_features)
        in_features, out_features = int(in_features), int(out_features)         # NumPy's would overflow
        self.weight_name = join(tied_to.name if tied_to else name, "weight")
        specs = column_parallel_specs(out_features, in_features, bias, init_std, name)
        super().__init__(group, specs[1:] if tied_to else specs, dtype, seed, name)
        if tied_to:
            self.specs[self.weight_name] = tied_to.specs[self.weight_name]
            self.weights = Weights(self.weights | {self.weight_name: tied_to.weights[self.weight_name]})
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.set_partition(group.partition(out_features))
        self.local_features = self.partition.lengths[group.rank]

    def forward(self, x: Array, *, rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y (..., out p) of x (..., in), or (..., out) with gather_output; and what backward needs.

        What backward needs is x itself, not a copy: do not change x until then. save=False: None in its place.
        rows: x is this rank's rows, and y (B, S, out p) has all of them; see Rows.
        """
        x_NI = self.rows(copy_to_ranks_forward(x, rows), self.in_features)                          # f
        y_NOp = self.group.xp.empty((len(x_NI), self.local_features), self.dtype)
        for _ in self.group.each(self.block_forward, self.own_blocks, x_NI, y_NOp):
            pass                                            # each block writes its columns of y
        y = gather_from_ranks_forward(y_NOp, self.partition, self.group) if self.gather_output else y_NOp
        shape = x.shape[:-1] if rows is None else rows.shape
        return y.reshape(*shape, y.shape[-1]), ((self, rows.kept(x, x_NI) if rows else x_NI, rows) if save else None)

    def block_forward(self, block: Block, x_NI: Array, y_NOp: Array) -> None:
        """Write a block's columns of y."""
        y_NOb = column_parallel_forward(x_NI, self.weights[self.weight_name], block.local,
                                        out=columns_of(y_NOp, block.local))
        add_bias(y_NOb, rows_of(self.own.get("bias"), block.local))

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx (..., in), complete, of dy (shaped as y); and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        (x_NI, rows), gradients = require_saved(saved, self), self.gradients(out)
        x_NI = rows.again(x_NI) if rows else x_NI
        if self.gather_output:
            dy_NO = self.rows(dy, self.out_features, "dy", len(x_NI))
            dy_NOp = gather_from_ranks_backward(dy_NO, self.partition, self.group)
        else:
            dy_NOp = self.rows(dy, self.local_features, "dy", len(x_NI))
        total = self.group.sum(self.partition, x_NI.shape, self.dtype)
        for block, dx_NI in self.group.each(self.block_backward, self.own_blocks, dy_NOp, x_NI, gradients, total):
            total.add(block, dx_NI)
        dx_NI = copy_to_ranks_backward(total, rows)                                                 # f*
        return (dx_NI.reshape(*dy.shape[:-1], self.in_features) if rows is None else dx_NI), gradients

    def block_backward(self, block: Block, dy_NOp: Array, x_NI: Array, gradients: dict[str, Array],
                       total: Sum) -> Array:
        """Return a block's summand of dx (N, I), and write the gradients of its weight and bias."""
        dy_NOb = columns_of(dy_NOp, block.local)
        if "bias" in self.own:
            bias_backward(dy_NOb, out=rows_of(gradients[join(self.name, "bias")], block.local))
        return column_parallel_backward(dy_NOb, x_NI, self.weights[self.weight_name], block.local,
                                        gradients[self.weight_name], total)

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        gathered = {Collective("all_gather", tokens * self.out_features, self.dtype.name): 1}
        return (Counter(gathered if self.gather_output else {}),
                Counter({Collective("all_reduce", tokens * self.in_features, self.dtype.name): 1}))


class RowParallelLinear(ParallelLayer):
    """y = sum over p of x_p W_p^T, + b: W split by in features; rank p multiplies its columns of x by its columns of W.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    in_features, out_features : int
        Sizes of the whole layer; any, on any number of ranks.
    bias : bool
        Whether there is a b; replicated, and added once, after the sum.
    input_is_parallel : bool
        x is this rank's columns already, (..., in p), as a ColumnParallelLinear leaves them; False: x is whole on every
        rank, and each takes its columns.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights N(0, 1/in), the same for any number of ranks; None for zeros.
    name : str
        Prefix of the parameters' names, "weight" and "bias".

    Raises
    ------
    InputError
        As ColumnParallelLinear.

    Notes
    -----
    Nothing before, g after (Megatron-LM, arXiv 1909.08053, section 3). Collectives, N = tokens: forward one all-reduce
    of N x out, backward none (input_is_parallel=False: one all-gather of N x in).
    """

    def __init__(self, group: TensorParallelGroup, in_features: int, out_features: int, bias: bool = True,
                 input_is_parallel: bool = True, *, dtype: str = "float32", seed: int | None = 0, name: str = ""):
        require_positive(in_features=in_features, out_features=out_features)
        in_features, out_features = int(in_features), int(out_features)         # NumPy's would overflow
        super().__init__(group, row_parallel_specs(out_features, in_features, bias, None, name), dtype, seed, name)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, input_is_parallel
        self.set_partition(group.partition(in_features))
        self.local_features = self.partition.lengths[group.rank]

    def forward(self, x: Array, *, rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y (..., out), complete, of x (..., in p), or (..., in) if not input_is_parallel; and x for backward.

        What backward needs is x itself, not a copy: do not change x until then. save=False: None in its place.
        rows: x has the rows of all ranks, and y (n, out) this rank's; see Rows.
        """
        if self.input_is_parallel:
            x_NIp = self.rows(x, self.local_features)
        else:
            x_NIp = scatter_to_ranks_forward(self.rows(x, self.in_features), self.partition, self.group)
        total = self.group.sum(self.partition, (len(x_NIp), self.out_features), self.dtype)
        for block, y_NO in self.group.each(self.block_forward, self.own_blocks, x_NIp, total):
            total.add(block, y_NO)
        y_NO = reduce_from_ranks_forward(total, rows)                                               # g
        add_bias(y_NO, self.own.get("bias"))                # on every rank, but after the sum: once
        y = y_NO.reshape(*x.shape[:-1], self.out_features) if rows is None else y_NO
        return y, ((self, x_NIp, x.shape, rows) if save else None)

    def block_forward(self, block: Block, x_NIp: Array, total: Sum) -> Array:
        """Return a block's summand of y (N, O)."""
        return row_parallel_forward(columns_of(x_NIp, block.local), self.own["weight"], block.local, total)

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx (shaped as x) of dy (..., out), and {name: gradient} of this rank's slices.

        out : as ColumnParallelLinear's
        """
        (x_NIp, shape, rows), gradients = require_saved(saved, self), self.gradients(out)
        dy_NO = self.rows(reduce_from_ranks_backward(dy, rows), self.out_features, "dy", len(x_NIp))            # g*
        if "bias" in self.own:
            bias_backward(dy_NO, out=gradients[join(self.name, "bias")])        # dy is complete: so is this
        dx_NIp = self.group.xp.empty_like(x_NIp)
        for block, dx_NIb in self.group.each(self.block_backward, self.own_blocks, dy_NO, x_NIp, gradients):
            dx_NIp[:, block.local] = dx_NIb
        dx = dx_NIp if self.input_is_parallel else scatter_to_ranks_backward(dx_NIp, self.partition, self.group)
        return dx.reshape(shape), gradients

    def block_backward(self, block: Block, dy_NO: Array, x_NIp: Array, gradients: dict[str, Array]) -> Array:
        """Return a block's columns of dx, and write the gradient of its weight."""
        return row_parallel_backward(dy_NO, columns_of(x_NIp, block.local), self.own["weight"], block.local,
                                     gradients[join(self.name, "weight")])

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        gathered = {Collective("all_gather", tokens * self.in_features, self.dtype.name): 1}
        return (Counter({Collective("all_reduce", tokens * self.out_features, self.dtype.name): 1}),
                Counter({} if self.input_is_parallel else gathered))
