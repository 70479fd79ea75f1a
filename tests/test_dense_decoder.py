"""The oracle on trial: gradients of the dense decoder against numeric differences, and what formulas must satisfy."""
import numpy as np
import pytest

from decoder_cases import KINDS, config
from golden_decoder import SMOOTHING, ids_and_targets, weights_of
from mpitp import oracle
from mpitp.oracle.block import no_dropout
from mpitp.oracle.linear import part
from mpitp.oracle.positions import alibi_slopes
from spmd import draw

STEP = 1e-5


def gradients_and_loss(configuration, mask=None, dropout=no_dropout):
    """{name: gradient} at weights_of(configuration), the weights, and the loss as a function of weights."""
    weights, (ids, targets) = weights_of(configuration), ids_and_targets(configuration)

    def forward(w):
        logits, saved = oracle.decoder.forward(ids, w, configuration, mask, dropout)
        loss, saved_loss = oracle.cross_entropy.forward(logits, targets, SMOOTHING)
        return loss, saved, saved_loss

    _, saved, saved_loss = forward(weights)
    gradients = oracle.decoder.backward(oracle.cross_entropy.backward(saved_loss), saved)
    return gradients, weights, lambda w: float(forward(w)[0])


def require_numeric(gradients, weights, loss):
    """loss(w + e d) - loss(w - e d) over 2 e = <gradient, d>, for a random direction d of each parameter."""
    assert gradients.keys() == weights.keys()
    for number, (name, w) in enumerate(weights.items()):
        assert gradients[name].shape == w.shape and gradients[name].dtype == w.dtype, name
        d = draw(number, *w.shape)
        numeric = (loss({**weights, name: w + STEP * d}) - loss({**weights, name: w - STEP * d})) / (2 * STEP)
        terms = gradients[name] * d
        assert abs(numeric - terms.sum()) <= 1e-6 * np.abs(terms).sum() + 1e-9, (name, numeric, terms.sum())


