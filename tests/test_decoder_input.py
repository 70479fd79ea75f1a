"""Bad input to attention and decoder: one clear line, InputError (a ValueError) on every rank, nothing communicated."""
import numpy as np
import pytest

import mpitp
from decoder_cases import config
from spmd import draw, everywhere

D = dict(vocab_size=27, hidden_size=20, num_layers=2, num_attention_heads=5)


def refuses(text, function, *arguments, **options):
    with pytest.raises(mpitp.InputError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert everywhere(text in message and "expected" in message and "\n" not in message), message


@pytest.mark.parametrize("text, options", [
    ("found vocab_size = 0", dict(vocab_size=0)),
    ("found hidden_size = 2.5", dict(hidden_size=2.5)),
    ("found num_attention_heads = 3 with hidden_size = 20", dict(num_attention_heads=3)),
    ("found num_query_groups = 2 key/value heads for 5", dict(num_query_groups=2)),
    ("found num_query_groups = 10", dict(num_query_groups=10)),
    ("found kv_channels = 0", dict(kv_channels=0)),
    ("found position_embedding 'sinusoidal'", dict(position_embedding="sinusoidal")),
    ("found max_position_embeddings = None", dict(position_embedding="learned")),
    ("found normalization 'batchnorm'", dict(normalization="batchnorm")),
    ("found norm_placement 'middle'", dict(norm_placement="middle")),
    ("found activation 'tanh'", dict(activation="tanh")),
    ("found norm_placement 'both' with parallel_residual", dict(parallel_residual=True, norm_placement="both")),
    ("found shared_norm without parallel_residual", dict(shared_norm=True)),
    ("found rotary dim 8, expected an even number up to 4", dict(rotary=mpitp.Rotary(dim=8))),
    ("found rotary dim 5", dict(hidden_size=25)),
    ("found rotary of 3 layers", dict(rotary=(mpitp.Rotary(),) * 3)),
    ("found rotary 'yes'", dict(rotary="yes")),
    ("found sliding_window 0", dict(sliding_window=0)),
    ("found sliding_window of 1 layers", dict(sliding_window=(4,))),
    ("found hidden_dropout = 1", dict(hidden_dropout=1)),
    ("found attention_dropout = 'a lot'", dict(attention_dropout="a lot")),
    ("found norm_epsilon = 0", dict(norm_epsilon=0)),
    ("found attention_scale = nan", dict(attention_scale=float("nan"))),
])
def test_config(text, options):
    refuses(text, mpitp.DecoderConfig, **{**D, **options})


@pytest.mark.parametrize("text, options", [
    ("found rotary dim 3", dict(dim=3)), ("found rotary base = 0", dict(base=0)),
    ("found rotary scaling 'ntk'", dict(scaling="ntk")), ("found rotary factor = -1", dict(factor=-1)),
    ("found original_max_positions = None", dict(scaling="yarn")),
])
def test_rotary(text, options):
    refuses(text, mpitp.Rotary, **options)


@pytest.mark.parametrize("text, options", [
    ("found num_query_groups = 2", dict(num_attention_heads=5, num_query_groups=2)),
    ("found num_attention_heads = 3 with hidden_size = 20", dict(num_attention_heads=3)),
    ("found sliding_window -1", dict(num_attention_heads=5, sliding_window=-1)),
    ("found qk_norm 'groupnorm'", dict(num_attention_heads=5, qk_norm="groupnorm")),
    ("found rotary 10000.0, expected a Rotary, or None", dict(num_attention_heads=5, rotary=10000.0)),
    ("found rotary dim 6", dict(num_attention_heads=5, rotary=mpitp.Rotary(dim=6))),
    ("found rotary dim 5", dict(num_attention_heads=4, rotary=mpitp.Rotary())),
    ("found dropout = 1.5", dict(num_attention_heads=5, dropout=1.5)),
    ("found dtype 'float16'", dict(num_attention_heads=5, dtype="float16")),
])
@pytest.mark.host
def test_attention(group, text, options):
    group.ledger.clear()
    choices = dict(options)
    dtype = choices.pop("dtype", "float32")
    refuses(text, lambda: mpitp.ParallelAttention(group, mpitp.AttentionConfig(20, **choices), dtype=dtype))
    assert not group.ledger.data


def test_attention_of_x_and_mask(group):
    layer = mpitp.ParallelAttention(group, mpitp.AttentionConfig(20, 5))
    x = draw(0, 2, 7, 20, dtype="f")
    group.ledger.clear()
    for shape in ((7, 7), (2, 6), (2, 7, 6), (3, 7), (2, 1, 7, 7)):
        refuses(f"found a mask bool {shape}, expected bool (2, 7) or (2, 7, 7)", layer.forward, x,
                mask=np.ones(shape, bool))
    refuses("found a mask float64 (2, 7)", layer.forward, x, mask=np.ones((2, 7)))
    refuses("and no masked array", layer.forward, x, mask=np.ma.masked_array(np.ones((2, 7), bool), True))
    refuses("found a mask None None", layer.forward, x, mask=[[True] * 7] * 2)
    refuses("found x of shape (20,)", layer.forward, x[0, 0])
    refuses("found dtype float64", layer.forward, x.astype(float))
    refuses("found shape (2, 7, 19)", layer.forward, x[..., :19])
    assert not group.ledger.data
    y, saved = layer.forward(x, save=False)
    refuses("found saved = None", layer.backward, y, saved)
    _, saved = layer.forward(x)
    refuses("dy: found 7 rows, expected 14", layer.backward, y[0], saved)
    refuses("found no", mpitp.Decoder(group, config("gpt2")).load_dense, {})


def test_decoder(group):
    refuses("found config dict", mpitp.Decoder, group, {})
    model = mpitp.Decoder(group, config("gpt2"))
    ids = np.zeros((2, 7), int)
    group.ledger.clear()
    for wrong in (27, -1, 1 << 40):
        bad = ids.copy()
        bad[1, 5] = wrong
        refuses(f"ids[1, 5]: found token id {wrong}, expected 0 to 26", model.forward, bad)
    refuses("ids: found dtype float64", model.forward, ids.astype(float))
    refuses("found a mask bool (2, 3)", model.forward, ids, mask=np.ones((2, 3), bool))
    refuses("found 10 positions, expected 0 to 9", model.forward, np.zeros((1, 10), int))
    assert not group.ledger.data
    logits, saved = model.forward(ids)
    targets = ids.copy()
    targets[0, 3] = 27
    refuses("targets[0, 3]: found token id 27", model.loss, logits, targets)
    refuses("found label_smoothing", model.loss, logits, ids, label_smoothing=1.5)
    refuses("found", model.loss, logits, ids[:1])
    refuses("found saved = None", model.backward, logits, None)
