"""The two parallel linears: y = x W^T + b with W [out, in] split by rows or by columns.

Dimension key: N rows (tokens), I in features, O out features; p marks an axis split over the ranks, b the part
of it in one block.
"""
from collections import Counter

from ..comm.ledger import Collective
from ..errors import require_positive
from ..ops.linear import add_bias, bias_backward, linear_backward, linear_forward, linear_weight_backward, product
from ..sharding.parameters import ParameterSpec
from .base import ParallelLayer, cut, join, require_saved
from .mappings import (Later, copy_to_ranks_backward, copy_to_ranks_forward, gather_from_ranks_backward,
                       gather_from_ranks_forward, reduce_from_ranks_backward, reduce_from_ranks_forward,
                       scatter_to_ranks_backward, scatter_to_ranks_forward)


class ColumnParallelLinear(ParallelLayer):
    """y = x W^T + b, W and b split by out features: rank p computes columns p of y from all of x.

    Parameters
    ----------
    group : TensorParallelGroup
    in_features, out_features : sizes of the whole layer; any, on any number of ranks
    bias : whether there is a b, split like the rows of W
    gather_output : give y whole on every rank (one all-gather) instead of this rank's columns
    dtype : "float32" or "float64"
    seed : of the initial weights N(0, 1/in), the same for any number of ranks; None for zeros
    init_std : of the initial weights, in place of in^-0.5
    tied_to : a layer whose "weight" [out, in], split by rows, stands in for an own one: a head tied to an embedding
    name : prefix of the parameters' names, "weight" and "bias"

    Notes
    -----
    f before, nothing after (Megatron-LM, arXiv 1909.08053, section 3). Collectives, N = tokens: forward none
    (gather_output: one all-gather of N x out), backward one all-reduce of N x in.
    Raises InputError for sizes that are not positive, an unknown dtype, an x of another size, dtype or device.
    """

    def __init__(self, group, in_features, out_features, bias=True, gather_output=False, *, dtype="float32", seed=0,
                 init_std=None, tied_to=None, name=""):
        require_positive(in_features=in_features, out_features=out_features)
        in_features, out_features = int(in_features), int(out_features)         # NumPy's would overflow
        std = in_features ** -0.5 if init_std is None else init_std
        specs = [] if tied_to else [ParameterSpec(join(name, "weight"), (out_features, in_features), 0, std)]
        if bias:
            specs.append(ParameterSpec(join(name, "bias"), (out_features,), 0, decay=False))
        super().__init__(group, specs, dtype, seed, name)
        self.weight_name = join(tied_to.name if tied_to else name, "weight")
        if tied_to:
            self.specs[self.weight_name] = tied_to.specs[self.weight_name]
            self.weights[self.weight_name] = tied_to.weights[self.weight_name]
        self.in_features, self.out_features, self.gather_output = in_features, out_features, gather_output
        self.partition = group.partition(out_features)
        self.local_features = self.partition.lengths[group.rank]

    def forward(self, x, *, saved=True):
        """x (..., in) -> y (..., out p), or (..., out) with gather_output; and what backward needs.

        What backward needs is x itself, not a copy: do not change x until then. None with saved=False.
        """
        x_NI = copy_to_ranks_forward(self.rows(x, self.in_features))
        w_OpI, b_Op = self.weights[self.weight_name], self.parameter("bias")
        y_NOp = self.group.xp.empty((len(x_NI), self.local_features), self.dtype)

        def columns(block):
            y_NOb, _ = linear_forward(x_NI, cut(w_OpI, block.local), out=cut(y_NOp, block.local, axis=1))
            add_bias(y_NOb, None if b_Op is None else cut(b_Op, block.local))

        for _ in self.group.each_block(columns, self.partition):
            pass
        y = y_NOp
        if self.gather_output:
            y = gather_from_ranks_forward(y_NOp, self.partition, self.group)
        return y.reshape(*x.shape[:-1], y.shape[-1]), (x_NI if saved else None)

    def backward(self, dy, saved, *, out=None):
        """dy (shaped as y) -> dx (..., in), complete, and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        require_saved(saved)
        x_NI, w_OpI, gradients = saved, self.weights[self.weight_name], self.gradients(out)
        if self.gather_output:
            dy_NO = self.rows(dy, self.out_features, "dy", len(x_NI))
            dy_NOp = gather_from_ranks_backward(dy_NO, self.partition, self.group)
        else:
            dy_NOp = self.rows(dy, self.local_features, "dy", len(x_NI))
        dw_OpI, db_Op = gradients[self.weight_name], gradients.get(join(self.name, "bias"))
        later = Later(self.group)

        def partial(block):
            dy_NOb = cut(dy_NOp, block.local, axis=1)
            if db_Op is not None:
                bias_backward(dy_NOb, out=cut(db_Op, block.local))
            later.append(lambda: linear_weight_backward(dy_NOb, x_NI, out=cut(dw_OpI, block.local)))
            return product(dy_NOb, cut(w_OpI, block.local), dtype=self.leaf_dtype)

        dx_NI = copy_to_ranks_backward(partial, self.partition, self.group, x_NI.shape, self.dtype, later)
        return dx_NI.reshape(*dy.shape[:-1], self.in_features), gradients

    def collectives(self, tokens):
        """The closed form: (forward, backward), each a Counter of logical data collectives."""
        gathered = {Collective("all_gather", tokens * self.out_features, self.dtype.name): 1}
        return (Counter(gathered if self.gather_output else {}),
                Counter({Collective("all_reduce", tokens * self.in_features, self.dtype.name): 1}))


class RowParallelLinear(ParallelLayer):
    """y = sum over p of x_p W_p^T, + b: W split by in features; rank p multiplies its columns of x by its columns of W.

    Parameters
    ----------
    group, in_features, out_features, dtype, seed, name : as ColumnParallelLinear's
    bias : whether there is a b; replicated, and added once, after the sum
    input_is_parallel : x is this rank's columns already, (..., in p), as a ColumnParallelLinear leaves them;
        False: x is whole on every rank, and each takes its columns

    Notes
    -----
    Nothing before, g after (Megatron-LM, arXiv 1909.08053, section 3). Collectives, N = tokens: forward one all-reduce
    of N x out, backward none (input_is_parallel=False: one all-gather of N x in).
    Raises InputError as ColumnParallelLinear.
    """

    def __init__(self, group, in_features, out_features, bias=True, input_is_parallel=True, *, dtype="float32", seed=0,
                 name=""):
        require_positive(in_features=in_features, out_features=out_features)
        in_features, out_features = int(in_features), int(out_features)         # NumPy's would overflow
        specs = [ParameterSpec(join(name, "weight"), (out_features, in_features), 1, in_features ** -0.5)]
        if bias:
            specs.append(ParameterSpec(join(name, "bias"), (out_features,), None, decay=False))
        super().__init__(group, specs, dtype, seed, name)
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, input_is_parallel
        self.partition = group.partition(in_features)
        self.local_features = self.partition.lengths[group.rank]

    def forward(self, x, *, saved=True):
        """x (..., in p), or (..., in) with input_is_parallel=False -> y (..., out), complete; and what backward needs.

        As ColumnParallelLinear's: x itself, or None.
        """
        if self.input_is_parallel:
            x_NIp = self.rows(x, self.local_features)
        else:
            x_NIp = scatter_to_ranks_forward(self.rows(x, self.in_features), self.partition, self.group)
        w_OIp, b_O = self.parameter("weight"), self.parameter("bias")

        def partial(block):
            y_NO, _ = linear_forward(cut(x_NIp, block.local, axis=1), cut(w_OIp, block.local, axis=1),
                                     dtype=self.leaf_dtype)
            return y_NO

        shape = len(x_NIp), self.out_features
        y_NO = reduce_from_ranks_forward(partial, self.partition, self.group, shape, self.dtype)
        add_bias(y_NO, b_O)                                 # on every rank, but after the sum: once
        return y_NO.reshape(*x.shape[:-1], self.out_features), (x_NIp if saved else None)

    def backward(self, dy, saved, *, out=None):
        """dy (..., out) -> dx (shaped as x) and {name: gradient} of this rank's slices.

        out : as ColumnParallelLinear's
        """
        require_saved(saved)
        x_NIp, w_OIp, gradients = saved, self.parameter("weight"), self.gradients(out)
        dy_NO = reduce_from_ranks_backward(self.rows(dy, self.out_features, "dy", len(x_NIp)))
        dw_OIp, db_O = gradients[join(self.name, "weight")], gradients.get(join(self.name, "bias"))
        dx_NIp = self.group.xp.empty_like(x_NIp)
        if db_O is not None:
            bias_backward(dy_NO, out=db_O)                  # dy is complete: so is the gradient

        def columns(block):
            dx_NIb, _ = linear_backward(dy_NO, (cut(x_NIp, block.local, axis=1), cut(w_OIp, block.local, axis=1)),
                                        dw_out=cut(dw_OIp, block.local, axis=1))
            dx_NIp[:, block.local] = dx_NIb

        for _ in self.group.each_block(columns, self.partition):
            pass
        dx = dx_NIp
        if not self.input_is_parallel:
            dx = scatter_to_ranks_backward(dx_NIp, self.partition, self.group)
        return dx.reshape(*dy.shape[:-1], dx.shape[-1]), gradients

    def collectives(self, tokens):
        """The closed form: (forward, backward), each a Counter of logical data collectives."""
        gathered = {Collective("all_gather", tokens * self.in_features, self.dtype.name): 1}
        return (Counter({Collective("all_reduce", tokens * self.out_features, self.dtype.name): 1}),
                Counter({} if self.input_is_parallel else gathered))
