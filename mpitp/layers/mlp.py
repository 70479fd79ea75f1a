"""The feed-forward block of a transformer, split over the ranks.

Dimension key: N rows (tokens), D hidden, F feed-forward; p marks an axis split over the ranks, b the part of it
in one block.
"""
from collections import Counter

from ..comm.ledger import Collective
from ..errors import require, require_positive
from ..ops.activation import ACTIVATIONS, activation_backward, activation_forward, gated_backward, gated_forward
from ..ops.linear import add_bias, bias_backward, linear_backward, linear_forward, linear_weight_backward, product
from ..sharding.parameters import ParameterSpec
from .base import ParallelLayer, cut, join, require_saved
from .mappings import (Later, copy_to_ranks_backward, copy_to_ranks_forward, reduce_from_ranks_backward,
                       reduce_from_ranks_forward)


class ParallelMLP(ParallelLayer):
    """y = act(x U^T + b_u) V^T + b_v, the up projection U split by rows, the down projection V by columns.

    gated: y = (act(x G^T + b_g) * (x U^T + b_u)) V^T + b_v (Shazeer, arXiv 2002.05202), the gate G split as U.

    Rank p holds features p of the middle, so that the activation needs no other rank; only the partial results of
    V are added up.

    Parameters
    ----------
    group : TensorParallelGroup
    hidden_size, ffn_hidden_size : D and F of the whole block, any on any number of ranks; F defaults to 4 D
    activation : "gelu_tanh", "gelu", "silu", "relu" or "identity"
    gated, bias : see the equations
    dtype : "float32" or "float64"
    seed : of the initial weights N(0, 1/in), the same for any number of ranks; None for zeros
    init_std, output_init_std : of the initial weights of up and gate, and of down, in place of in^-0.5
    name : prefix of the parameters' names: "up.weight" [F, D], "gate.weight" [F, D], "down.weight" [D, F],
        "up.bias" [F], "gate.bias" [F], "down.bias" [D]

    Notes
    -----
    Collectives, N = tokens: forward one all-reduce of N x D (g), backward one of N x D (f, which up and gate share);
    2 (P-1)/P N D itemsize bytes a rank each (Megatron-LM, arXiv 1909.08053, section 3).
    Raises InputError for sizes that are not positive, an unknown dtype or activation, an x of another size, dtype or
    device.
    """

    def __init__(self, group, hidden_size, ffn_hidden_size=None, activation="gelu_tanh", gated=False, bias=True, *,
                 dtype="float32", seed=0, init_std=None, output_init_std=None, name=""):
        require_positive(hidden_size=hidden_size)
        ffn_hidden_size = 4 * int(hidden_size) if ffn_hidden_size is None else ffn_hidden_size
        require_positive(ffn_hidden_size=ffn_hidden_size)
        known = isinstance(activation, str) and activation in ACTIVATIONS
        require(known, f"activation {activation!r}", f"one of {', '.join(ACTIVATIONS)}")
        D, F = int(hidden_size), int(ffn_hidden_size)           # NumPy's integers would overflow
        specs, in_std = [], D ** -0.5 if init_std is None else init_std
        for part in ("up", "gate") if gated else ("up",):
            specs.append(ParameterSpec(join(name, f"{part}.weight"), (F, D), 0, in_std))
            if bias:
                specs.append(ParameterSpec(join(name, f"{part}.bias"), (F,), 0, decay=False))
        specs.append(ParameterSpec(join(name, "down.weight"), (D, F), 1,
                                   F ** -0.5 if output_init_std is None else output_init_std))
        if bias:
            specs.append(ParameterSpec(join(name, "down.bias"), (D,), None, decay=False))
        super().__init__(group, specs, dtype, seed, name)
        self.hidden_size, self.ffn_hidden_size, self.activation, self.gated = D, F, activation, gated
        self.partition = group.partition(F)

    def forward(self, x, *, saved=True):
        """x (..., D), the same on every rank -> y (..., D), complete; and what backward needs (None if not saved).

        What backward needs includes x itself, not a copy: do not change x until then.
        """
        x_ND = copy_to_ranks_forward(self.rows(x, self.hidden_size))
        kept = {} if saved else None
        y_ND = reduce_from_ranks_forward(self.partial_forward(x_ND, kept), self.partition, self.group, x_ND.shape,
                                         self.dtype)
        self.add_bias(y_ND)
        return y_ND.reshape(x.shape), ((x_ND, kept) if saved else None)

    def partial_forward(self, x_ND, kept):
        """The function of a block that gives its summand of y (N, D). What backward needs goes to `kept`, or None."""
        down_DFp = self.parameter("down.weight")

        def project(part, block):
            """x times this block of a projection, and the bias that is still to be added."""
            w_FpD, b_Fp = self.parameter(f"{part}.weight"), self.parameter(f"{part}.bias")
            h_NFb, _ = linear_forward(x_ND, cut(w_FpD, block.local))
            return h_NFb, (None if b_Fp is None else cut(b_Fp, block.local))

        def partial(block):
            h_NFb, b_Fb = project("gate" if self.gated else "up", block)
            if self.gated:
                up_NFb, up_b_Fb = project("up", block)
                a_NFb, of_activation = gated_forward(self.activation, h_NFb, up_NFb, b_Fb, up_b_Fb, kept is not None)
            elif kept is not None:                          # the derivative takes the place of h
                a_NFb, of_activation = activation_forward(self.activation, h_NFb, derivative=h_NFb, bias=b_Fb)
            else:
                a_NFb, of_activation = activation_forward(self.activation, h_NFb, out=h_NFb, bias=b_Fb)
            if kept is not None:
                kept[block.index] = a_NFb, of_activation
            y_ND, _ = linear_forward(a_NFb, cut(down_DFp, block.local, axis=1), dtype=self.leaf_dtype)
            return y_ND

        return partial

    def add_bias(self, y_ND):
        """y += b_v, on every rank, but after the sum: once."""
        add_bias(y_ND, self.parameter("down.bias"))

    def backward(self, dy, saved, *, out=None):
        """dy (..., D), complete -> dx (..., D), complete, and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        require_saved(saved)
        x_ND, kept = saved
        dy_ND = reduce_from_ranks_backward(self.rows(dy, self.hidden_size, "dy", len(x_ND)))
        gradients = self.gradients(out)
        later = Later(self.group)
        dx_ND = copy_to_ranks_backward(self.partial_backward(dy_ND, x_ND, kept, gradients, later), self.partition,
                                       self.group, x_ND.shape, self.dtype, later)
        return dx_ND.reshape(dy.shape), gradients

    def partial_backward(self, dy_ND, x_ND, kept, gradients, later):
        """The function of a block that gives its summand of dx (N, D) and leaves the block's gradients."""
        if self.parameter("down.bias") is not None:
            bias_backward(dy_ND, out=gradients[join(self.name, "down.bias")])   # dy is complete: so is this

        def project_backward(part, dh_NFb, block, dx_ND=None):
            """dx of one projection, added to dx_ND if given; its weight and bias gradients go where they belong."""
            if self.parameter(f"{part}.bias") is not None:
                bias_backward(dh_NFb, out=cut(gradients[join(self.name, f"{part}.bias")], block.local))
            w_FbD = cut(self.parameter(f"{part}.weight"), block.local)
            dw_FbD = cut(gradients[join(self.name, f"{part}.weight")], block.local)
            later.append(lambda: linear_weight_backward(dh_NFb, x_ND, out=dw_FbD))
            return product(dh_NFb, w_FbD, dx_ND, self.leaf_dtype, add=dx_ND is not None)

        def partial(block):
            a_NFb, of_activation = kept[block.index]
            down_DFb = cut(self.parameter("down.weight"), block.local, axis=1)
            ddown_DFb = cut(gradients[join(self.name, "down.weight")], block.local, axis=1)
            da_NFb, _ = linear_backward(dy_ND, (a_NFb, down_DFb), dw_out=ddown_DFb)
            if not self.gated:
                return project_backward("up", activation_backward(da_NFb, of_activation, out=da_NFb), block)
            dh_NFb, dup_NFb = gated_backward(da_NFb, of_activation)
            return project_backward("gate", dh_NFb, block, project_backward("up", dup_NFb, block))

        return partial

    def collectives(self, tokens):
        """The closed form: (forward, backward), each a Counter of logical data collectives."""
        one = {Collective("all_reduce", tokens * self.hidden_size, self.dtype.name): 1}
        return Counter(one), Counter(one)
