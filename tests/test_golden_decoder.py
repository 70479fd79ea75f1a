"""The decoder over ranks, and the dense one, against PyTorch's numbers: loss, logits, every gradient, every kind."""
import numpy as np
import pytest

import mpitp
from check_decoder import dense_decoder_results
from golden_decoder import CASES, SMOOTHING, differences, golden_cases, shapes, summary

GOLDEN = {kind: rest for kind, *rest in golden_cases()}
EVERY = pytest.mark.parametrize("kind", GOLDEN)


def by_dense(config, weights, ids, targets, mask):
    found = dense_decoder_results(config, weights, ids, targets, mask, label_smoothing=SMOOTHING)
    del found["d_logits"]
    return summary(found.pop("logits"), found.pop("loss"), found)


def by_decoder(group, config, weights, ids, targets, mask):
    model = mpitp.Decoder(group, config, dtype="float64", seed=None)
    model.load_dense(weights)
    logits, saved = model.forward(ids, mask=mask)
    loss, saved_loss = model.loss(logits, targets, label_smoothing=SMOOTHING)
    gradients = group.comm.bcast(model.gather(model.backward(model.loss_backward(saved_loss), saved)))
    return summary(model.gather_logits(logits), loss, gradients)


def test_the_file_has_these_cases_and_parameters():
    assert GOLDEN.keys() == CASES.keys()
    for kind, (_, weights, *_, expected) in GOLDEN.items():
        assert expected.keys() - {"loss", "logits"} == weights.keys(), kind


@EVERY
def test_names_and_shapes_of_parameters(group, kind):
    config, *_ = GOLDEN[kind]
    model = mpitp.Decoder(group, config, seed=None)
    assert {name: spec.shape for name, spec in model.specs.items()} == shapes(config)


@EVERY
def test_decoder(group, kind):
    *case, expected = GOLDEN[kind]
    assert differences(by_decoder(group, *case), expected) == []


@EVERY
def test_dense_decoder(kind):
    *case, expected = GOLDEN[kind]
    assert differences(by_dense(*case), expected) == []


@EVERY
def test_a_millionth_of_any_parameter_is_seen(kind):
    """But for a key's bias without rotary positions: it adds the same to all scores of a query."""
    config, weights, *rest, expected = GOLDEN[kind]
    for name, value in weights.items():
        wrong = value.copy()
        row = rest[0][0, 0] if name in ("embedding.weight", "head.weight") else 0   # of a token that occurs
        wrong[(row, 0) if value.ndim == 2 else row] += 1e-6
        without_effect = name.endswith("key.bias") and config.position_embedding != "rotary" and not config.qk_norm
        assert bool(differences(by_dense(config, {**weights, name: wrong}, *rest), expected)) != without_effect, name


def test_a_millionth_is_seen_over_ranks(group):
    config, weights, *rest, expected = GOLDEN["gemma3, mask"]
    for name in ("layers.0.attention.key.weight", "layers.1.mlp.gate.weight", "embedding.weight"):
        wrong = {**weights, name: weights[name] * (1 + 1e-6 * (np.arange(len(weights[name])) == 3)[:, None])}
        assert len(differences(by_decoder(group, config, wrong, *rest), expected)) > 1, name


def test_every_part_of_a_result_counts():
    *case, expected = GOLDEN["gpt2"]
    found = by_dense(*case)
    for name, numbers in found.items():
        for place in range(len(numbers)):
            wrong = list(numbers)
            wrong[place] += 1e-8 * max(map(abs, numbers)) + 1e-12
            assert differences({**found, name: wrong}, expected) == [name]
    missing = {name: numbers for name, numbers in found.items() if name != "position.weight"}
    assert differences(missing, expected) == ["position.weight"]
    assert differences({**found, "loss": [float("nan")]}, expected) == ["loss"]
