"""Training on one process, in float64, every formula by hand: what the loop over ranks must print and hold."""
import math

import numpy as np

from mpitp import oracle
from mpitp.ops.dropout import dropout_scale


def masks(configuration, seed, step):
    """The dropout of a decoder: the numbers that the addresses (seed, layer, step, position) say, of whole arrays."""
    def scale(name, shape, probability):
        if not probability:
            return 1
        return dropout_scale(seed, name, step, probability, shape, tuple(slice(0, n) for n in shape), float)
    return scale


def mean_loss(w, configuration, batches, **options):
    """The mean loss over all tokens of some batches, in nats, without dropout."""
    losses = []
    for ids, targets in batches:
        logits, _ = oracle.decoder.forward(ids, w, configuration)
        losses += [float(oracle.cross_entropy.forward(row[None], target[None], **options)[0])
                   for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))]
    return float(np.mean(losses))


def dense_steps(made, weights, steps):
    """The steps of a Trainer on one process: (weights, exp_avg, exp_avg_sq, figures of each step)."""
    s, configuration, figures = made.settings, made.config, []
    size, count = s.micro_batch_size, s.gradient_accumulation
    if made.group.reproducible:                 # each sequence has dropout masks of its own number
        size, count = 1, size * count
    w = {name: array.copy() for name, array in weights.items()}
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in range(2))
    for step in range(steps):
        g, losses = {name: np.zeros_like(array) for name, array in w.items()}, []
        for number in range(step * count, (step + 1) * count):
            ids, targets = made.tokens.batch(number, size)
            dropout = masks(configuration, s.seed, number)
            logits, saved = oracle.decoder.forward(ids, w, configuration, None, dropout)
            loss, saved_loss = oracle.cross_entropy.forward(logits, targets, s.label_smoothing, z_loss=s.z_loss)
            d_logits = oracle.cross_entropy.backward(saved_loss, 1 / count)
            found = oracle.decoder.backward(d_logits, saved)
            g = {name: g[name] + found[name] for name in g}
            losses.append(float(loss))
        norm = math.sqrt(sum((array * array).sum() for array in g.values()))
        if norm > s.clip_grad:
            g = {name: array * s.clip_grad / norm for name, array in g.items()}
        lr = s.lr * (step + 1) / s.warmup if step < s.warmup else s.min_lr + (s.lr - s.min_lr) * 0.5 * (
            1 + math.cos(math.pi * (step - s.warmup) / (s.train_iters - 1 - s.warmup)))
        for name in w:
            m[name] = s.adam_beta1 * m[name] + (1 - s.adam_beta1) * g[name]
            v[name] = s.adam_beta2 * v[name] + (1 - s.adam_beta2) * g[name] ** 2
            m_hat, v_hat = m[name] / (1 - s.adam_beta1 ** (step + 1)), v[name] / (1 - s.adam_beta2 ** (step + 1))
            decay = s.weight_decay if w[name].ndim == 2 else 0
            w[name] = w[name] - lr * (m_hat / (np.sqrt(v_hat) + s.adam_eps) + decay * w[name])
        figures.append({"loss": sum(losses) / len(losses), "gradient_norm": norm, "lr": lr})
    return w, m, v, figures
