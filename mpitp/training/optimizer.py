"""AdamW, the learning rate's schedule, and the norm of all gradients. Each rank moves its own slices."""
from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from ..arrays import Array, module_of, sum_dtype
from ..comm.group import TensorParallelGroup
from ..errors import require
from ..layers.base import ParallelLayer
from ..ops.adamw import adamw_step


class AdamW:
    """w -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w); no decay where the spec says so.

    m += (1 - beta1) (g - m) and v += (1 - beta2) (g^2 - v) start from 0; t counts steps from 1. Elementwise, so the
    bits do not depend on the number of ranks. Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.

    Parameters
    ----------
    layer : ParallelLayer
        Whose weights move, in place.
    beta1, beta2, eps, weight_decay : float, optional

    Attributes
    ----------
    exp_avg, exp_avg_sq : {name: array}
        m and v of this rank's slices.
    master : {name: array}
        The weights that move: the layer's own or, for a 16-bit layer, float32 ones, which are rounded into the layer's
        after each step (Micikevicius et al., arXiv 1710.03740, section 3.1).
    """

    def __init__(self, layer: ParallelLayer, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8,
                 weight_decay: float = 0.1):
        for name, value in dict(beta1=beta1, beta2=beta2).items():
            require(0 <= value < 1, f"{name} = {value!r}", "a number from 0 to below 1")
        require(eps > 0, f"eps = {eps!r}", "a positive number")
        require(weight_decay >= 0, f"weight_decay = {weight_decay!r}", "a number from 0")
        self.layer, self.beta1, self.beta2, self.eps, self.weight_decay = layer, beta1, beta2, eps, weight_decay
        self.master = {name: w.astype(sum_dtype(w.dtype), copy=False) for name, w in layer.weights.items()}
        self.exp_avg, self.exp_avg_sq = ({name: (module_of(w) or np).zeros_like(w) for name, w in self.master.items()}
                                         for _ in range(2))

    def step(self, gradients: dict[str, Array], lr: float, t: int, scale: float = 1.0) -> None:
        """Move every weight.

        Parameters
        ----------
        gradients : {name: array}
            Of this rank's slices.
        lr : float
        t : int
            The number of this step, from 1.
        scale : float, optional
            What clipping multiplies the gradients by.
        """
        rate, root = lr / (1 - self.beta1 ** t), (1 - self.beta2 ** t) ** -0.5
        for name, spec in self.layer.specs.items():
            decay = 1 - lr * self.weight_decay if spec.decay else 1.0
            w, own = self.master[name], self.layer.weights[name]
            arrays = w, gradients[name], self.exp_avg[name], self.exp_avg_sq[name]
            adamw_step(*(array.reshape(-1) for array in arrays), beta1=self.beta1, beta2=self.beta2, rate=rate,
                       root=root, eps=self.eps, decay=decay, scale=scale,
                       rounded=None if own is w else own.reshape(-1))

    def round_weights(self) -> None:
        """Round the weights that move into those of a 16-bit layer."""
        for name, w in self.layer.weights.items():
            if self.master[name] is not w:
                w[...] = self.master[name]


def learning_rate(step: int, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """The learning rate rises linearly from lr / warmup to lr, then falls by half a cosine to min_lr at the last step.

    step : 0, 1, ..., steps - 1
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def gradient_norm(layer: ParallelLayer, gradients: dict[str, Array]) -> float:
    """Return the Euclidean norm of all gradients together, each parameter counted once, however many ranks hold it.

    A split parameter counts block by block on the ranks that own the blocks, a replicated one with block 0. So every
    rank gets the same number, even where copies differ, and all ranks clip or stop together.
    Collective: one all-reduce of 1 float64, the same bits for any number of ranks in reproducible mode.
    """
    group = layer.group
    every_block = group.partition(group.blocks)
    total = group.sum(every_block, (1,), "float64")
    for block in every_block.blocks_of(group.rank):
        total.add(block, block_square_sum(layer, gradients, block.index))
    squares = float(total.all_reduce()[0])
    return math.sqrt(squares) if squares >= 0 else math.nan


def block_square_sum(layer: ParallelLayer, gradients: dict[str, Array], number: int) -> Array:
    """Return the sum of squares (1,) of what this rank owns in one block; block 0 counts the replicated parameters."""
    group, total = layer.group, layer.group.xp.zeros(1, np.float64)
    for name, spec in layer.specs.items():
        if spec.axis is None:
            continue
        owned = gradients[name][spec.owned(group.place)]
        for block in spec.partition(group.place).blocks_of(group.rank):
            if block.index == number:
                window = [slice(None)] * owned.ndim
                window[spec.axis] = block.local
                total += square_sum(group.xp, owned[tuple(window)])
    if number == 0:
        for name, spec in layer.specs.items():
            if spec.axis is None:
                total += square_sum(group.xp, gradients[name])
    return total


def square_sum(xp: ModuleType, x: Array) -> Array:
    """Return the sum of squares of an array, a number of its module: nothing is copied to the host.

    The array is made contiguous first, so that the order in which BLAS adds does not depend on its strides.
    """
    flat = xp.ascontiguousarray(x).reshape(-1)
    return (flat @ flat).astype(np.float64)


def non_finite(layer: ParallelLayer, arrays: dict[str, Array],
               world: TensorParallelGroup | None = None) -> dict[str, list[int]] | None:
    """Find the parameters whose arrays hold NaN or infinity: on rank 0 {name: [ranks]}, elsewhere None. Collective.

    arrays : {name: array}, gradients or weights
    world : the ranks that are asked, where they are more than the layer's
    """
    mine = [name for name, g in arrays.items() if not bool(layer.group.xp.isfinite(g).all())]
    of_ranks = (world or layer.group).report(mine)
    if of_ranks is None:
        return None
    return {name: [rank for rank, names in enumerate(of_ranks) if name in names]
            for name in layer.specs if any(name in names for names in of_ranks)}
