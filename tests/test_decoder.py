"""The decoder over ranks: gradients by numeric differences, counted collectives, one rank against several."""
import numpy as np
import pytest

import mpitp
from decoder_cases import KINDS, config
from mpitp.layers.loss import cross_entropy_collectives
from spmd import draw

B, S = 2, 7


def data(vocab=27):
    numbers = np.random.default_rng(0)
    ids, targets = numbers.integers(0, vocab, (2, B, S))
    targets[0, 2], targets[1, 6] = -100, -100
    return ids, targets, numbers.random((B, S, S)) < 0.8


def loaded(group, configuration, dtype="float64", seed=0):
    """A decoder whose weights, biases and norms included, are away from where they start."""
    model = mpitp.Decoder(group, configuration, dtype=dtype, seed=seed)
    weights = {name: draw(number, *spec.shape) * (0.4 if len(spec.shape) == 2 else 0.3) + (len(spec.shape) == 1)
               for number, (name, spec) in enumerate(model.specs.items())}
    model.load_dense(weights)
    return model, weights


def loss_of(model, ids, targets, mask, save=False):
    logits, kept = model.forward(ids, mask=mask, step=3, save=save)
    loss, kept_loss = model.loss(logits, targets, label_smoothing=0.1)
    return loss, kept, kept_loss


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_numeric_differences(group, kind):
    """d loss along a direction through all parameters at once: the inner product with the gradients of owned parts."""
    model, weights = loaded(group, config(kind, hidden_dropout=0.1, attention_dropout=0.2))
    ids, targets, mask = data()
    _, saved, saved_loss = loss_of(model, ids, targets, mask, save=True)
    gradients = group.comm.bcast(model.gather(model.backward(model.loss_backward(saved_loss), saved)))
    for seed in range(2):
        along = {name: draw(1000 * (seed + 1) + i, *w.shape) for i, (name, w) in enumerate(weights.items())}
        losses = []
        for eps in (1e-6, -1e-6):
            model.load_dense({name: w + eps * along[name] for name, w in weights.items()})
            losses.append(loss_of(model, ids, targets, mask)[0])
        numeric = (losses[0] - losses[1]) / 2e-6
        analytic = sum((gradients[name] * along[name]).sum() for name in weights)
        assert abs(numeric - analytic) <= 1e-5 * max(1, abs(analytic)), (numeric, analytic)


@pytest.mark.parametrize("part", ["attention", "mlp", None])
@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_identity(group, kind, part):
    """<dy, J u> = <J* dy, u> for the part and the whole of a block, x and y being one tensor on however many ranks."""
    block = mpitp.ParallelBlock(group, config(kind), dtype="float64", seed=7)
    layer = getattr(block, part) if part else block
    x, dy, u = (draw(number, B, S, 20) for number in range(3))
    y, saved = layer.forward(x)
    dx, _ = layer.backward(dy, saved)
    along = (layer.forward(x + 1e-6 * u, save=False)[0] - layer.forward(x - 1e-6 * u, save=False)[0]) / 2e-6
    assert (dy * along).sum() == pytest.approx((dx * u).sum(), rel=1e-6, abs=1e-8)
    assert group.comm.allgather(dx.tobytes()) == [dx.tobytes()] * group.size        # every rank has the same bits


@pytest.mark.parametrize("kind", KINDS)
def test_collectives_are_the_closed_form(group, kind):
    model, _ = loaded(group, config(kind))
    ids, targets, mask = data()
    forward, backward = model.collectives(B * S)
    group.ledger.clear()
    logits, saved = model.forward(ids)
    assert group.ledger.counts() == forward
    loss, saved_loss = model.loss(logits, targets, label_smoothing=0.1)
    of_loss = cross_entropy_collectives(B * S, 0.1, model.dtype)
    assert group.ledger.counts() == forward + of_loss
    d_logits = model.loss_backward(saved_loss)
    model.backward(d_logits, saved)
    assert group.ledger.counts() == forward + of_loss + backward
    whole = model.gather_logits(logits)
    assert whole.shape == (B, S, 27)
    group.ledger.clear()


def all_reduces(group, **more):
    """{elements: calls} of a decoder's forward and backward, by what the ledger counts."""
    model, _ = loaded(group, config("llama, one kv head", **more))
    ids = data()[0]
    found = []
    for step in ("forward", "backward"):
        group.ledger.clear()
        if step == "forward":
            logits, saved = model.forward(ids)
        else:
            model.backward(np.zeros_like(logits), saved)
        counts = group.ledger.counts()
        assert all(key.operation == "all_reduce" and key.dtype == "float64" for key in counts)
        found.append({key.elements: calls for key, calls in counts.items()})
    return found


