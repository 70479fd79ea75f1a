"""What newer families add to a decoder: softcaps, multipliers, norms and rotary positions in other orders.

Against the dense decoder, whose own gradients are compared with numeric differences; with keys and values kept; and the
bits of one rank alone.
"""
import numpy as np
import pytest
from mpi4py import MPI

import mpitp
from check_decoder import decoder_problems
from decoder_cases import NEWER_KINDS, config
from mpitp import AttentionConfig, DecoderConfig, InputError, Rotary
from mpitp.inference.kv import KeyValues
from mpitp.ops.softcap import refuse_softcap
from spmd import everywhere, same_bytes
from test_dense_decoder import gradients_and_loss, require_numeric, scales
from test_kv import IDS, decoder, extend, whole


@pytest.mark.parametrize("kind", NEWER_KINDS)
def test_numeric_gradients(kind):
    require_numeric(*gradients_and_loss(config(kind)))
    mask = np.random.default_rng(0).random((2, 7, 7)) < 0.6
    require_numeric(*gradients_and_loss(config(kind, hidden_dropout=0.3, attention_dropout=0.4), mask, scales))


@pytest.mark.parametrize("kind", NEWER_KINDS)
def test_decoder_against_dense(group, kind):
    configuration = config(kind, vocab_size=13 * group.size + 1)
    assert decoder_problems(group, configuration, dtype="float32") == []
    configuration = config(kind, hidden_dropout=0.1, attention_dropout=0.2)
    assert decoder_problems(group, configuration, dropout=True, mask=True, label_smoothing=0.1) == []


@pytest.mark.parametrize("kind", NEWER_KINDS)
def test_pieces_equal_whole(group, kind):
    model = decoder(group, kind)
    kv, at = KeyValues(model, len(IDS), 7), 0
    for length in (3, 1, 2, 1):
        found = extend(model, IDS[:, at:at + length], kv)
        at += length
        np.testing.assert_allclose(found, whole(model, IDS[:, :at]), rtol=0, atol=1e-12)


def results(group, kind):
    """Logits and gradients of one step with dropout: dense on rank 0, else None."""
    model = mpitp.Decoder(group, config(kind, hidden_dropout=0.1, attention_dropout=0.2), dtype="float32", seed=3)
    logits, saved = model.forward(IDS, step=1)
    _, saved_loss = model.loss(logits, IDS)
    gradients = model.gather(model.backward(model.loss_backward(saved_loss), saved))
    whole_logits = model.gather_logits(logits)
    return gradients and {"logits": whole_logits, **gradients}


@pytest.mark.parametrize("kind", NEWER_KINDS)
def test_the_bits_of_one_rank(world, kind):
    with mpitp.TensorParallelGroup(reproducible=True, blocks=3, check=True) as every, \
            mpitp.TensorParallelGroup(MPI.COMM_SELF, reproducible=True, blocks=3) as alone:
        found, expected = results(every, kind), results(alone, kind)
    assert everywhere(found is None or all(same_bytes(found[name], expected[name]) for name in expected))


LONGROPE = dict(scaling="longrope", factor=2.0, short_factors=(1.0, 1.2, 1.5), long_factors=(1.1, 2.0, 4.0))
BY_LENGTH = {
    "dynamic": Rotary(base=100.0, scaling="dynamic", factor=2.0, original_max_positions=4),
    "longrope, long": Rotary(base=100.0, original_max_positions=4, **LONGROPE),
    "longrope, short": Rotary(base=100.0, original_max_positions=7, **LONGROPE),
}


@pytest.mark.parametrize("rotary", BY_LENGTH.values(), ids=BY_LENGTH)
def test_rotary_positions_that_depend_on_the_length(group, rotary):
    """The dense decoder's are the same; nothing is kept of a length that is not the last one."""
    assert decoder_problems(group, config("llama, one kv head", rotary=rotary), dtype="float32") == []
    model = decoder(group, "llama, one kv head", rotary=rotary)
    before = whole(model, IDS)
    assert np.abs(whole(model, IDS[:, :4]) - before).max() > 0 and same_bytes(whole(model, IDS), before)
    plain = decoder(group, "llama, one kv head", rotary=Rotary(base=100.0))
    assert (np.abs(whole(plain, IDS[:, :4]) - whole(model, IDS[:, :4])).max() < 1e-12) == (rotary.scaling == "dynamic")


