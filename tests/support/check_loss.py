"""The split cross entropy against the plain one, as a function: the tests call it, and so do the planted faults."""
import numpy as np

from mpitp import oracle
from mpitp.layers import loss as loss_module
from mpitp.layers.loss import cross_entropy_collectives
from spmd import draw


def draw_targets(vocab, lead, ignore_index=-100, ignored=True):
    """The first and the last token among them, where there is room, and some that do not count."""
    targets = np.random.default_rng(7).integers(0, vocab, lead)
    flat = targets.reshape(-1)
    flat[:2] = (vocab - 1, 0)[:flat.size]
    if ignored:
        flat[2::3] = ignore_index
    return targets


def plain_loss(z, targets, label_smoothing, ignore_index, z_loss=0.0):
    """The mean loss and its gradient, token by token, from the whole logits in float64."""
    z = z.astype(float)
    rows, loss, dz = z.reshape(-1, z.shape[-1]), 0.0, np.zeros((targets.size, z.shape[-1]))
    count = (targets != ignore_index).sum()
    for n, target in enumerate(targets.reshape(-1)):
        if target != ignore_index:
            shifted = rows[n] - rows[n].max()
            log_p = shifted - np.log(np.exp(shifted).sum())
            q = np.full(len(log_p), label_smoothing / len(log_p))   # the smoothed labels
            q[target] += 1 - label_smoothing
            loss -= (q * log_p).sum() / count
            lse = np.log(np.exp(shifted).sum()) + rows[n].max()
            loss += z_loss * lse ** 2 / count
            dz[n] = (np.exp(log_p) * (1 + 2 * z_loss * lse) - q) / count
    return loss, dz.reshape(z.shape)


def whole_and_part(group, vocab, lead, dtype="float64", scale=1.0, seed=1):
    partition = group.partition(vocab)
    z = (draw(seed, *lead, vocab) * scale).astype(dtype)
    return partition, z, np.ascontiguousarray(z[..., partition.range(group.rank)])


def problems(group, vocab, label_smoothing=0.0, lead=(3, 4), dtype="float64", ignore_index=-100, ignored=True,
             scale=1.0, d_loss=1.0, z_loss=0.0):
    """Names of what the split cross entropy does otherwise than the plain one."""
    partition, z, mine = whole_and_part(group, vocab, lead, dtype, scale)
    targets = draw_targets(vocab, lead, ignore_index, ignored)
    before = mine.tobytes(), targets.tobytes()
    group.ledger.clear()
    loss, saved = loss_module.vocab_parallel_cross_entropy_forward(
        mine, targets, group, partition, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index)
    dz = loss_module.vocab_parallel_cross_entropy_backward(saved, d_loss)
    found = []
    if group.ledger.counts() != cross_entropy_collectives(targets.size, label_smoothing, dtype):
        found.append(f"ledger {dict(group.ledger.counts())}")
    if before != (mine.tobytes(), targets.tobytes()):
        found.append("an input was changed")
    if dz.dtype != mine.dtype or dz.shape != mine.shape or type(loss) is not float:
        found.append("shape or dtype")
    exact, exact_saved = oracle.cross_entropy.forward(oracle.Magnitude(z), targets, label_smoothing, ignore_index,
                                                      z_loss)
    if not oracle.compare(np.asarray(loss, dtype), exact).good:
        found.append("loss")
    exact_dz = oracle.cross_entropy.backward(exact_saved, d_loss)[..., partition.range(group.rank)]
    underflow = np.finfo(dtype).tiny / np.finfo(dtype).eps          # e^z of a logit far below the largest is 0
    if not oracle.compare(dz, exact_dz.value, exact_dz.size + underflow).good:
        found.append("gradient")
    return found


def require_none(found, group):
    found = group.comm.allgather(found)
    assert not any(found), f"problems by rank: {found}"


def seen_everywhere(group, found, *names):
    everywhere = set.intersection(*map(set, group.comm.allgather(found)))
    assert set(names) <= everywhere, f"expected {names} to fail, found {everywhere}"
