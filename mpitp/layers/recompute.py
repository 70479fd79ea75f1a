"""Recomputation: what a block's backward needs is computed again instead of being kept (Chen et al., arXiv 1604.06174).

    recompute="block"         forward keeps x, the block's input, and no more
    recompute="attention"     forward keeps attention's input in place of queries, keys, values and heads
                              (Korthikanti et al., arXiv 2205.05198, section 5)

The last product of a recomputation is left out, and the collective that adds it up, as backward needs its gradient
alone. So a block takes one more all-reduce, attention's, and not two; with a norm after the last product, which needs
the product, two. Dropout draws the same masks again, from the same addresses.

Dimension key: N rows (tokens), n of this rank, D hidden.
"""
from typing import Any

from ..arrays import Array
from .products import copy_to_ranks_forward


def parts_again(block: Any, first: Any, second: Any, call: Any) -> tuple[Any, Any, Any]:
    """Return what backward needs of attention and of feed-forward, and the block's call, after a recomputation.

    Parameters
    ----------
    block : ParallelBlock
        With a `recompute`.
    first, second : what forward kept
        "block": x and None; "attention": as without recomputation, but for what attention keeps.
    call : BlockCall
        Of forward. Rows that are gathered here are kept until backward is done.
    """
    again = call if call.rows is None else call._replace(rows=call.rows.keeping())
    if block.config.parallel_residual:
        if block.recompute == "block":
            return *block.parallel_forward(first, again, True, is_again=True)[1:], again
        return first, heads_again(block, second, call), again
    if block.recompute == "attention":
        of_norm, h, scale, of_post_norm = first
        return (of_norm, attention_again(block.attention, h, again), scale, of_post_norm), second, call
    h, first = block.branch_forward("attention", first, again, True)
    return first, last_branch_again(block, h, again), again


def last_branch_again(block: Any, x: Array, call: Any) -> Any:
    """Return what backward needs of x + mlp(norm(x)), without its last product where no norm comes after that."""
    if "mlp_post_norm" in block.norms:
        return block.branch_forward("mlp", x, call, True)[1]
    h, of_norm = block.norm_forward("mlp_norm", x, call.rows, True)
    return of_norm, mlp_again(block.mlp, h, call.rows), block.dropout_scale("mlp.dropout", x.shape, call), None


def mlp_again(mlp: Any, x: Array, rows: Any) -> tuple:
    """Return what backward of ParallelMLP needs: everything but the last product."""
    x_ND = mlp.rows(copy_to_ranks_forward(x, rows), mlp.hidden_size)                                    # f
    blocks = mlp.group.each(mlp.block_forward, mlp.own_blocks, x_ND, None, True)
    return mlp, x_ND, {block.index: of_block for block, (_, of_block) in blocks}, rows


def attention_again(attention: Any, x: Array, call: Any) -> tuple:
    """Return what backward of ParallelAttention needs: everything but the last product."""
    scores = attention.call(x, *call)
    x_ND = attention.rows(copy_to_ranks_forward(x, call.rows), attention.hidden_size)                   # f
    units = attention.keys_and_values(x_ND, scores)
    blocks = attention.group.each(attention.block_forward, attention.own_blocks, x_ND, units, scores, None, True)
    return attention, x_ND, units, {block.index: of_block for block, (_, of_block) in blocks}, scores


def heads_again(block: Any, of_branches: tuple, call: Any) -> tuple:
    """Return what backward of a parallel residual needs of both branches, attention's part computed again."""
    h_ND, g_ND, _, kept, scores = of_branches
    if call.rows is not None:
        h_ND, is_one = call.rows.again(h_ND), block.config.shared_norm
        g_ND = h_ND if is_one else call.rows.again(g_ND)
    attention = block.attention
    units = attention.keys_and_values(h_ND, scores)
    heads = attention.group.each(attention.block_forward, attention.own_blocks, h_ND, units, scores, None, True)
    of_heads = {heads_block.index: of_block for heads_block, (_, of_block) in heads}
    return h_ND, g_ND, units, {index: (of_heads.get(index), of_mlp) for index, (_, of_mlp) in kept.items()}, scores