def scales(name, shape, probability):
    """Dropout by the name: 0 or 1 / (1 - p)."""
    kept = np.random.default_rng(list(name.encode())).random(shape) >= probability
    return kept / (1 - probability)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    require_numeric(*gradients_and_loss(config(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_dropout_and_a_mask_per_query(kind):
    """Queries that may attend to nothing among them."""
    mask = np.random.default_rng(0).random((2, 7, 7)) < 0.6
    assert not np.tril(mask).any(axis=-1).all()
    configuration = config(kind, hidden_dropout=0.3, attention_dropout=0.4)
    require_numeric(*gradients_and_loss(configuration, mask, scales))


@pytest.mark.parametrize("placement", ["before", "after", "after_residual", "both"])
@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
def test_gradients_of_each_norm_placement(placement, normalization):
    configuration = config("gpt2", norm_placement=placement, normalization=normalization, hidden_dropout=0.2,
                           embedding_norm=True)
    mask = np.ones((2, 7), bool)
    mask[0, :2] = False
    require_numeric(*gradients_and_loss(configuration, mask, scales))


def test_the_difference_sees_a_wrong_gradient():
    gradients, weights, loss = gradients_and_loss(config("gemma3"))
    for name in gradients:
        wrong = {**gradients, name: gradients[name] * (1 + 1e-4)}
        with pytest.raises(AssertionError):
            require_numeric(wrong, weights, loss)


# --- what the formulas must satisfy --------------------------------------------------------------------------------

def logits_of(configuration, ids, mask=None, weights=None):
    return oracle.decoder.forward(ids, weights or weights_of(configuration), configuration, mask)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_logit_depends_on_later_tokens_or_masked_ones(kind):
    configuration = config(kind)
    ids, _ = ids_and_targets(configuration)
    changed = ids.copy()
    changed[:, 4] = (ids[:, 4] + 1) % configuration.vocab_size
    before, after = logits_of(configuration, ids), logits_of(configuration, changed)
    assert (before[:, :4] == after[:, :4]).all() and (before[:, 4:] != after[:, 4:]).any(axis=-1).all()
    mask = np.arange(7)[None].repeat(2, axis=0) != 4
    masked = logits_of(configuration, ids, mask), logits_of(configuration, changed, mask)
    rest = np.arange(7) != 4
    assert (masked[0][:, rest] == masked[1][:, rest]).all()


def test_a_window_hides_what_is_further_away():
    """One layer, 3 positions: token 4 sees 2, 3 and itself."""
    configuration = config("llama, one kv head", num_layers=1, sliding_window=3)
    ids, _ = ids_and_targets(configuration)
    base = logits_of(configuration, ids)[:, 4]
    for position, seen in enumerate([False, False, True, True, True, False, False]):
        changed = ids.copy()
        changed[:, position] = (ids[:, position] + 1) % 27
        assert (logits_of(configuration, changed)[:, 4] != base).any() == seen, position


def test_a_query_that_may_attend_to_nothing_gets_the_outputs_bias():
    configuration = config("gpt2", num_layers=1)
    w = part(weights_of(configuration), "layers.0.attention")
    x, mask = draw(0, 2, 7, 20), np.ones((2, 7), bool)
    mask[0, :3] = False
    y, saved = oracle.attention.forward(x, w, configuration, mask=mask)
    assert (y[0, :3] == w["out.bias"]).all() and (y[0, 3:] != w["out.bias"]).any()
    dy = np.zeros_like(x)
    dy[0, :3] = 1
    dx, gradients = oracle.attention.backward(dy, saved)
    assert (dx == 0).all() and all((g == 0).all() for name, g in gradients.items() if name != "out.bias")


def attention_weights(x, w, configuration):
    """p (B, H, S, S): what the softmax of one attention returns."""
    with pytest.MonkeyPatch.context() as patch:
        found, softmax = [], oracle.attention.softmax_forward
        patch.setattr(oracle.attention, "softmax_forward", lambda *z: found.append(softmax(*z)) or found[-1])
        oracle.attention.forward(x, w, configuration)
    return found[0]


@pytest.mark.parametrize("kind", ["llama, one kv head", "gpt_neox", "falcon", "bloom"])
def test_scores_depend_on_distance_alone(kind):
    """Rotary and ALiBi: the first token's query and key at other positions, the same difference, the same score."""
    configuration = config(kind, num_layers=1)
    w = part(weights_of(configuration), "layers.0.attention")
    x = draw(1, 1, 1, 20).repeat(7, axis=1)
    p = attention_weights(x, w, configuration)[0]
    for later in range(2, 7):                               # p of two keys: their ratio is exp(difference of scores)
        np.testing.assert_allclose(p[:, later, later - 1] / p[:, later, later], p[:, 1, 0] / p[:, 1, 1], rtol=1e-12)


def test_alibi_slopes_by_hand():
    """Press et al., arXiv 2108.12409, and its code for 6 heads: those of 4, then every other one of those of 8."""
    assert alibi_slopes(1).tolist() == [2.0 ** -8]
    assert alibi_slopes(4).tolist() == [2.0 ** -2, 2.0 ** -4, 2.0 ** -6, 2.0 ** -8]
    assert alibi_slopes(6).tolist() == [2.0 ** -2, 2.0 ** -4, 2.0 ** -6, 2.0 ** -8, 2.0 ** -1, 2.0 ** -3]


def cross_entropy(*arguments, **options):
    loss, saved = oracle.cross_entropy.forward(*arguments, **options)
    return loss, oracle.cross_entropy.backward(saved)


def test_cross_entropy_by_hand():
    """Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    logits, targets = np.log([[[1.0, 2.0, 5.0], [3.0, 3.0, 3.0]]]), np.array([[2, -100]])
    loss, d_logits = cross_entropy(logits, targets)
    assert np.isclose(loss, np.log(8 / 5)) and np.allclose(d_logits, [[[1 / 8, 2 / 8, -3 / 8], [0, 0, 0]]])
    _, saved = oracle.cross_entropy.forward(logits, targets)
    assert np.allclose(oracle.cross_entropy.backward(saved, d_loss=-2.0), -2 * d_logits)
    smooth, _ = cross_entropy(logits, targets, 0.3)
    assert np.isclose(smooth, 0.7 * np.log(8 / 5) + 0.3 * (np.log(8) - np.log(10) / 3))
    nothing, d_logits = cross_entropy(logits, np.array([[7, 7]]), 0.3, ignore_index=7)
    assert nothing == 0 and (d_logits == 0).all()


def test_inputs_are_not_changed_and_float32_stays():
    for kind in KINDS:
        configuration = config(kind)
        weights = {name: w.astype("f") for name, w in weights_of(configuration).items()}
        copies = {name: w.copy() for name, w in weights.items()}
        ids, targets = ids_and_targets(configuration)
        logits, saved = oracle.decoder.forward(ids, weights, configuration)
        loss, d_logits = cross_entropy(logits, targets, SMOOTHING)
        gradients = oracle.decoder.backward(d_logits, saved)
        assert {a.dtype for a in (logits, loss, d_logits, *gradients.values())} == {np.dtype("f")}, kind
        assert all((weights[name] == copies[name]).all() for name in weights), kind