def test_collectives_by_hand(group):
    """Megatron's count, in numbers: N = 14 tokens, D = 20, K = 6, two layers, embedding and head."""
    N, D, K = B * S, 20, 6
    shared = {2 * N * K: 2} if group.size > 1 else {}                   # one kv head of several ranks, two layers
    assert all_reduces(group) == [{N * D: 1 + 4}, {N * D: 4 + 1, **shared}]
    assert all_reduces(group, parallel_residual=True) == [{N * D: 1 + 2}, {2 * N * D: 2, N * D: 1, **shared}]
    assert all_reduces(group, parallel_residual=True, shared_norm=True) == [{N * D: 1 + 2}, {N * D: 2 + 1, **shared}]
    assert all_reduces(group, qk_norm=True) == [{N * D: 1 + 4}, {N * D: 4 + 1, 2 * K: 2, **shared}]
    assert all_reduces(group, num_query_groups=5) == [{N * D: 1 + 4}, {N * D: 4 + 1}]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_given_changes(group, kind):
    model, _ = loaded(group, config(kind), dtype="float32")
    ids, targets, mask = data()
    logits, saved = model.forward(ids, mask=mask, step=0)
    _, saved_loss = model.loss(logits, targets)
    d_logits = model.loss_backward(saved_loss)
    given = ids, targets, mask, logits, d_logits, *model.weights.values()
    before = [array.tobytes() for array in given]
    gradients = model.backward(d_logits, saved)
    assert [array.tobytes() for array in given] == before
    assert all(g.dtype == np.float32 and g.shape == model.weights[name].shape for name, g in gradients.items())
    assert logits.dtype == d_logits.dtype == np.float32
    kept = {name: g.copy() for name, g in gradients.items()}
    for g in gradients.values():
        g.fill(np.nan)                                                  # every number of `out` is written again
    assert model.backward(d_logits, model.forward(ids, mask=mask, step=0)[1], out=gradients) is gradients
    assert all(gradients[name].tobytes() == kept[name].tobytes() for name in kept)
    again, nothing = model.forward(ids, mask=mask, step=0, save=False)
    assert nothing is None and again.tobytes() == logits.tobytes()


def test_same_model_on_any_number_of_ranks(group, world):
    """Initial weights, and dropout masks: another seed, name or step is another mask."""
    configuration = config("gemma3", hidden_dropout=0.3, attention_dropout=0.3)
    ids = data()[0]
    with mpitp.TensorParallelGroup(world.Split(world.rank)) as alone:
        one, many = (mpitp.Decoder(g, configuration, dtype="float64", seed=5) for g in (alone, group))
        dense = many.gather()
        assert dense is None or all(dense[name].tobytes() == w.tobytes() for name, w in one.weights.items())
        outputs = []
        for step in (None, 0, 1):
            a, b = one.forward(ids, step=step)[0], many.gather_logits(many.forward(ids, step=step)[0])
            assert np.abs(a - b).max() < 1e-12
            outputs.append(a)
        assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(outputs, outputs[1:]))


def test_leading_axes_and_no_tokens(group):
    model, _ = loaded(group, config("llama, one kv head"))
    ids = data()[0]
    flat = model.forward(ids)[0]
    assert model.forward(ids.reshape(2, 1, 7))[0].tobytes() == flat.tobytes()
    assert np.abs(model.forward(ids[0])[0] - flat[0]).max() < 1e-12
    for shape in ((0, 7), (2, 0)):
        logits, saved = model.forward(np.zeros(shape, int))
        assert logits.shape[:2] == shape
        gradients = model.backward(np.zeros_like(logits), saved)
        assert all((g == 0).all() for g in gradients.values())


def test_each_sequence_of_a_batch_stands_alone(group):
    model, _ = loaded(group, config("bloom"))
    ids, _, mask = data()
    both = model.forward(ids, mask=mask)[0]
    for b in range(B):
        assert np.abs(model.forward(ids[b:b + 1], mask=mask[b:b + 1])[0] - both[b:b + 1]).max() < 1e-12


def test_causal(group):
    """A later token changes nothing before it; with a window, an early one nothing far behind it."""
    ids = data()[0]
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 27
    for kind in KINDS:
        model, _ = loaded(group, config(kind))
        a, b = (model.gather_logits(model.forward(x)[0]) for x in (ids, changed))
        assert np.abs(a - b)[:, :4].max() == 0 and np.abs(a - b)[:, 4:].max() > 0
    model, _ = loaded(group, config("llama, one kv head", sliding_window=2))
    a, b = (model.gather_logits(model.forward(x)[0]) for x in (ids, np.concatenate([changed[:, 4:5], ids[:, 1:]], 1)))
    assert np.abs(a - b)[:, 3:].max() == 0 and np.abs(a - b)[:, 2].max() > 0        # two layers see one position each




def test_parameters_by_their_names_inside(group):
    """A layer made of layers has them as its layers do; None where there is no such one."""
    model = mpitp.Decoder(group, config("llama, one kv head", num_layers=1))
    assert model.parameter("layers.0.mlp.up.weight") is model.weights["layers.0.mlp.up.weight"]
    assert model.blocks[0].parameter("mlp.up.weight") is model.weights["layers.0.mlp.up.weight"]
    assert model.blocks[0].attention.parameter("query.weight") is model.weights["layers.0.attention.query.weight"]
    assert model.parameter("no.such") is None and model.blocks[0].parameter("up.weight") is None
