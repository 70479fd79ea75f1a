"""One block of a decoder: attention and feed-forward, their norms and residuals.

Dimension key: B sequences, S positions, N = B S rows (tokens), D hidden.
"""
from collections import Counter

from ..arrays import scaled
from ..comm.ledger import Collective
from ..ops.activation import add_to
from ..ops.dropout import dropout_scale
from ..sharding.partition import Partition
from .attention import ParallelAttention
from .base import Composite, join, require_saved
from .mappings import (Later, copy_to_ranks_backward, copy_to_ranks_forward, reduce_from_ranks_backward,
                       reduce_from_ranks_forward)
from .mlp import ParallelMLP
from .norm import Norm


class ParallelBlock(Composite):
    """x = x + attention(norm(x)), then x = x + mlp(norm(x)); or one of the other orders that DecoderConfig names.

    Norms, residuals and dropout work on the complete x, alike on every rank.

    Parameters
    ----------
    group : TensorParallelGroup
    config : DecoderConfig
    layer : which of its layers, for what differs from layer to layer
    dtype, seed, name : as ParallelMLP's

    Notes
    -----
    Collectives, N = tokens: those of ParallelAttention and ParallelMLP. parallel_residual: their partial results are
    added on each rank, so one all-reduce of N x D forward, and backward one of N x D where they share a norm, of
    2 x N x D where each has its own (Wang and Komatsuzaki, GPT-J, 2021).
    """

    def __init__(self, group, config, layer=0, *, dtype="float32", seed=0, name=""):
        self.config, self.seed = config, 0 if seed is None else seed
        std = config.init_method_std
        common = dict(dtype=dtype, seed=seed, init_std=std, output_init_std=std / (2 * config.num_layers) ** 0.5)
        self.attention = ParallelAttention(
            group, config.hidden_size, config.num_attention_heads, config.query_groups, config.head_dim,
            sliding_window=config.window(layer), rotary=config.rotary_of(layer),
            alibi=config.position_embedding == "alibi", qk_norm=config.normalization if config.qk_norm else None,
            norm_epsilon=config.norm_epsilon, zero_centered_gamma=config.zero_centered_gamma,
            attention_scale=config.scale, qkv_bias=config.qkv_bias, bias=config.attention_bias,
            dropout=config.attention_dropout, name=join(name, "attention"), **common)
        self.mlp = ParallelMLP(group, config.hidden_size, config.ffn_size, config.activation, config.gated,
                               config.mlp_bias, name=join(name, "mlp"), **common)
        self.norms = {}
        for part in ("attention", "mlp"):
            if config.norm_placement in ("before", "both") and not (part == "mlp" and config.shared_norm):
                self.norms[f"{part}_norm"] = make_norm(group, config, dtype, join(name, f"{part}_norm"))
            if config.norm_placement != "before":
                self.norms[f"{part}_post_norm"] = make_norm(group, config, dtype, join(name, f"{part}_post_norm"))
        super().__init__(group, [self.attention, self.mlp, *self.norms.values()], dtype, name)

    def forward(self, x, *, mask=None, step=None, kv=None, saved=True):
        """x (..., S, D), the same on every rank -> the same shape; and what backward needs (None if not saved).

        mask, step, kv : as ParallelAttention's
        """
        if self.config.parallel_residual:
            return self.parallel_forward(x, mask, step, kv, saved)
        x, first = self.branch_forward("attention", x, dict(mask=mask, step=step, kv=kv), step, saved)
        x, second = self.branch_forward("mlp", x, {}, step, saved)
        return x, ((first, second) if saved else None)

    def backward(self, dy, saved, *, out=None):
        """dy (shaped as x) -> dx and {name: gradient} of this rank's slices."""
        require_saved(saved)
        gradients = self.gradients(out)
        if self.config.parallel_residual:
            return self.parallel_backward(dy, saved, gradients), gradients
        first, second = saved
        dy = self.branch_backward("mlp", dy, second, gradients)
        return self.branch_backward("attention", dy, first, gradients), gradients

    # --- one after the other: x + f(x), twice ----------------------------------------------------------------

    def branch_forward(self, part, x, options, step, saved):
        branch, after = getattr(self, part), self.norms.get(f"{part}_post_norm")
        h, before_saved = self.norm_forward(f"{part}_norm", x, saved)
        y, branch_saved = branch.forward(h, saved=saved, **options)
        scale = self.dropout_scale(f"{part}.dropout", x.shape, step)
        y = scaled(y, scale, out=y)
        if self.config.norm_placement == "after_residual":
            add_to(y, x)
            y, after_saved = after.forward(y, saved=saved)
        else:
            y, after_saved = self.norm_forward(f"{part}_post_norm", y, saved)
            add_to(y, x)
        return y, (before_saved, branch_saved, scale, after_saved)

    def branch_backward(self, part, dy, saved, gradients):
        before_saved, branch_saved, scale, after_saved = saved
        branch = getattr(self, part)
        d_branch = self.norm_backward(f"{part}_post_norm", dy, after_saved, gradients)
        d_residual = d_branch if self.config.norm_placement == "after_residual" else dy
        d_branch = scaled(d_branch, scale)
        dx, _ = branch.backward(d_branch, branch_saved, out=self.of(branch, gradients))
        dx = self.norm_backward(f"{part}_norm", dx, before_saved, gradients)
        add_to(dx, d_residual)
        return dx

    # --- side by side: x + attention(norm(x)) + mlp(norm(x)) ---------------------------------------------------

    def parallel_forward(self, x, mask, step, kv, saved):
        attention, mlp, kept = self.attention, self.mlp, ({} if saved else None, {} if saved else None)
        call = attention.look_at(x, mask, step, kv)
        h, attention_saved = self.norm_forward("attention_norm", x, saved)
        g, mlp_saved = (h, None) if self.config.shared_norm else self.norm_forward("mlp_norm", x, saved)
        h_ND, g_ND = (copy_to_ranks_forward(self.rows(a, self.config.hidden_size)) for a in (h, g))
        partials = attention.partial_forward(h_ND, kept[0], call), mlp.partial_forward(g_ND, kept[1])

        def partial(block):
            summands = [y_ND for y_ND in self.both(partials, block) if y_ND is not None]
            if not summands:
                return self.group.xp.zeros(h_ND.shape, self.leaf_dtype)
            for other in summands[1:]:
                add_to(summands[0], other)
            return summands[0]

        y_ND = reduce_from_ranks_forward(partial, self.block_numbers(), self.group, h_ND.shape, self.dtype)
        attention.add_bias(y_ND)
        mlp.add_bias(y_ND)
        y = y_ND.reshape(x.shape)
        scale = self.dropout_scale("dropout", x.shape, step)
        y = scaled(y, scale, out=y)
        add_to(y, x)
        return y, ((attention_saved, mlp_saved, h_ND, g_ND, kept, call, scale) if saved else None)

    def parallel_backward(self, dy, saved, gradients):
        attention_saved, mlp_saved, h_ND, g_ND, kept, call, scale = saved
        d_sum = scaled(dy, scale)
        dy_ND = reduce_from_ranks_backward(self.rows(d_sum, self.config.hidden_size, "dy", len(h_ND)))
        later = Later(self.group)
        partials = (self.attention.partial_backward(dy_ND, h_ND, kept[0], call, gradients, later),
                    self.mlp.partial_backward(dy_ND, g_ND, kept[1], gradients, later))
        shared, shape = self.config.shared_norm, h_ND.shape

        def partial(block):
            """The summand of the one norm's gradient (1, N, D), or of both norms' (2, N, D)."""
            d_norms = self.group.xp.zeros((1 if shared else 2, *shape), self.leaf_dtype)
            for i, d_ND in enumerate(self.both(partials, block)):
                if d_ND is not None:
                    d_norms[0 if shared else i] += d_ND
            return d_norms

        d_norms = copy_to_ranks_backward(partial, self.block_numbers(), self.group, (1 if shared else 2, *shape),
                                         self.dtype, later)
        self.attention.sum_norm_gradients(kept[0], gradients)
        dx = self.norm_backward("attention_norm", d_norms[0].reshape(dy.shape), attention_saved, gradients)
        if not shared:
            dx += self.norm_backward("mlp_norm", d_norms[1].reshape(dy.shape), mlp_saved, gradients)
        add_to(dx, dy)
        return dx

    def block_numbers(self):
        """The partition whose block i is block i of the heads and block i of the feed-forward features together."""
        return Partition(self.group.blocks, self.group.size, self.group.blocks)

    def both(self, partials, number):
        """What attention and feed-forward give for one block; None where they have no such block."""
        found = []
        for partial, layer in zip(partials, (self.attention, self.mlp)):
            block = next((b for b in layer.partition.blocks_of(self.group.rank) if b.index == number.index), None)
            found.append(None if block is None else partial(block))
        return found

    # --- what both have ------------------------------------------------------------------------------------------

    def norm_forward(self, name, x, saved):
        """The norm of that name, or x itself where the block has none."""
        return self.norms[name].forward(x, saved=saved) if name in self.norms else (x, None)

    def norm_backward(self, name, dy, saved, gradients):
        if name not in self.norms:
            return dy
        return self.norms[name].backward(dy, saved, out=self.of(self.norms[name], gradients))[0]

    def dropout_scale(self, name, shape, step):
        """Of the complete sum, the same on every rank; None without dropout."""
        return hidden_dropout(self.group, self.seed, join(self.name, name), step, self.config.hidden_dropout, shape,
                              self.sum_dtype)

    def collectives(self, tokens):
        """The closed form: (forward, backward), each a Counter of logical data collectives."""
        if not self.config.parallel_residual:
            (one, two), (three, four) = self.attention.collectives(tokens), self.mlp.collectives(tokens)
            return one + three, two + four
        elements = tokens * self.config.hidden_size
        of_norms = Collective("all_reduce", elements * (1 if self.config.shared_norm else 2), self.dtype.name)
        return Counter({Collective("all_reduce", elements, self.dtype.name): 1}), \
            self.attention.inner_collectives(tokens) + Counter({of_norms: 1})


def make_norm(group, config, dtype, name):
    return Norm(group, config.hidden_size, config.normalization, config.norm_epsilon, config.has_norm_bias,
                config.zero_centered_gamma, dtype=dtype, name=name)


def hidden_dropout(group, seed, name, step, probability, shape, dtype):
    """Scales 0 or 1 / (1 - p) for a complete array, the same on every rank; None without dropout.

    Of `dtype`, which is float32 for a 16-bit array: 1 / (1 - p) rounded to 8 bits would be a mistake in the mean.
    """
    if not probability or step is None:
        return None
    whole = tuple(slice(0, n) for n in shape)
    return dropout_scale(seed, name, step, probability, shape, whole, dtype, group.xp)
