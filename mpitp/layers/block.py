"""One block of a decoder: attention and feed-forward, their norms and residuals.

Dimension key: B sequences, S positions, N = B S rows (tokens), D hidden.
"""
from collections import Counter
from typing import Any, NamedTuple

from ..arrays import Array, scaled
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..config import DecoderConfig
from ..errors import require
from ..ops.activation import add_to
from ..ops.dropout import dropout_scale
from ..sharding.decoder_specs import norm_names, output_init_std
from ..sharding.specs import join
from .attention import ParallelAttention
from .base import require_saved
from .mlp import ParallelMLP
from .norm import hidden_norm
from .side_by_side import SideBySide


RECOMPUTED = (None, "block", "attention")


class BlockCall(NamedTuple):
    """What one forward of a block and its backward share: the mask, dropout's step, earlier keys and values, rows."""
    mask: Any
    step: int | None
    kv: Any
    rows: Any


class ParallelBlock(SideBySide):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x)); or one of the other orders that DecoderConfig names.

    Norms, residuals and dropout work on the complete x, in the same way on every rank.

    Parameters
    ----------
    group : TensorParallelGroup
        The ranks.
    config : DecoderConfig
        Sizes and choices.
    layer : int
        Which layer of the config this is, as windows and rotary positions may differ from layer to layer.
    dtype : str
        "float32" or "float64"; on a GPU "float16" and "bfloat16" too.
    seed : int or None
        Of the initial weights, the same for any number of ranks, and of dropout; None for zeros.
    name : str
        Prefix of the parameters' names.
    sequence_parallel : bool
        Norms, residuals and dropout work on this rank's rows: x and y are (n, D), and forward takes `rows` (see Rows).
    recompute : str or None
        What backward computes again instead of keeping it: "block" keeps the block's input alone, "attention"
        attention's input in place of queries, keys, values and heads; None keeps all.

    Raises
    ------
    InputError
        For an unknown dtype or recomputation, rows without sequence_parallel or none with it; forward and backward as
        ParallelAttention's and ParallelMLP's.

    Notes
    -----
    Collectives, N = tokens: those of ParallelAttention and ParallelMLP. parallel_residual: their partial results are
    added on each rank, so one all-reduce of N x D forward, and backward one of N x D where they share a norm, of
    2 x N x D where each has its own (Wang and Komatsuzaki, GPT-J, 2021). In sequence parallelism reduce-scatters and
    all-gathers take the place of all-reduces, and backward ends with one all-reduce of the gradients of all norms.
    """

    def __init__(self, group: TensorParallelGroup, config: DecoderConfig, layer: int = 0, *, dtype: str = "float32",
                 seed: int | None = 0, name: str = "", sequence_parallel: bool = False, recompute: str | None = None):
        require(recompute in RECOMPUTED, f"recompute {recompute!r}", "'block', 'attention' or None")
        self.config, self.seed = config, 0 if seed is None else seed
        self.sequence_parallel, self.recompute = bool(sequence_parallel), recompute
        common: dict[str, Any] = dict(dtype=dtype, seed=seed, init_std=config.init_method_std,
                                      output_init_std=output_init_std(config))
        kind: Any = ParallelAttention
        if config.attention(layer).norms_of != kind.norms_of:
            from .normed_attention import normed_attention as kind          # where it is used: few models have it
        self.attention = kind(group, config.attention(layer), name=join(name, "attention"), **common)
        self.mlp = ParallelMLP(group, config.hidden_size, config.ffn_size, config.activation, config.gated,
                               config.mlp_bias, name=join(name, "mlp"), **common)
        self.norms = {norm: hidden_norm(group, config, dtype, join(name, norm)) for norm in norm_names(config)}
        super().__init__(group, [self.attention, self.mlp, *self.norms.values()], dtype, name)
        # A parallel residual adds both branches in one sum: its block i is block i of the heads and of the features.
        self.set_partition(group.partition(group.blocks))

    def forward(self, x: Array, *, mask: Array | None = None, step: int | None = None, kv: Any = None,
                rows: Any = None, save: bool = True) -> tuple[Array, Any]:
        """Return y, shaped as x (..., S, D), the same on every rank; and what backward needs (None if not save).

        mask, step, kv, rows : as ParallelAttention's
        """
        if rows is not None or self.sequence_parallel and kv is None:
            from ..comm.rows import require_rows
            require(self.sequence_parallel, "rows without sequence_parallel", "both")
            require_rows(rows, self.group)
        call = BlockCall(mask, step, kv, rows)
        y, *of_parts = self.forward_parts(x, call, save and self.recompute != "block")
        kept = (x, None) if self.recompute == "block" else of_parts
        return y, ((self, *kept, call) if save else None)

    def forward_parts(self, x: Array, call: "BlockCall", save: bool) -> tuple[Array, Any, Any]:
        """Return y, and what backward needs of attention and of feed-forward."""
        if self.config.parallel_residual:
            return self.parallel_forward(x, call, save)
        x, first = self.branch_forward("attention", x, call, save)
        x, second = self.branch_forward("mlp", x, call, save)
        return x, first, second

    def backward(self, dy: Array, saved: Any, *, out: Any = None, norm_sums: Any = None) -> tuple[Array, dict]:
        """Return dx of dy (shaped as x), and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        norm_sums : NormSums of the caller, who adds up the norms' gradients of several blocks; None: done here
        """
        first, second, call = require_saved(saved, self)
        gradients, sums = self.gradients(out), norm_sums
        if self.recompute:
            from .recompute import parts_again
            first, second, call = parts_again(self, first, second, call)
        if call.rows is not None and sums is None:
            from .norm_sums import NormSums
            sums = NormSums(call.rows)
        if self.config.parallel_residual:
            dx = self.parallel_backward(dy, first, second, call, gradients, sums)
        else:
            dy = self.branch_backward("mlp", dy, second, gradients, sums)
            dx = self.branch_backward("attention", dy, first, gradients, sums)
        if sums is not norm_sums:
            sums.end(gradients)
        return dx, gradients

    # --- one after the other: x + f(x), twice ----------------------------------------------------------------

    def branch_forward(self, part: str, x: Array, call: "BlockCall", save: bool) -> tuple[Array, Any]:
        """Return x + f(x), f attention or feed-forward with the norms around it; and what backward needs."""
        h, of_norm = self.norm_forward(f"{part}_norm", x, call.rows, save)
        if part == "attention":
            again = save and self.recompute == "attention"
            y, of_branch = self.attention.forward(h, save=save and not again, **call._asdict())
            of_branch = h if again else of_branch
        else:
            y, of_branch = self.mlp.forward(h, rows=call.rows, save=save)
        scale = self.dropout_scale(f"{part}.dropout", x.shape, call)
        y = scaled(y, scale, out=y)
        if self.config.norm_placement == "after_residual":
            add_to(y, x)
            y, of_post_norm = self.norm_forward(f"{part}_post_norm", y, call.rows, save)
        else:
            y, of_post_norm = self.norm_forward(f"{part}_post_norm", y, call.rows, save)
            add_to(y, x)
        return y, (of_norm, of_branch, scale, of_post_norm)

    def branch_backward(self, part: str, dy: Array, saved: Any, gradients: dict[str, Array], sums: Any) -> Array:
        """Return dx of x + f(x), and write the gradients of the branch and its norms."""
        of_norm, of_branch, scale, of_post_norm = saved
        branch, more = getattr(self, part), {"norm_sums": sums} if part == "attention" else {}
        d_branch = self.norm_backward(f"{part}_post_norm", dy, of_post_norm, gradients, sums)
        d_residual = d_branch if self.config.norm_placement == "after_residual" else dy
        d_branch = scaled(d_branch, scale)
        dx, _ = branch.backward(d_branch, of_branch, out=self.gradients_of(branch, gradients), **more)
        dx = self.norm_backward(f"{part}_norm", dx, of_norm, gradients, sums)
        add_to(dx, d_residual)
        return dx

    # --- what both have ------------------------------------------------------------------------------------------

    def norm_forward(self, name: str, x: Array, rows: Any, save: bool) -> tuple[Array, Any]:
        """Return the norm of that name of x, or x itself where the block has none."""
        return self.norms[name].forward(x, rows=rows, save=save) if name in self.norms else (x, None)

    def norm_backward(self, name: str, dy: Array, saved: Any, gradients: dict[str, Array], sums: Any) -> Array:
        """Return dx of norm_forward, and write the gradients of the norm, or leave them to `sums`."""
        if name not in self.norms:
            return dy
        if sums is not None:
            return sums.backward(self.norms[name], dy, saved)
        return self.norms[name].backward(dy, saved, out=self.gradients_of(self.norms[name], gradients))[0]

    def dropout_scale(self, name: str, shape: tuple[int, ...], call: "BlockCall") -> Array | float | None:
        """Return what the sum is multiplied by: dropout's scales times the config's residual_multiplier; None for 1."""
        scale = hidden_dropout(self.group, self.seed, join(self.name, name), call.step, self.config.hidden_dropout,
                               shape, self.sum_dtype, call.rows)
        if self.config.residual_multiplier == 1:
            return scale
        return self.config.residual_multiplier * (1 if scale is None else scale)

    def collectives(self, tokens: int, gather_again: bool = False) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective.

        gather_again : as Rows has it, in sequence parallelism
        """
        if self.sequence_parallel or self.recompute:
            from .closed_forms import block_collectives
            return block_collectives(self, tokens, gather_again)
        if not self.config.parallel_residual:
            (one, two), (three, four) = self.attention.collectives(tokens), self.mlp.collectives(tokens)
            return one + three, two + four
        elements = tokens * self.config.hidden_size
        of_norms = Collective("all_reduce", elements * (1 if self.config.shared_norm else 2), self.dtype.name)
        return Counter({Collective("all_reduce", elements, self.dtype.name): 1}), \
            self.attention.inner_collectives(tokens) + Counter({of_norms: 1})


def hidden_dropout(group: TensorParallelGroup, seed: int, name: str, step: int | None, probability: float,
                   shape: tuple[int, ...], dtype: Any, rows: Any = None) -> Array | None:
    """Return scales 0 or 1 / (1 - p) for a complete array, the same on every rank, or for rows; None without dropout.

    Of `dtype`, which is float32 for a 16-bit array: 1 / (1 - p) rounded to 8 bits would shift the mean.
    """
    if not probability or step is None:
        return None
    whole = tuple(slice(0, n) for n in shape)
    if rows is not None:                                # the same words of the stream: those of this rank's rows
        shape, whole = (rows.partition.size, *shape[1:]), (rows.own, *whole[1:])
    return dropout_scale(seed, name, step, probability, shape, whole, dtype, group.xp)
