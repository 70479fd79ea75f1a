"""A block whose two branches stand side by side: x + attention(norm(x)) + mlp(norm(x)), one sum for both.

Dimension key: N rows (tokens), D hidden.
"""
from typing import Any

from ..arrays import Array, scaled
from ..comm.sums import Sum
from ..ops.activation import add_to
from ..sharding.partition import Block
from .composite import Composite
from .products import (copy_to_ranks_backward, copy_to_ranks_forward, reduce_from_ranks_backward,
                       reduce_from_ranks_forward)


class SideBySide(Composite):
    """The part of ParallelBlock that computes a parallel residual (Wang and Komatsuzaki, GPT-J, 2021)."""
    config: Any
    recompute: str | None
    attention: Any
    mlp: Any
    norm_forward: Any
    norm_backward: Any
    dropout_scale: Any

    def parallel_forward(self, x: Array, call: Any, save: bool, is_again: bool = False) -> tuple[Any, Any, Any]:
        """Return x + attention(norm(x)) + mlp(norm(x)), and what backward needs. Collective: one all-reduce.

        is_again : a recomputation, which needs no y: neither the last products nor their sum
        """
        rows, scores = call.rows, self.attention.call(x, *call)
        h, of_norm = self.norm_forward("attention_norm", x, rows, save)
        g, of_mlp_norm = (h, None) if self.config.shared_norm else self.norm_forward("mlp_norm", x, rows, save)
        h_ND = self.all_rows(h, rows)                                                                   # f
        g_ND = h_ND if self.config.shared_norm else self.all_rows(g, rows)                              # f
        units, kept = self.attention.keys_and_values(h_ND, scores), {}
        total = None if is_again else self.group.sum(self.partition, h_ND.shape, self.dtype)
        for block, (y_ND, of_block) in self.group.each(
                self.block_forward, self.own_blocks, h_ND, g_ND, units, scores, total, save):
            if total is not None:
                total.add(block, y_ND)
            kept[block.index] = of_block
        scale = self.dropout_scale("dropout", x.shape, call)
        if rows:
            h_ND, g_ND = rows.kept(h, h_ND), rows.kept(g, g_ND)
        if save and self.recompute == "attention":
            units, kept = {}, {index: (None, of_mlp) for index, (_, of_mlp) in kept.items()}
        of_hidden, of_branches = (of_norm, of_mlp_norm, scale), (h_ND, g_ND, units, kept, scores)
        if total is None:
            return None, of_hidden, of_branches
        y_ND = reduce_from_ranks_forward(total, rows)                                                   # g
        self.attention.add_bias(y_ND)
        self.mlp.add_bias(y_ND)
        y = y_ND.reshape(x.shape)
        y = scaled(y, scale, out=y)
        add_to(y, x)
        return y, of_hidden, of_branches

    def all_rows(self, x: Array, rows: Any) -> Array:
        """Return x as rows (N, D) of all ranks: f."""
        return self.rows(copy_to_ranks_forward(x, rows), self.config.hidden_size)

    def block_forward(self, block: Block, h_ND: Array, g_ND: Array, units: dict, call: Any, total: Sum | None,
                      save: bool) -> tuple[Any, Any]:
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
        if y_ND is None and total is not None:
            y_ND = self.group.xp.zeros(h_ND.shape, total.summand_dtype)
        return y_ND, (of_attention, of_mlp)

    def parallel_backward(self, dy: Array, of_hidden: Any, of_branches: Any, of_block: Any,
                          gradients: dict[str, Array], sums: Any) -> Array:
        """Return dx. Collective: one all-reduce of the gradients of the one norm's output, or of both norms'."""
        (of_norm, of_mlp_norm, scale), (h_ND, g_ND, units, kept, call) = of_hidden, of_branches
        attention, shared, rows = self.attention, self.config.shared_norm, of_block.rows
        if rows:
            h_ND = rows.again(h_ND)
            g_ND = h_ND if shared else rows.again(g_ND)
        dy_ND = self.rows(reduce_from_ranks_backward(scaled(dy, scale), rows), self.config.hidden_size, "dy",
                          len(h_ND))                                                                    # g*
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
        d_norms = copy_to_ranks_backward(total, rows)                                                   # f*
        attention.end_norms(norms, gradients, sums)
        dx = self.norm_backward("attention_norm", d_norms[0].reshape(dy.shape), of_norm, gradients, sums)
        if not shared:
            dx += self.norm_backward("mlp_norm", d_norms[1].reshape(dy.shape), of_mlp_norm, gradients, sums)
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


def with_index(index: int, blocks: tuple[Block, ...]) -> list[Block]:
    """Return the one of a layer's blocks that has this index, in a list; an empty list if it holds nothing."""
    return [block for block in blocks if block.index == index]