@pytest.mark.parametrize("rotary", BY_LENGTH.values(), ids=BY_LENGTH)
def test_keys_are_kept_as_long_as_they_stay(group, rotary):
    model = decoder(group, "llama, one kv head", rotary=rotary)
    kv, at = KeyValues(model, 2, rotary.longest), 0
    for length in (3, 1):
        found = extend(model, IDS[:, at:at + length], kv)
        at += length
        np.testing.assert_allclose(found, whole(model, IDS[:, :at]), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match=f"found keys and values of {rotary.longest + 1} positions, expected at most"):
        KeyValues(model, 2, rotary.longest + 1)


def test_a_softcap_changes_what_it_should(group):
    """Logits stay below it, and scores without one are those of a very large one."""
    found = {cap: whole(decoder(group, "gemma2", logits_softcap=None, attention_softcap=cap), IDS)
             for cap in (None, 0.1, 1e9)}
    assert np.abs(found[None] - found[1e9]).max() < 1e-9 < np.abs(found[None] - found[0.1]).max()
    assert np.abs(whole(decoder(group, "gemma2", logits_softcap=0.2), IDS)).max() <= 0.2


@pytest.mark.parametrize("make, said", [
    (lambda: config("gemma2", attention_softcap=0.0), "found attention_softcap = 0.0, expected a number above 0"),
    (lambda: config("gemma2", logits_softcap="x"), "found logits_softcap = 'x'"),
    (lambda: config("gemma2", residual_multiplier=2.0), "found residual_multiplier with norm_placement 'both'"),
    (lambda: config("opt", position_offset=-1), "found position_offset = -1"),
    (lambda: DecoderConfig(9, 8, 1, 2, logits_multiplier=float("nan")), "found logits_multiplier = nan"),
    (lambda: AttentionConfig(8, 2, softcap=-1.0), "found softcap = -1.0"),
    (lambda: config("one kv head, normed over heads", parallel_residual=True), "qk_norm_over_heads with parallel"),
    (lambda: config("one kv head, normed over heads", normalization="layernorm"), "with qk_norm .layernorm"),
    (lambda: config("one kv head, normed over heads", qk_norm_after_rotary=True), "'rmsnorm' after rotary"),
    (lambda: config("one kv head, norms by head", qk_norm_after_rotary=True), "qk_norm_by_head with qk_norm_after"),
    (lambda: config("one kv head, norms by head", qk_norm_bias=True), "found qk_norm_by_head with qk_norm_bias"),
    (lambda: config("one kv head, norms by head", qk_norm=False), "found qk_norm_by_head with qk_norm None"),
    (lambda: config("phi, normed", normalization="rmsnorm"), "qk_norm_bias with qk_norm 'rmsnorm', expected 'layern"),
    (lambda: mpitp.ParallelAttention(mpitp.TensorParallelGroup(MPI.COMM_SELF),
                                     config("one kv head, normed over heads").attention(0)),
     "found query and key norms of all heads as one, expected those of any head, as ParallelAttention"),
    (lambda: Rotary(scaling="dynamic"), "found original_max_positions = None"),
    (lambda: Rotary(scaling="longrope", original_max_positions=9), "found short_factors None, expected a tuple"),
    (lambda: Rotary(original_max_positions=9, **{**LONGROPE, "long_factors": (1, -1)}), "found long_factors = -1"),
    (lambda: AttentionConfig(8, 2, rotary=Rotary(original_max_positions=9, **LONGROPE)), "found 3 short_factors"),
    (lambda: AttentionConfig(4, 2, rotary=BY_LENGTH["dynamic"]), "found rotary dim 2 with dynamic scaling"),
    (lambda: refuse_softcap(3.0), "found a softcap of 3.0 on a GPU, expected none"),
])
def test_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()
