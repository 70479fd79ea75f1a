"""The decoder over ranks against the dense one: outputs, loss and every gradient, within the accuracy formula."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from check_decoder import decoder_problems, dense_weights
from decoder_cases import KINDS, config
from spmd import everywhere


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(group, kind, dtype):
    """5 query heads, 1 key/value head, head size 6 with hidden 20, a vocabulary that the ranks do not divide."""
    configuration = config(kind, vocab_size=13 * group.size + 1)
    assert decoder_problems(group, configuration, dtype=dtype) == []


@pytest.mark.parametrize("kind", KINDS)
def test_with_mask_dropout_and_label_smoothing(group, kind):
    configuration = config(kind, hidden_dropout=0.1, attention_dropout=0.2)
    assert decoder_problems(group, configuration, dropout=True, mask=True, label_smoothing=0.1) == []


def test_sequences_longer_than_a_tile(group):
    for kind in ("llama, one kv head", "gemma3", "bloom"):
        assert decoder_problems(group, config(kind, num_layers=1, sliding_window=50, rotary=None), shape=(1, 131)) == []


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(groups=st.integers(1, 4), share=st.integers(1, 4), head=st.integers(1, 5), hidden=st.integers(1, 11),
       ffn=st.integers(1, 9), vocab=st.integers(1, 19), tokens=st.integers(2, 9), kind=st.sampled_from(list(KINDS)),
       fixed=st.booleans())
def test_any_size(groups, share, head, hidden, ffn, vocab, tokens, kind, fixed):
    configuration = config(kind, num_attention_heads=groups * share, num_query_groups=groups, kv_channels=2 * head,
                           hidden_size=hidden, ffn_hidden_size=ffn, vocab_size=vocab, num_layers=1, sliding_window=None,
                           rotary=mpitp.Rotary(base=100.0))
    # One feature, normalised, is its sign: the gradient through it is the difference of equal numbers.
    configuration = config(kind, **{**configuration.__dict__, "norm_epsilon": 0.1})
    with mpitp.TensorParallelGroup(reproducible=fixed, check=True) as group:
        problems = decoder_problems(group, configuration, shape=(1, tokens))
    assert everywhere(not problems), problems


def test_weights_that_ranks_share_are_equal(group):
    """A key/value head of several ranks: the same weights and the same gradient on each holder, to the bit."""
    model = mpitp.Decoder(group, config("llama, one kv head"), dtype="float32")
    model.load_dense(dense_weights(model.specs))
    ids = np.arange(14).reshape(2, 7)
    logits, saved = model.forward(ids)
    _, saved_loss = model.loss(logits, ids)
    gradients = model.backward(model.loss_backward(saved_loss), saved)
    for name, spec in model.specs.items():
        if spec.axis is None or spec.share > 1:
            for array in (model.weights[name], gradients[name]):
                copies = {a.tobytes() for a in group.comm.allgather(array) if a.size}
                assert len(copies) == 1, name
