"""Decoders in float16 and bfloat16 against float64: on a GPU, or `--device stand-in`.

What may be wrong is what rounding to 11 or 8 bits leaves after two layers: measured in units of it, the loss 0.7 and
the logits 5 at most; of a decoder's gradients, the median 12; of one, small where large terms cancel, up to 89. Sums
over ranks, gradients, norms, softmax and loss are float32, so that more ranks are not worse.
"""
import numpy as np
import pytest

import mpitp
from check_decoder import dense_decoder_results, dense_weights
from decoder_cases import KINDS, config
from mpitp.arrays import HALF_DTYPES
from mpitp.training.optimizer import AdamW

UNIT = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}
MOST = {"loss": 2, "logits": 10, "a gradient": 180, "gradients, the median": 24}      # units, by norms


def difference(found, expected, scale=None):
    """Norm of the difference over that of `scale`, by default of what is expected."""
    scale = expected if scale is None else scale
    found, expected, scale = (np.asarray(x, np.float64) for x in (found, expected, scale))
    return np.linalg.norm(found - expected) / np.linalg.norm(scale)


def problems(group, kind, dtype):
    """{what: its error in units of the dtype} of what lies above MOST, after one forward and backward."""
    configuration = config(kind)
    model = mpitp.Decoder(group, configuration, dtype=dtype, seed=0)
    weights = {name: w.astype(model.dtype).astype(float) for name, w in dense_weights(model.specs).items()}
    model.load_dense(weights)
    numbers = np.random.default_rng(0)
    ids, targets = numbers.integers(0, configuration.vocab_size, (2, 2, 7))
    logits, saved = model.forward(ids)
    loss, saved_loss = model.loss(logits, targets)
    gradients = model.backward(model.loss_backward(saved_loss), saved)
    assert all(g.dtype == np.float32 for g in gradients.values()) and logits.dtype == model.dtype
    found = {"logits": model.gather_logits(logits), "loss": loss, **group.comm.bcast(model.gather(gradients))}
    expected = dense_decoder_results(configuration, weights, ids, targets)
    # Without rotary a key's bias moves all scores of a query alike: its gradient is 0 but for rounding.
    scales = {name: expected[name.replace("key.bias", "query.bias")] for name in found}
    errors = {name: difference(value, expected[name], scales[name]) / UNIT[dtype] for name, value in found.items()}
    of_gradients = [errors[name] for name in gradients]
    errors = {"loss": errors["loss"], "logits": errors["logits"], "a gradient": max(of_gradients),
              "gradients, the median": np.median(of_gradients)}
    return {what: error for what, error in errors.items() if not error <= MOST[what]}


@pytest.fixture(autouse=True)
def only_where_16_bits_are_computed(group):
    if group.device == "cpu":
        pytest.skip("16-bit types are storage on the CPU")


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_decoder(group, kind, dtype):
    assert not problems(group, kind, dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_adamw_moves_float32_weights(group, dtype):
    """Steps that 8 bits could not hold add up; the layer has them rounded."""
    layer = mpitp.ColumnParallelLinear(group, 8, 24, dtype=dtype)
    before = {name: np.asarray(w.get(), np.float64) for name, w in layer.weights.items()}
    optimizer, steps = AdamW(layer, weight_decay=0.0), 20
    ones = {name: group.xp.ones(w.shape, np.float32) for name, w in layer.weights.items()}
    for t in range(1, steps + 1):
        optimizer.step(ones, 1e-5, t)
    for name, w in layer.weights.items():
        assert difference(optimizer.master[name].get(), before[name] - steps * 1e-5) < 1e-6
        assert w.get().tobytes() == optimizer.master[name].get().astype(layer.dtype).tobytes()
