"""Gradients of norms, which are sums over rows: by a tree over blocks of rows, or over the ranks that have them.

A norm's weights are replicated. Where every rank has all rows, so are their gradients. In sequence parallelism each
rank has the summand of its own rows; those of all norms are added up in one all-reduce, at the end of backward, or of a
training step of several backwards:

    rank 0, rows 0 to 3      dw of norm 1 | db of norm 1 | dw of norm 2 | ...
    rank 1, rows 4 to 7      dw of norm 1 | db of norm 1 | dw of norm 2 | ...        sum over the ranks, never the mean

In reproducible mode both are the same tree over the same blocks of rows, so the same bits, however the rows lie.

Dimension key: N rows of all ranks, n of this one, D features.
"""
from typing import Any

from ..arrays import Array
from ..comm.tree import Fold, finish, root_width
from ..errors import require
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


def names_of_step(model: Any) -> set[str]:
    """Return the parameters of a decoder whose gradients NormSumsOfStep adds up in sequence parallelism."""
    norms = [norm for norm in (model.embedding_norm, model.final_norm) if norm]
    norms += [norm for block in model.blocks for norm in block.norms.values()]
    of_heads = {name for block in model.blocks for name in block.attention.shared_norms}
    return of_heads | {name for norm in norms for name in norm.weights}


class Summands:
    """This rank's summands of some gradients, for each of its blocks of one partition.

    Attributes
    ----------
    names : list of str
        Of the gradients, in the order in which they were added: the same one on every rank.
    of_blocks : {block index: list of array}
    """

    def __init__(self, partition: Partition, rank: int):
        self.partition, self.rank, self.names = partition, rank, []     # type: ignore[var-annotated]
        self.of_blocks: dict[int, list[Array]] = {block.index: [] for block in partition.blocks_of(rank)}

    def add(self, names: list[str], of_blocks: dict[int, list[Array]]) -> None:
        """Add summands of some gradients, one list a block."""
        self.names += names
        for index, found in of_blocks.items():
            self.of_blocks[index] += found

    def folded(self, xp: Any) -> Fold:
        """Return the part of the tree that this rank's blocks make, of all gradients one after the other."""
        fold = Fold(self.partition, self.rank)
        for index, found in self.of_blocks.items():
            fold.add(index, xp.concatenate([part.reshape(-1) for part in found]))
        return fold


class NormSums:
    """The gradients of norms in one backward of sequence parallelism, until all_reduce() adds up the ranks' parts.

    Parameters
    ----------
    rows : Rows
        Which rows this rank has.

    Notes
    -----
    Norms over the hidden features are summed over rows, query and key norms over heads. Never before the last norm has
    been added: what came later would be left out.
    """

    def __init__(self, rows: Any):
        self.group, self.of_rows = rows.group, Summands(rows.partition, rows.group.rank)
        self.of_heads: Summands | None = None

    def backward(self, norm: Any, dy_nD: Array, saved: Any) -> Array:
        """Return dx (n, D) of a norm over the hidden features for dy (n, D)."""
        (kept,) = require_saved(saved, norm)
        dy_nD, names = norm.rows(dy_nD, norm.hidden_size, "dy", len(kept[0])), parameters_of(norm)
        blocks = self.of_rows.partition.blocks_of(self.group.rank)
        dx_nD, found = backward_by_blocks(dy_nD, kept, blocks, norm.sum_dtype, norm.group.xp)
        self.of_rows.add(names, {block.index: of_block[:len(names)] for block, of_block in zip(blocks, found)})
        return dx_nD

    def add_heads(self, attention: Any, norms: dict) -> None:
        """Add the summands of attention's query and key norm, {index of a block of heads: what norm_summands takes}."""
        if self.of_heads is None:
            self.of_heads = Summands(attention.partition, self.group.rank)
        self.of_heads.add(attention.shared_norms, {block.index: [*attention.norm_summands(*norms[block.index])]
                                                   for block in attention.own_blocks})

    @property
    def names(self) -> list[list[str]]:
        """The names of the gradients in each sum: all in one, in reproducible mode those of rows and those of heads."""
        of_heads = self.of_heads.names if self.of_heads else []
        split = [self.of_rows.names, of_heads] if self.group.reproducible else [self.of_rows.names + of_heads]
        return [names for names in split if names]

    def folded(self, gradients: dict[str, Array]) -> list[Fold]:
        """Return this rank's part of each sum."""
        xp, kinds = self.group.xp, [kind for kind in (self.of_rows, self.of_heads) if kind and kind.names]
        if self.group.reproducible:                 # blocks of rows and of heads are two trees
            return [kind.folded(xp) for kind in kinds]
        every_rank, parts = self.group.partition(self.group.size), []
        for kind in kinds:
            found = [part for of_block in kind.of_blocks.values() for part in of_block]
            parts += found or [xp.zeros_like(gradients[name]) for name in kind.names]       # neither rows nor heads
        fold = Fold(every_rank, self.group.rank)
        if parts:
            fold.add(self.group.rank, xp.concatenate([part.reshape(-1) for part in parts]))
        return [fold] if parts else []

    def end(self, gradients: dict[str, Array], step_sums: "NormSumsOfStep | None" = None) -> None:
        """Write the gradients of all norms, summed over the ranks, or leave them to those of a step.

        Collective without step_sums, see NormSumsOfStep.all_reduce.
        """
        if step_sums is not None:
            step_sums.add(self, gradients)
            return
        of_this = NormSumsOfStep(self.group)
        of_this.add(self, gradients)
        for found in of_this.all_reduce():
            of_this.write(found, gradients)


