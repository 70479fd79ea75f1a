"""Cross entropy of logits that are split by vocabulary: the gathered logits never exist.

Dimension key: N tokens, V vocabulary; p marks an axis split over the ranks, b the part of it in one block.
"""
import math
from collections import Counter
from typing import Any

import numpy as np

from ..arrays import Array, compute_dtype, module_of, sum_dtype
from ..comm.group import TensorParallelGroup
from ..comm.ledger import Collective
from ..errors import InputError, is_integer, require
from ..require_numbers import require_number
from ..ops.cross_entropy import row_gradient, row_maximum, row_sums
from ..sharding.partition import Block, Partition
from .embedding import token_ids


def vocab_parallel_cross_entropy_forward(logits: Array, targets: Any, group: TensorParallelGroup,
                                         partition: Partition, *, label_smoothing: float = 0.0,
                                         z_loss: float = 0.0, ignore_index: int = -100) -> tuple[float, Any]:
    """Return the mean over the counted tokens of (1 - s) (lse - z_t) + s (lse - mean of z) + w lse^2.

    lse = log(sum of e^z). Target, sum and mean are those of the whole vocabulary, s is `label_smoothing`, w `z_loss`.

    Parameters
    ----------
    logits : (..., V p) array
        This rank's columns of `partition`. Backward needs it, not a copy: do not change it until then.
    targets : (...) integers
        Token ids of the whole vocabulary, the same on every rank.
    group : TensorParallelGroup
        The ranks.
    partition : Partition
        group.partition(V).
    label_smoothing : float
        s, from 0 to 1 (Szegedy et al., arXiv 1512.00567, section 7).
    z_loss : float
        w, at least 0: it keeps the softmax's normalizer e^lse near 1 (Chowdhery et al., PaLM, arXiv 2204.02311,
        section 5, with 1e-4).
    ignore_index : int
        Tokens with this target do not count.

    Returns
    -------
    loss : float
        The same on every rank; 0.0 where no token counts; NaN where the logits of a token that counts hold NaN or
        infinity. A logit of minus infinity is a probability of 0, though.
    saved : tuple
        What backward needs.

    Raises
    ------
    InputError
        Before any collective, for a target outside the vocabulary (naming its position), shapes or dtypes that do not
        fit, another group's partition, s outside 0 to 1, or w below 0.

    Notes
    -----
    As Megatron-LM's (arXiv 1909.08053, section 3), but with the mean of label smoothing over V, not a rank's V / P.
    Collectives, N = tokens: one all-reduce (max) of N, one all-reduce of 2 x N, with label smoothing 3 x N.
    """
    z_NVp, targets_N = checked(logits, targets, group, partition, label_smoothing, z_loss, ignore_index)
    xp, smooth, counted_N = group.xp, label_smoothing > 0, targets_N != ignore_index
    count = int(counted_N.sum())                # before they go to the device, if they come from the host
    targets_N, counted_N = xp.asarray(targets_N), xp.asarray(counted_N)
    max_N = group.all_reduce(row_maximum(z_NVp), "max")

    total = group.sum(partition, (3 if smooth else 2, len(z_NVp)), sum_dtype(z_NVp.dtype))
    for block, sums in group.each(block_forward, partition.blocks_of(group.rank), z_NVp, max_N, targets_N, smooth):
        total.add(block, sums)
    sums = total.all_reduce()
    with np.errstate(invalid="ignore"):         # the loss says it
        lse_N = xp.log(sums[0].astype(np.float64))
        loss_N = lse_N - sums[1]
        if smooth:
            loss_N = (1 - label_smoothing) * loss_N + label_smoothing * (lse_N - sums[2] / float(partition.size))
        if z_loss:                              # lse_N is that of z - max
            loss_N = loss_N + z_loss * (lse_N + max_N) ** 2
    loss = float(xp.where(counted_N, loss_N, 0).sum()) / max(1, count)
    saved = logits.shape, z_NVp, max_N, targets_N, sums[0], counted_N, count, group, partition, label_smoothing, z_loss
    return loss, saved


def block_forward(block: Block, z_NVp: Array, max_N: Array, targets_N: Array, smooth: bool) -> Array:
    """Return a block's part of each token's sums: of e^(z - max), the target's z - max, and of z - max if smooth."""
    return row_sums(z_NVp[:, block.local], max_N, targets_N - block.start, smooth)


