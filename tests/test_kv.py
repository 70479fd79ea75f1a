"""Keys and values kept: continuing sequences equals computing them whole, for every kind of decoder, on any ranks."""
import numpy as np
import pytest
from mpi4py import MPI

import mpitp
from decoder_cases import KINDS, config
from mpitp.inference import generation
from mpitp.inference.kv import KeyValues
from spmd import draw, everywhere, same_bytes

IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [26, 5, 3, 5, 8, 9, 7]])


def moved(model):
    """The model with norms, biases and all moved away from where they start, alike on any number of ranks."""
    model.load_dense({name: draw(i, *spec.shape) * 0.5 for i, (name, spec) in enumerate(sorted(model.specs.items()))})
    return model


def decoder(group, kind, dtype="float64", **more):
    return moved(mpitp.Decoder(group, config(kind, **more), dtype=dtype))


def whole(model, ids):
    """Logits (B, V) after the last of the ids, by forward."""
    return model.gather_logits(model.forward(np.asarray(ids), save=False)[0])[:, -1]


def extend(model, ids, kv, counts=None):
    return model.gather_logits(model.extend(np.asarray(ids), kv, counts))


@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (3, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_whole(group, kind, pieces):
    model, kv, at = decoder(group, kind), None, 0
    kv = KeyValues(model, len(IDS), 7)
    for length in pieces:
        found = extend(model, IDS[:, at:at + length], kv)
        at += length
        np.testing.assert_allclose(found, whole(model, IDS[:, :at]), rtol=0, atol=1e-12)
    assert kv.lengths.tolist() == [7, 7]


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_prompts(group, kind):
    """What lies behind the end of a row is not looked at, and the next tokens take its place."""
    model = decoder(group, kind)
    kv = KeyValues(model, 2, 10)
    ids = IDS.copy()
    ids[0, 4:] = 0
    found = [extend(model, ids, kv, [4, 7])]
    found += [extend(model, [[7], [8]], kv), extend(model, [[1, 0], [2, 3]], kv, [2, 1])]
    rows = [*IDS[0, :4], 7, 1, 0], [*IDS[1], 8, 2]
    for step, lengths in enumerate([(4, 7), (5, 8), (7, 9)]):
        for row, length, logits in zip(rows, lengths, found[step]):
            np.testing.assert_allclose(logits, whole(model, [row[:length]])[0], rtol=0, atol=1e-12)
    ids[0, 4:] = 11
    assert same_bytes(extend(model, ids, KeyValues(model, 2, 10), [4, 7]), found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_float32_stays_and_ids_are_not_changed(group, kind):
    model, ids = decoder(group, kind, "float32"), IDS.copy()
    logits = model.extend(ids, KeyValues(model, 2, 8))
    assert logits.dtype == np.float32 and logits.shape == (2, model.partition.lengths[group.rank])
    assert same_bytes(ids, IDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bytes_as_on_one_rank(kind, dtype):
    def logits(group):
        model = decoder(group, kind, dtype)
        kv = KeyValues(model, 2, 9)
        return [extend(model, IDS, kv, [7, 5]), extend(model, [[1], [2]], kv), extend(model, [[3], [4]], kv)]
    with mpitp.TensorParallelGroup(reproducible=True, check=True) as every, \
            mpitp.TensorParallelGroup(MPI.COMM_SELF, reproducible=True) as alone:
        assert everywhere(all(map(same_bytes, logits(every), logits(alone))))


@pytest.mark.parametrize("kind", ["llama, one kv head", "gemma3", "gpt2"])
def test_each_rank_has_its_heads(group, kind):
    model = decoder(group, kind)
    kv = KeyValues(model, 3, 11)
    for block, of_layer in zip(model.blocks, kv.layers):
        attention = block.attention
        heads = group.partition(attention.config.query_groups,
                                share=attention.num_attention_heads // attention.config.query_groups).held(group.rank)
        assert of_layer.nbytes() == 2 * 3 * 11 * (heads.stop - heads.start) * attention.kv_channels * 8


@pytest.mark.parametrize("ids, counts, message", [
    (IDS[:, :5], None, "found 9 positions, expected at most 8"),
    (IDS[:1, :1], None, r"found ids of shape \(1, 1\), expected \(2, tokens\)"),
    (IDS[0], None, r"found ids of shape \(7,\), expected \(2, tokens\)"),
    (IDS[:, :1] + 100, None, "found token id 103, expected 0 to 26"),
], ids=["too long", "another batch", "no batch", "no such id"])
def test_what_does_not_fit(group, ids, counts, message):
    """One line on every rank, and the keys and values are as they were."""
    model = decoder(group, "gemma3")
    kv = KeyValues(model, 2, 8)
    first = extend(model, IDS[:, :4], kv)
    with pytest.raises(mpitp.InputError, match=message):
        model.extend(ids, kv, counts)
    assert kv.lengths.tolist() == [4, 4] and first.shape == (2, 27)
    np.testing.assert_allclose(extend(model, IDS[:, 4:5], kv), whole(model, IDS[:, :5]), rtol=0, atol=1e-12)


def test_more_positions_than_were_learned(group):
    model = decoder(group, "gpt2")                              # has 9
    kv = KeyValues(model, 2, 20)
    model.extend(IDS, kv)
    model.extend(IDS[:, :2], kv)
    with pytest.raises(mpitp.InputError, match="found 10 positions, expected at most 9"):
        model.extend(IDS[:, :1], kv)


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0), (2, 1.5)])
def test_sizes_of_nothing(group, sizes):
    with pytest.raises(mpitp.InputError, match="expected a positive integer"):
        KeyValues(decoder(group, "gemma3"), *sizes)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_a_choice_that_is_recorded_is_the_one_that_is_called(group, kind, monkeypatch):
    """On a device whose transport a graph can hold; elsewhere both are called."""
    model = decoder(group, kind)
    called, recorded = [], []
    for tokens, first in ((called, 1 << 30), (recorded, 0)):
        monkeypatch.setattr(generation, "RECORD_FROM", first)
        tokens.extend(mpitp.generate(model, [[3, 1], [4, 1]], max_new_tokens=6, lengths=[2, 1]))
    assert np.array_equal(called, recorded)
