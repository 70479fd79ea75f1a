"""Gradients of norms, which are sums over rows: by a tree over blocks of rows, or over the ranks that have them.

A norm's weights are replicated. Where every rank has all rows, so are their gradients. In sequence parallelism each
rank has the summand of its own rows; those of all norms are added up in one all-reduce, at the end of backward:

    rank 0, rows 0 to 3      dw of norm 1 | db of norm 1 | dw of norm 2 | ...
    rank 1, rows 4 to 7      dw of norm 1 | db of norm 1 | dw of norm 2 | ...        sum over the ranks, never the mean

In reproducible mode both are the same tree over the same blocks of rows, so the same bits, however the rows lie.

Dimension key: N rows of all ranks, n of this one, D features.
"""
from typing import Any

from ..arrays import Array
from ..ops.norm import norm_backward
from ..sharding.partition import Block, Partition
from ..sharding.specs import join
from .base import require_saved


def backward_by_blocks(dy_nD: Array, kept: tuple, blocks: tuple[Block, ...],
                       dtype: Any, xp: Any) -> tuple[Array, list[list[Array]]]:
    """Return dx (n, D) of a norm, and the gradients of its weight, and bias if it has one, for each block of rows.

    kept : what norm_forward returned for the n rows
    """
    dx_nD, gradients = xp.empty_like(dy_nD), []
    for block in blocks:
        part = block.local
        of_rows = (kept[0][part], kept[1][part], *kept[2:])             # what is kept by row: xhat, rstd
        dw_D, db_D = xp.empty(dy_nD.shape[1], dtype), xp.empty(dy_nD.shape[1], dtype)
        dx_nD[part] = norm_backward(dy_nD[part], of_rows, dw_out=dw_D, db_out=db_D)[0]
        gradients.append([dw_D, db_D])
    return dx_nD, gradients


def backward_of_all_rows(norm: Any, dy_ND: Array, kept: tuple, gradients: dict[str, Array]) -> Array:
    """Return dx (N, D) of a norm of which this rank has all rows; write its gradients. In reproducible mode.

    The tree is that of comm/tree.py, over `group.blocks` blocks of rows, which are all this rank's.
    """
    from ..comm.tree import Fold, finish, root_width
    rows = Partition(len(dy_ND), 1, norm.group.blocks)
    blocks = rows.blocks_of(0)
    dx_ND, of_blocks = backward_by_blocks(dy_ND, kept, blocks, norm.sum_dtype, norm.group.xp)
    for number, name in enumerate(parameters_of(norm)):
        fold = Fold(rows, 0)
        for block, found in zip(blocks, of_blocks):
            fold.add(block.index, found[number])
        gradients[name][...] = finish(fold.known, 0, root_width(rows.blocks)) if blocks else 0
    return dx_ND


def parameters_of(norm: Any) -> list[str]:
    """Return the full names of a norm's parameters: its weight, and its bias if it has one."""
    return [join(norm.name, own) for own in ("weight", "bias") if own in norm.own]


class NormSums:
    """The gradients of norms in one backward of sequence parallelism, until all_reduce() adds up the ranks' parts.

    Parameters
    ----------
    rows : Rows
        Which rows this rank has.

    Notes
    -----
    Never before the last norm has been added: what came later would be left out.
    """

    def __init__(self, rows: Any):
        self.rows = rows
        self.of_blocks: dict[int, list[Array]] = {block.index: [] for block in rows.own_blocks}
        self.gradients: list[Array] = []            # where the sums go, in the order in which norms were added

    def backward(self, norm: Any, dy_nD: Array, saved: Any, gradients: dict[str, Array]) -> Array:
        """Return dx (n, D) of a norm for dy (n, D); its gradients are written by all_reduce()."""
        (kept,) = require_saved(saved, norm)
        dy_nD = norm.rows(dy_nD, norm.hidden_size, "dy", len(kept[0]))
        dx_nD, found = backward_by_blocks(dy_nD, kept, self.rows.own_blocks, norm.sum_dtype, norm.group.xp)
        names = parameters_of(norm)
        for block, of_block in zip(self.rows.own_blocks, found):
            self.of_blocks[block.index] += of_block[:len(names)]
        self.gradients += [gradients[name] for name in names]
        return dx_nD

    def all_reduce(self) -> None:
        """Write the gradients of all norms, summed over the ranks. Collective: one all-reduce of all of them."""
        if not self.gradients:
            return
        group, dtype = self.rows.group, self.gradients[0].dtype
        total = group.sum(self.rows.partition, (sum(g.size for g in self.gradients),), dtype)
        for block in self.rows.own_blocks:
            total.add(block, group.xp.concatenate(self.of_blocks[block.index]))
        whole, start = total.all_reduce(), 0
        for g in self.gradients:
            g[...] = whole[start:start + g.size]
            start += g.size