def vocab_parallel_cross_entropy_backward(saved: Any, d_loss: float = 1.0) -> Array:
    """Return d_logits = d_loss / count ((1 + 2 w lse) softmax(z) - (1 - s) [target] - s / V) of tokens that count.

    It is 0 for the others.

    Parameters
    ----------
    saved : tuple
        What forward returned beside the loss.
    d_loss : float
        The derivative with respect to the loss.

    Returns
    -------
    (..., V p) array
        d_logits, shaped as logits: this rank's columns, a new array.

    Notes
    -----
    No collectives.
    """
    shape, z_NVp, max_N, targets_N, total_N, counted_N, count, group, partition, label_smoothing, z_loss = saved
    xp, dtype = group.xp, sum_dtype(z_NVp.dtype)
    weight_N = counted_N * (float(d_loss) / max(1, count))
    of_softmax_N = weight_N * (1 + 2 * z_loss * (xp.log(total_N.astype(np.float64)) + max_N)) if z_loss else weight_N
    factor_N = xp.where(counted_N, of_softmax_N / total_N, 0).astype(dtype)   # not NaN where nothing counts
    at_target_N = ((1 - label_smoothing) * weight_N).astype(dtype)
    everywhere_N = (label_smoothing / partition.size * weight_N).astype(dtype) if label_smoothing > 0 else None
    dz_NVp = xp.empty(z_NVp.shape, z_NVp.dtype)

    blocks = partition.blocks_of(group.rank)
    for _ in group.each(block_backward, blocks, z_NVp, max_N, targets_N, factor_N, at_target_N, everywhere_N, dz_NVp):
        pass                                                # each block writes its columns
    return dz_NVp.reshape(shape)


def block_backward(block: Block, z_NVp: Array, max_N: Array, targets_N: Array, factor_N: Array, at_target_N: Array,
                   everywhere_N: Array | None, dz_NVp: Array) -> None:
    """Write a block's columns of d_logits."""
    row_gradient(z_NVp[:, block.local], max_N, targets_N - block.start, factor_N, at_target_N, everywhere_N,
                 out=dz_NVp[:, block.local])


def cross_entropy_collectives(tokens: int, label_smoothing: float = 0.0, dtype: str = "float32") -> Counter:
    """Return the closed form: a Counter of the logical data collectives of forward; backward has none."""
    name = sum_dtype(compute_dtype(dtype, "gpu")).name      # any dtype that a layer has on some device
    return Counter([Collective("all_reduce", tokens, name),
                    Collective("all_reduce", (3 if label_smoothing > 0 else 2) * tokens, name)])


def checked(logits: Array, targets: Any, group: TensorParallelGroup, partition: Partition, label_smoothing: float,
            z_loss: float, ignore_index: int) -> tuple[Array, Array]:
    """Return logits as rows (N, V p) and targets (N,). Raises InputError as vocab_parallel_cross_entropy_forward."""
    is_number = isinstance(label_smoothing, (int, float)) and not isinstance(label_smoothing, bool)
    require(is_number and 0 <= label_smoothing <= 1, f"label_smoothing = {label_smoothing!r}", "a number from 0 to 1")
    require_number("z_loss", z_loss)
    require(z_loss >= 0, f"z_loss = {z_loss!r}", "a number of at least 0")
    require(is_integer(ignore_index), f"ignore_index = {ignore_index!r}", "an integer")
    require(partition == group.partition(partition.size), f"logits over {partition}",
            f"{group.partition(partition.size)}, the group's")
    if module_of(logits) is not group.xp:
        raise InputError(f"logits: found {type(logits).__module__}.{type(logits).__name__}, expected an array of "
                         f"{group.xp.__name__} (the group's device is {group.device!r})")
    compute_dtype(logits.dtype, group.device)
    columns = partition.lengths[group.rank]
    if logits.ndim == 0 or logits.shape[-1] != columns:
        raise InputError(f"logits: found shape {logits.shape}, expected (..., {columns}), the columns of rank "
                         f"{group.rank} of {partition.size}")
    targets = token_ids(targets, partition.size, "targets", ignore_index)
    if targets.shape != logits.shape[:-1]:
        raise InputError(f"targets: found shape {targets.shape}, expected {logits.shape[:-1]}, as the logits'")
    # The memory order would be part of the bits.
    z_NVp = group.xp.ascontiguousarray(logits).reshape(math.prod(logits.shape[:-1]), columns)
    return z_NVp, targets.reshape(-1)
