"""AdamW, the learning rate's schedule, and the norm of all gradients. Each rank moves its own slices."""
import math

import numpy as np

from ..arrays import module_of
from ..errors import require
from ..partition import Partition

PIECE = 1 << 15     # numbers at a time: a step is memory traffic, so what it makes stays in cache


class AdamW:
    """w -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w); no decay where the spec says so.

    m += (1 - beta1) (g - m) and v += (1 - beta2) (g^2 - v) start from 0; t counts steps from 1. Elementwise, so the
    bits do not depend on the number of ranks. Loshchilov and Hutter (arXiv 1711.05101), algorithm 2.

    Attributes
    ----------
    exp_avg, exp_avg_sq : {name: array}, m and v of this rank's slices
    """

    def __init__(self, layer, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1):
        for name, value in dict(beta1=beta1, beta2=beta2).items():
            require(0 <= value < 1, f"{name} = {value!r}", "a number from 0 to below 1")
        require(eps > 0, f"eps = {eps!r}", "a positive number")
        require(weight_decay >= 0, f"weight_decay = {weight_decay!r}", "a number from 0")
        self.layer, self.beta1, self.beta2, self.eps, self.weight_decay = layer, beta1, beta2, eps, weight_decay
        self.exp_avg, self.exp_avg_sq = ({name: module_of(w).zeros_like(w) for name, w in layer.weights.items()}
                                         for _ in range(2))

    def step(self, gradients, lr, t, scale=1.0):
        """Move every weight. t : the number of this step, from 1. scale : of the gradients, as clipping asks for."""
        for name, spec in self.layer.specs.items():
            decay = 1 - lr * self.weight_decay if spec.decay else 1.0
            arrays = (self.layer.weights[name], gradients[name], self.exp_avg[name], self.exp_avg_sq[name])
            self.move(*(array.reshape(-1) for array in arrays), decay, lr, t, scale)

    def move(self, w, g, m, v, decay, lr, t, scale):
        xp = module_of(w)
        rate, root = lr / (1 - self.beta1 ** t), (1 - self.beta2 ** t) ** -0.5
        piece = PIECE if xp is np else max(1, w.size)
        for at in range(0, w.size, piece):
            w_n, g_n, m_n, v_n = (array[at:at + piece] for array in (w, g, m, v))
            g_n = g_n * scale if scale != 1 else g_n
            change_n = g_n - m_n
            change_n *= 1 - self.beta1
            m_n += change_n
            xp.multiply(g_n, g_n, out=change_n)
            change_n -= v_n
            change_n *= 1 - self.beta2
            v_n += change_n
            xp.sqrt(v_n, out=change_n)
            change_n *= root
            change_n += self.eps
            xp.divide(m_n, change_n, out=change_n)
            change_n *= rate
            if decay != 1:
                w_n *= decay
            w_n -= change_n


def learning_rate(step, lr, min_lr, warmup, steps):
    """Of step 0, 1, ...: linear from lr / warmup to lr, then half a cosine to min_lr at the last step."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def gradient_norm(layer, gradients):
    """The Euclidean norm of all gradients together, each parameter counted once, however many ranks hold it.

    A split parameter counts block by block on the ranks that own the blocks, a replicated one with block 0: what every
    rank gets is one number, even where copies differ, so that all clip, or stop, alike.
    Collective: one all-reduce of 1 float64, the same bits for any number of ranks in reproducible mode.
    """
    group, where = layer.group, (layer.group.rank, layer.group.size, layer.group.blocks)
    split = {name: spec for name, spec in layer.specs.items() if spec.axis is not None}
    replicated = [gradients[name] for name, spec in layer.specs.items() if spec.axis is None]

    def of_block(number):
        total = group.xp.zeros(1, np.float64)
        for name, spec in split.items():
            owned = gradients[name][spec.owned(*where)]
            for block in spec.partition(*where[1:]).blocks_of(group.rank):
                if block.index == number.index:
                    window = [slice(None)] * owned.ndim
                    window[spec.axis] = block.local
                    total += square_sum(owned[tuple(window)])
        if number.index == 0:
            for g in replicated:
                total += square_sum(g)
        return total

    every_block = Partition(group.blocks, group.size, group.blocks)
    total = group.sum_blocks(of_block, every_block, (1,), np.float64)
    return math.sqrt(float(total[0])) if total[0] >= 0 else math.nan


def square_sum(x):
    """The sum of squares of an array, as a number: products of rows without gaps, which BLAS adds up alike anywhere."""
    flat = module_of(x).ascontiguousarray(x).reshape(-1)
    return float(flat @ flat)


def non_finite(layer, gradients):
    """On rank 0 the parameters whose gradients hold NaN or infinity, {name: [ranks]}; None elsewhere. Collective.

    gradients : {name: array}, or the weights themselves
    """
    mine = [name for name, g in gradients.items() if not bool(module_of(g).isfinite(g).all())]
    of_ranks = layer.group.report(mine)
    if of_ranks is None:
        return None
    return {name: [rank for rank, names in enumerate(of_ranks) if name in names]
            for name in layer.specs if any(name in names for names in of_ranks)}
