"""One block of a decoder: attention and feed-forward, their norms and residuals.

Dimension key: B sequences, S positions, N = B S rows (tokens), D hidden.
"""
from collections import Counter
from typing import Any

from ..arrays import Array, scaled
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..comm.sums import Sum
from ..config import DecoderConfig
from ..ops.activation import add_to
from ..ops.dropout import dropout_scale
from ..sharding.decoder_specs import norm_names, output_init_std
from ..sharding.partition import Block
from ..sharding.specs import join
from .attention import ParallelAttention
from .base import require_saved
from .composite import Composite
from .mlp import ParallelMLP
from .norm import hidden_norm
from .products import (copy_to_ranks_backward, copy_to_ranks_forward, reduce_from_ranks_backward,
                       reduce_from_ranks_forward)


class ParallelBlock(Composite):
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

    Raises
    ------
    InputError
        For an unknown dtype; forward and backward as ParallelAttention's and ParallelMLP's.

    Notes
    -----
    Collectives, N = tokens: those of ParallelAttention and ParallelMLP. parallel_residual: their partial results are
    added on each rank, so one all-reduce of N x D forward, and backward one of N x D where they share a norm, of
    2 x N x D where each has its own (Wang and Komatsuzaki, GPT-J, 2021).
    """

    def __init__(self, group: TensorParallelGroup, config: DecoderConfig, layer: int = 0, *, dtype: str = "float32",
                 seed: int | None = 0, name: str = ""):
        self.config, self.seed = config, 0 if seed is None else seed
        common: dict[str, Any] = dict(dtype=dtype, seed=seed, init_std=config.init_method_std,
                                      output_init_std=output_init_std(config))
        kind = ParallelAttention
        if config.qk_norm_over_heads:
            from .norm_over_heads import AttentionNormedOverHeads as kind       # where it is used: few models have it
        self.attention = kind(group, config.attention(layer), name=join(name, "attention"), **common)
        self.mlp = ParallelMLP(group, config.hidden_size, config.ffn_size, config.activation, config.gated,
                               config.mlp_bias, name=join(name, "mlp"), **common)
        self.norms = {norm: hidden_norm(group, config, dtype, join(name, norm)) for norm in norm_names(config)}
        super().__init__(group, [self.attention, self.mlp, *self.norms.values()], dtype, name)
        # A parallel residual adds both branches in one sum: its block i is block i of the heads and of the features.
        self.set_partition(group.partition(group.blocks))

    def forward(self, x: Array, *, mask: Array | None = None, step: int | None = None, kv: Any = None,
                save: bool = True) -> tuple[Array, Any]:
        """Return y, shaped as x (..., S, D), the same on every rank; and what backward needs (None if not save).

        mask, step, kv : as ParallelAttention's
        """
        if self.config.parallel_residual:
            return self.parallel_forward(x, mask, step, kv, save)
        x, first = self.branch_forward("attention", x, dict(mask=mask, step=step, kv=kv), step, save)
        x, second = self.branch_forward("mlp", x, {}, step, save)
        return x, ((self, first, second) if save else None)

    def backward(self, dy: Array, saved: Any, *, out: dict[str, Array] | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx of dy (shaped as x), and {name: gradient} of this rank's slices.

        out : an earlier backward's gradients, whose arrays are used again
        """
        first, second = require_saved(saved, self)
        gradients = self.gradients(out)
        if self.config.parallel_residual:
            return self.parallel_backward(dy, first, second, gradients), gradients
        dy = self.branch_backward("mlp", dy, second, gradients)
        return self.branch_backward("attention", dy, first, gradients), gradients

    # --- one after the other: x + f(x), twice ----------------------------------------------------------------

    def branch_forward(self, part: str, x: Array, options: dict[str, Any], step: int | None,
                       save: bool) -> tuple[Array, Any]:
        """Return x + f(x), f attention or feed-forward with the norms around it; and what backward needs."""
        branch = getattr(self, part)
        h, of_norm = self.norm_forward(f"{part}_norm", x, save)
        y, of_branch = branch.forward(h, save=save, **options)
        scale = self.dropout_scale(f"{part}.dropout", x.shape, step)
        y = scaled(y, scale, out=y)
        if self.config.norm_placement == "after_residual":
            add_to(y, x)
            y, of_post_norm = self.norm_forward(f"{part}_post_norm", y, save)
        else:
            y, of_post_norm = self.norm_forward(f"{part}_post_norm", y, save)
            add_to(y, x)
        return y, (of_norm, of_branch, scale, of_post_norm)

    def branch_backward(self, part: str, dy: Array, saved: Any, gradients: dict[str, Array]) -> Array:
        """Return dx of x + f(x), and write the gradients of the branch and its norms."""
        of_norm, of_branch, scale, of_post_norm = saved
        branch = getattr(self, part)
        d_branch = self.norm_backward(f"{part}_post_norm", dy, of_post_norm, gradients)
        d_residual = d_branch if self.config.norm_placement == "after_residual" else dy
        d_branch = scaled(d_branch, scale)
        dx, _ = branch.backward(d_branch, of_branch, out=self.gradients_of(branch, gradients))
        dx = self.norm_backward(f"{part}_norm", dx, of_norm, gradients)
        add_to(dx, d_residual)
        return dx

    # --- side by side: x + attention(norm(x)) + mlp(norm(x)), one sum for both -----------------------------------

    def parallel_forward(self, x: Array, mask: Array | None, step: int | None, kv: Any,
                         save: bool) -> tuple[Array, Any]:
        """Return x + attention(norm(x)) + mlp(norm(x)). Collective: one all-reduce."""
        call = self.attention.call(x, mask, step, kv)
        h, of_norm = self.norm_forward("attention_norm", x, save)
        g, of_mlp_norm = (h, None) if self.config.shared_norm else self.norm_forward("mlp_norm", x, save)
        h_ND, g_ND = (copy_to_ranks_forward(self.rows(a, self.config.hidden_size)) for a in (h, g))     # f
        units, kept = self.attention.keys_and_values(h_ND, call), {}
        total = self.group.sum(self.partition, h_ND.shape, self.dtype)
        for block, (y_ND, of_block) in self.group.each(
                self.block_forward, self.own_blocks, h_ND, g_ND, units, call, total, save):
            total.add(block, y_ND)
            kept[block.index] = of_block
        y_ND = reduce_from_ranks_forward(total)                                                         # g
        self.attention.add_bias(y_ND)
        self.mlp.add_bias(y_ND)
        y = y_ND.reshape(x.shape)
        scale = self.dropout_scale("dropout", x.shape, step)
        y = scaled(y, scale, out=y)
        add_to(y, x)
        return y, ((self, (of_norm, of_mlp_norm, scale), (h_ND, g_ND, units, kept, call)) if save else None)

    def block_forward(self, block: Block, h_ND: Array, g_ND: Array, units: dict, call: Any, total: Sum,
                      save: bool) -> tuple[Array, Any]:
        """Return what attention and feed-forward add to y (N, D) in one block; and what backward needs of each."""
        y_ND = of_attention = of_mlp = None
        for heads in with_index(block.index, self.attention.own_blocks):
            y_ND, of_attention = self.attention.block_forward(heads, h_ND, units, call, total, save)
        for features in with_index(block.index, self.mlp.own_blocks):
            attention_ND = y_ND
            y_ND, of_mlp = self.mlp.block_forward(features, g_ND, total, save)
            if attention_ND is not None:
                add_to(attention_ND, y_ND)
                y_ND = attention_ND
        if y_ND is None:
            y_ND = self.group.xp.zeros(h_ND.shape, total.summand_dtype)
        return y_ND, (of_attention, of_mlp)

    def parallel_backward(self, dy: Array, of_hidden: Any, of_branches: Any, gradients: dict[str, Array]) -> Array:
        """Return dx. Collective: one all-reduce of the gradients of the one norm's output, or of both norms'."""
        (of_norm, of_mlp_norm, scale), (h_ND, g_ND, units, kept, call) = of_hidden, of_branches
        attention, shared = self.attention, self.config.shared_norm
        dy_ND = reduce_from_ranks_backward(self.rows(scaled(dy, scale), self.config.hidden_size, "dy", len(h_ND)))  # g*
        of_attention = {index: found[0] for index, found in kept.items()}
        of_mlp = {index: found[1] for index, found in kept.items()}
        d_scores = attention.scores_backward(dy_ND, units, of_attention, call, gradients)
        self.mlp.bias_backward(dy_ND, gradients)
        total = self.group.sum(self.partition, (1 if shared else 2, *h_ND.shape), self.dtype)
        d_units = attention.keys_and_values_backward(d_scores, h_ND, units, call, gradients, total)
        norms = {}
        for block, (d_norms, of_heads) in self.group.each(
                self.block_backward, self.own_blocks, dy_ND, (h_ND, d_scores, of_attention, d_units, call),
                (g_ND, of_mlp), gradients, total):
            total.add(block, d_norms)
            norms[block.index] = of_heads
        d_norms = copy_to_ranks_backward(total)                                                         # f*
        attention.sum_norm_gradients(norms, gradients)
        dx = self.norm_backward("attention_norm", d_norms[0].reshape(dy.shape), of_norm, gradients)
        if not shared:
            dx += self.norm_backward("mlp_norm", d_norms[1].reshape(dy.shape), of_mlp_norm, gradients)
        add_to(dx, dy)
        return dx

    def block_backward(self, block: Block, dy_ND: Array, of_attention: tuple, of_mlp: tuple,
                       gradients: dict[str, Array], total: Sum) -> tuple[Array, Any]:
        """Return one block's part in the gradient of the one norm's output (1, N, D), or of both norms' (2, N, D)."""
        d_norms, of_heads = self.group.xp.zeros(total.shape, total.summand_dtype), None
        h_ND, d_scores, kept, d_units, call = of_attention
        for heads in with_index(block.index, self.attention.own_blocks):
            d_ND, of_heads = self.attention.block_backward(heads, d_scores, h_ND, kept, d_units, call, gradients, total)
            d_norms[0] += d_ND
        g_ND, kept = of_mlp
        for features in with_index(block.index, self.mlp.own_blocks):
            d_norms[-1] += self.mlp.block_backward(features, dy_ND, g_ND, kept, gradients, total)
        return d_norms, of_heads

    # --- what both have ------------------------------------------------------------------------------------------

    def norm_forward(self, name: str, x: Array, save: bool) -> tuple[Array, Any]:
        """Return the norm of that name of x, or x itself where the block has none."""
        return self.norms[name].forward(x, save=save) if name in self.norms else (x, None)

    def norm_backward(self, name: str, dy: Array, saved: Any, gradients: dict[str, Array]) -> Array:
        """Return dx of norm_forward, and write the gradients of the norm."""
        if name not in self.norms:
            return dy
        return self.norms[name].backward(dy, saved, out=self.gradients_of(self.norms[name], gradients))[0]

    def dropout_scale(self, name: str, shape: tuple[int, ...], step: int | None) -> Array | float | None:
        """Return what the complete sum is multiplied by, the same on every rank: dropout's scales times the config's
        residual_multiplier; None for 1."""
        scale = hidden_dropout(self.group, self.seed, join(self.name, name), step, self.config.hidden_dropout, shape,
                               self.sum_dtype)
        if self.config.residual_multiplier == 1:
            return scale
        return self.config.residual_multiplier * (1 if scale is None else scale)

    def collectives(self, tokens: int) -> tuple[Counter, Counter]:
        """Return how many collectives forward and backward do, by the formula: two Counters of Collective."""
        if not self.config.parallel_residual:
            (one, two), (three, four) = self.attention.collectives(tokens), self.mlp.collectives(tokens)
            return one + three, two + four
        elements = tokens * self.config.hidden_size
        of_norms = Collective("all_reduce", elements * (1 if self.config.shared_norm else 2), self.dtype.name)
        return Counter({Collective("all_reduce", elements, self.dtype.name): 1}), \
            self.attention.inner_collectives(tokens) + Counter({of_norms: 1})


def with_index(index: int, blocks: tuple[Block, ...]) -> list[Block]:
    """Return the one of a layer's blocks that has this index, in a list; an empty list if it holds nothing."""
    return [block for block in blocks if block.index == index]


def hidden_dropout(group: TensorParallelGroup, seed: int, name: str, step: int | None, probability: float,
                   shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Return scales 0 or 1 / (1 - p) for a complete array, the same on every rank; None without dropout.

    Of `dtype`, which is float32 for a 16-bit array: 1 / (1 - p) rounded to 8 bits would shift the mean.
    """
    if not probability or step is None:
        return None
    whole = tuple(slice(0, n) for n in shape)
    return dropout_scale(seed, name, step, probability, shape, whole, dtype, group.xp)
