"""The checks of the decoder and its layers against dense, as functions: tests call them, and so do planted faults."""
import numpy as np

import mpitp
from mpitp import oracle
from mpitp.layers.loss import cross_entropy_collectives
from mpitp.oracle.block import no_dropout
from mpitp.oracle.magnitude import numbers_of
from mpitp.ops.dropout import dropout_scale
from spmd import draw

STEP = 3


def dense_weights(specs, seed=0):
    """Random dense weights, biases and norms away from where they start, in float32's numbers, so exact in both."""
    weights = {}
    for number, (name, spec) in enumerate(specs.items()):
        scale = spec.shape[-1] ** -0.5 if len(spec.shape) == 2 else 0.3
        centre = 1.0 if len(spec.shape) == 1 and name.endswith("weight") else 0.0
        weights[name] = draw(seed + number, *spec.shape, dtype="f").astype(float) * np.float32(scale) + centre
    return {name: w.astype("f").astype(float) for name, w in weights.items()}


def dropout_of(seed, dtype=float):
    """The dense decoder's dropout: the numbers that the layers' addresses say, of the whole array."""
    def scale(name, shape, probability):
        if not probability:
            return 1
        return dropout_scale(seed, name, STEP, probability, shape, tuple(slice(0, n) for n in shape), dtype)
    return scale


def dense_decoder_results(configuration, weights, ids, targets, mask=None, dropout=no_dropout, label_smoothing=0.0):
    """{"logits", "loss", "d_logits", and the gradient of every weight} on one process."""
    logits, saved = oracle.decoder.forward(ids, weights, configuration, mask, dropout)
    loss, saved_loss = oracle.cross_entropy.forward(logits, targets, label_smoothing)
    d_logits = oracle.cross_entropy.backward(saved_loss)
    return {"logits": logits, "loss": loss, "d_logits": d_logits, **oracle.decoder.backward(d_logits, saved)}


def over_the_limit(found, dense, weights, *inputs):
    """Names of what lies further from exact than the accuracy formula allows; see oracle.compare_all."""
    return [comparison.name for comparison in oracle.compare_all(found, dense, weights, *inputs)
            if not (comparison.good and comparison.near)]


def decoder_problems(group, configuration, shape=(2, 7), dtype="float64", dropout=False, mask=False,
                     label_smoothing=0.0, seed=0, make=mpitp.Decoder):
    """What is wrong with Decoder against dense: names of results over the limit, and what else was expected."""
    model = make(group, configuration, dtype=dtype, seed=seed)
    weights = dense_weights(model.specs, seed)
    model.load_dense(weights)
    numbers = np.random.default_rng(seed)
    ids, targets = numbers.integers(0, configuration.vocab_size, (2, *shape))
    targets[..., -2] = -100
    may_see = numbers.random((*shape, shape[1])) < 0.7 if mask else None
    step = STEP if dropout else None
    group.ledger.clear()
    logits, saved = model.forward(ids, mask=may_see, step=step)
    loss, saved_loss = model.loss(logits, targets, label_smoothing=label_smoothing)
    d_logits = model.loss_backward(saved_loss)
    gradients = model.backward(d_logits, saved)
    counts = group.ledger.counts()
    expected = sum(model.collectives(ids.size), cross_entropy_collectives(ids.size, label_smoothing, model.dtype))
    problems = [] if counts == expected else [f"ledger {dict(counts)}, expected {dict(expected)}"]
    whole = {"logits": model.gather_logits(logits), "d_logits": model.gather_logits(d_logits)}
    found = {"logits": whole["logits"], "loss": np.asarray(loss, model.dtype), "d_logits": whole["d_logits"],
             **group.comm.bcast(model.gather(gradients))}

    def dense(w):
        dtype_of_w = numbers_of(next(iter(w.values()))).dtype
        scales = dropout_of(seed, dtype_of_w) if dropout else no_dropout
        return dense_decoder_results(configuration, w, ids, targets, may_see, scales, label_smoothing)

    return problems + over_the_limit(found, dense, weights)