class NormSumsOfStep:
    """The gradients of norms over all pieces (micro-batches) of a training step, until its end: one message a step.

    As Megatron-LM's finalize_model_grads does. Use: clear(), for each piece model.backward(..., step_sums=self), then
    all_reduce().

    Parameters
    ----------
    group : TensorParallelGroup

    Attributes
    ----------
    pieces : list of list of Fold
        This rank's part of each sum: of every piece, in ordinary mode of one, to which the others are added.
    names : list of list of str
        Of the gradients in each sum.
    """

    def __init__(self, group: Any):
        self.group = group
        self.clear()

    def clear(self) -> None:
        """Begin a step."""
        self.pieces: list[list[Fold]] = []
        self.names: list[list[str]] = []
        self.elements: list[int] = []

    def add(self, sums: NormSums, gradients: dict[str, Array]) -> None:
        """Add a piece, of whose gradients those of norms are 0 until write()."""
        self.names, folds = sums.names, sums.folded(gradients)
        self.dtype = next(iter(gradients.values())).dtype
        self.elements = [sum(gradients[name].size for name in names) for names in self.names]
        for name in sum(self.names, []):
            gradients[name][...] = 0
        if self.group.reproducible or not self.pieces:
            for first, fold in zip(self.pieces[0] if self.pieces else (), folds):
                require(first.partition == fold.partition, f"{fold.partition.size} rows in a piece of a step",
                        f"{first.partition.size}, as in its first one")
            self.pieces.append(folds)
            return
        for mine, other in zip(self.pieces[0], folds):
            for node, summand in other.known.items():
                mine.known[node] += summand

    def all_reduce(self) -> list[Array]:
        """Return the gradients of each piece, in ordinary mode of all together, one after the other in an array.

        Collective: one all-reduce of all of them, the sum, never the mean; in reproducible mode one of those that are
        summed over rows, and one of those over heads.
        """
        found: list[list[Array]] = [[] for _ in self.pieces]
        for number, elements in enumerate(self.elements):
            folds = [folds[number] for folds in self.pieces]
            together = Fold(folds[0].partition, self.group.rank)
            for node in folds[0].known:
                together.known[node] = self.group.xp.concatenate([fold.known[node] for fold in folds])
            whole = self.sum_of(together, elements * len(folds))
            for of_piece, part in zip(found, whole.reshape(len(folds), elements)):
                of_piece.append(part)
        return [self.group.xp.concatenate(of_piece) for of_piece in found if of_piece]

    def sum_of(self, fold: Fold, elements: int) -> Array:
        """Return the sum of what the ranks have folded. Collective: one all-reduce."""
        total = self.group.sum(fold.partition, (elements,), self.dtype)
        if self.group.reproducible:
            total.fold = fold
        else:
            for block in fold.partition.blocks_of(self.group.rank):
                total.add(block, fold.known[block.index, 1])
        return total.all_reduce()

    def write(self, found: Array, gradients: dict[str, Array]) -> None:
        """Write what all_reduce() returned for a piece."""
        start = 0
        for name in sum(self.names, []):
            g = gradients[name]
            g[...] = found[start:start + g.size].reshape(g.shape)
            start += g.size
