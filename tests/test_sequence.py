"""Sequence parallelism and recomputation: rows on any ranks, dense and PyTorch's numbers, bits, ledger, memory.

The closed forms that the ledger is held to are those of layers/closed_forms.py.
"""
import functools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from mpi4py import MPI

import mpitp
from check_decoder import decoder_problems, dense_weights
from decoder_cases import config
from golden_decoder import SMOOTHING, differences, golden_cases, summary
from mpitp.comm.ledger import Collective
from mpitp.errors import InputError
from mpitp.layers import products
from mpitp.layers.closed_forms import activation_bytes
from spmd import draw, everywhere, same_bytes

GOLDEN = {kind: rest for kind, *rest in golden_cases()}
MODES = {"kept": dict(sequence_parallel=True), "gathered again": dict(sequence_parallel=True, gather_again=True),
         "block": dict(recompute="block"), "attention": dict(recompute="attention"),
         "rows, block": dict(sequence_parallel=True, gather_again=True, recompute="block"),
         "rows, attention": dict(sequence_parallel=True, gather_again=True, recompute="attention"),
         "kept, attention": dict(sequence_parallel=True, recompute="attention")}
SHAPES = pytest.mark.parametrize("shape", [(1, 7), (2, 5), (1, 1), (0, 3)])
DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.2)


def inner(a, b):
    return float((a * b).sum())


def partial_results(group, partition, *shape):
    """(a Sum to which this rank's blocks of `partition` were added, their sum over all ranks)"""
    terms = {b: draw(100 + b, *shape) for b in range(partition.blocks) if not partition.is_empty(b)}
    total = group.sum(partition, shape, np.float64)
    for block in partition.blocks_of(group.rank):
        total.add(block, terms[block.index].copy())
    return total, sum(terms.values())


# --- rows -----------------------------------------------------------------------------------------------------------

@SHAPES
def test_every_row_is_one_ranks(group, shape):
    rows, count = mpitp.Rows(group, shape), shape[0] * shape[1]
    x = draw(1, *shape, 4)
    mine = rows.split(x)
    assert mine.shape == (rows.own.stop - rows.own.start, 4)
    assert sum(group.comm.allgather([*range(count)][rows.own]), []) == [*range(count)]
    assert rows.positions.tolist() == [row % shape[1] for row in range(count)][rows.own]
    group.ledger.clear()
    assert everywhere(same_bytes(rows.all_gather(mine).reshape(x.shape), x))
    assert group.ledger.counts() == {Collective("all_gather", count * 4, "float64"): 1}
    assert group.ledger.wire_bytes() == 8 * (group.size - 1) * mine.size


@SHAPES
def test_f_and_g_of_rows_are_adjoint(group, shape):
    """<f x, dy> = <x, f* dy>, each side summed over the ranks; g is f* the other way round."""
    rows, N, partition = mpitp.Rows(group, shape), shape[0] * shape[1], group.partition(group.blocks)
    x, total = rows.split(draw(1, *shape, 4)), partial_results(group, partition, N, 4)
    whole, scattered = products.copy_to_ranks_forward(x, rows), products.copy_to_ranks_backward(total[0], rows)
    assert everywhere(np.abs(scattered - total[1][rows.own]).max(initial=0) < 1e-13)
    of_ranks = group.comm.allreduce(inner(x, scattered))
    assert abs(inner(whole, total[1]) - of_ranks) < 1e-12
    total, expected = partial_results(group, partition, N, 4)
    y, dy = products.reduce_from_ranks_forward(total, rows), rows.split(draw(2, *shape, 4))
    assert everywhere(np.abs(y - expected[rows.own]).max(initial=0) < 1e-13)
    assert abs(inner(expected, products.reduce_from_ranks_backward(dy, rows)) -
               group.comm.allreduce(inner(y, dy))) < 1e-12


@pytest.mark.parametrize("outer", [(), (2,)])
@pytest.mark.parametrize("message_bytes", [1 << 30, 40])
def test_a_scattered_sum_has_the_bits_of_the_whole_one(group, monkeypatch, outer, message_bytes):
    """Of some arrays side by side too, and in several messages."""
    rows, partition = mpitp.Rows(group, (1, 7)), group.partition(5)
    whole = partial_results(group, partition, *outer, 7, 3)[0].all_reduce()
    total = partial_results(group, partition, *outer, 7, 3)[0]
    monkeypatch.setattr(group.transport, "message_bytes", message_bytes)
    group.ledger.clear()
    mine = rows.reduce_scatter(total)
    assert group.ledger.counts() == {Collective("reduce_scatter", whole.size, "float64"): 1}
    if not group.reproducible:
        assert group.ledger.wire_bytes() == 8 * (whole.size - mine.size)
        assert everywhere(np.allclose(mine, whole[..., rows.own, :], rtol=0, atol=1e-13))
    else:
        assert everywhere(same_bytes(mine, np.ascontiguousarray(whole[..., rows.own, :])))


# --- decoders against dense, and PyTorch ------------------------------------------------------------------------------

CASES = [("gpt2", "kept"), ("gpt2", "rows, block"), ("llama, one kv head", "gathered again"),
         ("llama, one kv head", "attention"), ("gemma3", "kept"), ("gemma3", "rows, block"), ("gemma3", "block"),
         ("bloom", "gathered again"), ("bloom", "block"), ("gpt_neox", "kept"), ("gpt_neox", "rows, attention"),
         ("falcon", "gathered again"), ("falcon", "rows, block"), ("neox with query norm", "block"),
         ("neox with query norm", "attention"), ("after the residual", "rows, block"), ("olmo2", "kept, attention"),
         ("gemma2", "kept"), ("granite and nemotron", "gathered again"), ("opt", "gathered again"),
         ("olmo2, over all heads", "rows, block"), ("olmo2, over all heads", "attention"),
         ("hunyuan, side by side", "kept, attention"), ("one kv head, norms with bias", "kept"),
         ("command r+, side by side", "rows, block")]


@pytest.mark.parametrize("kind, mode", CASES)
def test_decoder_against_dense(world, kind, mode):
    """With dropout, a mask, label smoothing; 7 rows, or 14. The ledger is that of the closed form."""
    make, is_odd = functools.partial(mpitp.Decoder, **MODES[mode]), CASES.index((kind, mode)) % 2 == 1
    with mpitp.TensorParallelGroup(reproducible=is_odd, check=True) as group:
        assert decoder_problems(group, config(kind, **DROPOUT), (1 + is_odd, 7), make=make, dropout=True, mask=True,
                                label_smoothing=0.1) == []


@pytest.mark.parametrize("kind, mode", [("gpt2", "kept"), ("gemma3", "rows, block"), ("bloom", "gathered again"),
                                        ("falcon", "kept, attention"), ("llama, one kv head", "rows, attention"),
                                        ("gpt_neox", "block"), ("olmo2", "attention")])
def test_decoder_against_pytorch(world, kind, mode):
    configuration, weights, ids, targets, mask, expected = GOLDEN[kind]
    with mpitp.TensorParallelGroup() as group:
        model = mpitp.Decoder(group, configuration, dtype="float64", seed=None, **MODES[mode])
        model.load_dense(weights)
        logits, saved = model.forward(ids, mask=mask)
        loss, saved_loss = model.loss(logits, targets, label_smoothing=SMOOTHING)
        gradients = group.comm.bcast(model.gather(model.backward(model.loss_backward(saved_loss), saved)))
        assert differences(summary(model.gather_logits(logits), loss, gradients), expected) == []


# --- the same bits ----------------------------------------------------------------------------------------------------

def results(group, kind, shape=(1, 7), **options):
    """Logits and loss on every rank, and on rank 0 every gradient; bytes."""
    model = mpitp.Decoder(group, config(kind, **DROPOUT), seed=3, **options)
    ids = np.random.default_rng(2).integers(0, 27, shape)
    logits, saved = model.forward(ids, step=1)
    loss, saved_loss = model.loss(logits, ids)
    gradients = model.gather(model.backward(model.loss_backward(saved_loss), saved))
    whole = {"logits": model.gather_logits(logits).tobytes(), "loss": loss}
    return whole, {name: g.tobytes() for name, g in (gradients or {}).items()}


@pytest.mark.parametrize("kind, modes", [("gemma3", ("kept", "rows, block")), ("bloom", ("gathered again", "block")),
                                         ("neox with query norm", ("kept", "rows, block")),
                                         ("gpt2", ("rows, attention", "kept"))])
@pytest.mark.parametrize("blocks", [8, 3])
def test_the_bits_do_not_depend_on_rows_or_recomputation(world, kind, modes, blocks):
    """All ranks, in these modes, against one rank alone without them."""
    with mpitp.TensorParallelGroup(reproducible=True, blocks=blocks) as every, \
            mpitp.TensorParallelGroup(MPI.COMM_SELF, reproducible=True, blocks=blocks) as alone:
        expected = results(alone, kind)
        for mode in modes:
            whole, gradients = results(every, kind, **MODES[mode])
            wrong = [name for name, g in gradients.items() if g != expected[1][name]]
            assert everywhere(whole == expected[0] and not wrong), (mode, wrong)


# --- what is sent -----------------------------------------------------------------------------------------------------

FORMS = {"whole": ({}, False, 8), "kept": (dict(sequence_parallel=True), False, 8),
         "gathered again": (dict(sequence_parallel=True), True, 10), "block": (dict(recompute="block"), False, 10),
         "rows, block": (dict(sequence_parallel=True, recompute="block"), True, 11)}
PLAIN = dict(num_query_groups=5, kv_channels=4, ffn_hidden_size=None, position_embedding="none")


def run_block(group, options, gather_again, shape=(2, 6), configuration=None, dtype="float64"):
    """(block, what it sent for f and g in elements, rows)"""
    block = mpitp.ParallelBlock(group, configuration or config("gpt2", **PLAIN), dtype=dtype, **options)
    rows = mpitp.Rows(group, shape, gather_again) if block.sequence_parallel else None
    x = draw(1, *shape, block.config.hidden_size, dtype=dtype)
    x = rows.split(x) if rows else x
    group.ledger.clear()
    y, saved = block.forward(x, rows=rows)
    block.backward(y, saved)
    return block, rows


@pytest.mark.parametrize("mode", FORMS)
def test_the_elements_that_a_rank_sends_in_a_block(world, mode):
    """n = 12 x 20 for P = 1 to 4, which divide the rows."""
    options, gather_again, times = FORMS[mode]
    with mpitp.TensorParallelGroup(check=True) as group:
        block, rows = run_block(group, options, gather_again)
        whole = sum(block.collectives(12, gather_again), Counter())
        assert group.ledger.counts() == whole
        of_norms = Collective("all_reduce", 4 * 20, "float64")
        assert (of_norms in whole) == bool(rows)
        sent = group.ledger.wire_bytes() - group.ledger.data[of_norms].wire_bytes
        assert sent * group.size == 8 * times * 12 * 20 * (group.size - 1)


def test_uneven_rows_are_counted_exactly(world):
    """7 rows: a gather sends a rank's own rows to the others, a reduce-scatter the others' rows."""
    with mpitp.TensorParallelGroup() as group:
        block, rows = run_block(group, dict(sequence_parallel=True), True, (1, 7))
        n, P = rows.own.stop - rows.own.start, group.size
        sent = sum(entry.wire_bytes for key, entry in group.ledger.data.items() if key.operation != "all_reduce")
        assert sent == 8 * 20 * (6 * (P - 1) * n + 4 * (7 - n))


# --- what is kept -----------------------------------------------------------------------------------------------------

LIKE_THE_PAPER = dict(PLAIN, hidden_size=128, num_attention_heads=4, num_query_groups=4, kv_channels=32)


def forward_and_backward(block, count, x, rows):
    """(live bytes after each of so many blocks' forwards, the peak until the last backward), by tracemalloc."""
    gradients, found, kept = block.gradients(None), [], []
    tracemalloc.start()
    try:
        for _ in range(count):
            x, saved = block.forward(x, rows=rows)
            kept.append(saved)
            del saved
            found.append(tracemalloc.get_traced_memory()[0])
        while kept:
            x = block.backward(x, kept.pop(), out=gradients)[0]
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measured_over_formula(mode):
    """What a block more keeps, and what it adds to the peak, over the bytes of the formula of the paper's kind."""
    options, gather_again, _ = FORMS.get(mode, (dict(recompute="attention"), False, 0))
    with mpitp.TensorParallelGroup() as group:
        block = mpitp.ParallelBlock(group, config("gpt2", **LIKE_THE_PAPER), seed=None, **options)
        rows = mpitp.Rows(group, (1, 960), gather_again) if "sequence_parallel" in options else None
        x = draw(1, 1, 960, 128, dtype="f")
        x = rows.split(x) if rows else x
        formula = activation_bytes(block, 960, gather_again)
        # The first run allocates what is used again, and now and then Python does, for a table that has become full.
        runs = [forward_and_backward(block, count, x, rows) for count in (1, 1, 4, 4)]
        short, long = (min(peak for _, peak in pair) for pair in (runs[:2], runs[2:]))
        return min(np.diff(runs[-1][0])) / formula, (long - short) / (3 * formula)


@pytest.mark.skipif(MPI.COMM_WORLD.size > 3, reason="measured on up to three ranks")
@pytest.mark.parametrize("mode", [*FORMS, "attention"])
def test_the_bytes_that_blocks_keep_and_the_peak(world, monkeypatch, mode):
    monkeypatch.setenv("MPITP_STALL_LIMIT", "0")    # no thread that watches
    kept, of_peak = measured_over_formula(mode)
    assert abs(kept - 1) < 0.02 and abs(of_peak - 1) < 0.02


@pytest.mark.parametrize("mode, of_paper", [("whole", "sbh (10 + 24 / t)"), ("gathered again", "34 sbh / t"),
                                            ("block", "2 sbh")])
def test_the_formula_is_the_papers(group, mode, of_paper):
    """Korthikanti et al., table 2, beside attention's scores, without the masks of dropout (2 sbh, of rows 2 sbh / t).

    In units of two bytes. The rest is what a row has one number of: 1 / rms, and the logarithm of a head's sum.
    """
    options, gather_again, _ = FORMS[mode]
    block = mpitp.ParallelBlock(group, config("gpt2", **LIKE_THE_PAPER), seed=None, **options)
    t, sbh = group.size, 960 * 128
    bytes_of_paper = {"sbh (10 + 24 / t)": sbh * (10 + 24 / t) - 2 * sbh, "34 sbh / t": (34 - 2) * sbh / t,
                      "2 sbh": 2 * sbh}[of_paper]
    found = activation_bytes(block, 960, gather_again) / block.dtype.itemsize
    if not (group.reproducible or 4 % t):                   # ranks whose heads and rows are as many
        assert found == pytest.approx(bytes_of_paper / 2, rel=0.01)


# --- generation, overflow, refusals -----------------------------------------------------------------------------------

def test_prefill_and_generation_go_on_with_whole_rows(group):
    models = [mpitp.Decoder(group, config("gpt_neox"), **mode) for mode in ({}, MODES["rows, block"])]
    texts = [[*map(list, mpitp.generate(model, [[3, 1, 4]], max_new_tokens=4))] for model in models]
    assert texts[0] == texts[1]


@pytest.mark.host
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_row_that_overflows_is_seen_by_every_rank(group):
    """The rank that has it does not raise alone, which would leave the others waiting."""
    model = mpitp.Decoder(group, config("opt"), sequence_parallel=True)
    model.weights["position.weight"][2, 0] = 1e30
    ids = np.ones((1, 7), int)
    logits, _ = model.forward(ids)
    assert everywhere(np.isnan(model.loss(logits, ids)[0]))


def test_refusals(group):
    rows, block = mpitp.Rows(group, (1, 7)), mpitp.ParallelBlock(group, config("gpt2"), sequence_parallel=True)
    x = np.ones((7, 20), "f")
    for call, expected in (
            (lambda: block.forward(x), "found NoneType, expected mpitp.Rows"),
            (lambda: block.forward(x[:0] if group.size == 1 else x, rows=rows), "expected .* along axis 0"),
            (lambda: mpitp.ParallelBlock(group, config("gpt2")).forward(x, rows=rows), "rows without sequence"),
            (lambda: mpitp.ParallelBlock(group, config("gpt2"), recompute="all"), "recompute 'all'"),
            (lambda: mpitp.Decoder(group, config("gpt2"), gather_again=True), "gather_again without"),
            (lambda: mpitp.Rows(group, (7,)), r"expected \(sequences, positions\)"),
            (lambda: rows.split(x), "found x of shape")):
        with pytest.raises(InputError, match=expected):
            call()


# --- mistakes of published implementations, planted: each must be seen ------------------------------------------------

def problems(group, kind="bloom", mode="gathered again", shape=(2, 7), **options):
    make = functools.partial(mpitp.Decoder, **MODES[mode])
    found = decoder_problems(group, config(kind, num_layers=1, **options), shape, make=make, dropout=bool(options))
    return set.intersection(*map(set, group.comm.allgather(found)))


@pytest.fixture
def mistakes(world, monkeypatch):
    if world.size == 1:
        pytest.skip("on one rank these are not mistakes")
    with mpitp.TensorParallelGroup() as group:
        yield group, monkeypatch


NORM = "layers.0.mlp_norm.weight"


def own_summand(step, fold, elements):
    return sum(fold.known.values(), np.zeros(elements))


@pytest.mark.host
def test_norm_gradients_that_are_not_summed(mistakes):
    group, monkeypatch = mistakes
    from mpitp.layers.norm_sums import NormSumsOfStep
    monkeypatch.setattr(NormSumsOfStep, "sum_of", own_summand)
    assert {NORM, "final_norm.weight", "embedding_norm.bias"} <= problems(group)


@pytest.mark.host
def test_norm_gradients_that_are_averaged(mistakes):
    group, monkeypatch = mistakes
    from mpitp.layers.norm_sums import NormSumsOfStep
    right = NormSumsOfStep.sum_of
    monkeypatch.setattr(NormSumsOfStep, "sum_of", lambda *given: right(*given) / group.size)
    assert {NORM, "final_norm.bias"} <= problems(group)


@pytest.mark.host
def test_norm_gradients_that_are_summed_too_early(mistakes):
    """Before the embedding's norm has had its backward, as a hook does that fires at the first micro-batch."""
    group, monkeypatch = mistakes
    from mpitp.layers.norm_sums import NormSums
    right, of_layer = NormSums.end, mpitp.Decoder.layer_backward

    def early(model, layer, dy, saved, gradients, sums=None):
        if layer.name == "embedding_norm":
            right(sums, gradients)
        return of_layer(model, layer, dy, saved, gradients, sums)
    monkeypatch.setattr(mpitp.Decoder, "layer_backward", early)
    monkeypatch.setattr(NormSums, "end", lambda sums, *given: None)
    found = problems(group)
    assert "embedding_norm.weight" in found and NORM not in found


@pytest.mark.host
@pytest.mark.parametrize("times", [0, 2])
def test_a_row_bias_that_is_summed_twice_or_not_at_all(mistakes, times):
    """dy is gathered for the product, so its sum over the rows is the gradient already."""
    group, monkeypatch = mistakes
    from mpitp.layers import mlp
    right = mlp.ParallelMLP.bias_backward

    def wrong(layer, dy_ND, gradients):
        rows = mpitp.Rows(group, (1, len(dy_ND)))
        right(layer, dy_ND if times else np.ascontiguousarray(dy_ND[rows.own]), gradients)
        if times:
            name = "layers.0.mlp.down.bias"
            gradients[name][...] = group.all_reduce(gradients[name])
    monkeypatch.setattr(mlp.ParallelMLP, "bias_backward", wrong)
    assert "layers.0.mlp.down.bias" in problems(group)


@pytest.mark.host
def test_a_second_gather_that_is_dropped(mistakes):
    """Backward takes this rank's rows for all of them, with nothing in place of the others."""
    group, monkeypatch = mistakes
    from mpitp.comm.rows import Rows

    def own_alone(rows, kept):
        whole = np.zeros((rows.partition.size, kept.shape[1]), kept.dtype)
        whole[rows.own] = kept
        return whole
    monkeypatch.setattr(Rows, "again", own_alone)
    assert {"layers.0.mlp.up.weight", "layers.0.attention.query.weight"} <= problems(group)


@pytest.mark.host
def test_gathered_arrays_that_are_kept(mistakes):
    """The formula sees what a saved tensor holds on to."""
    group, monkeypatch = mistakes
    from mpitp.comm.rows import Rows
    monkeypatch.setattr(Rows, "kept", lambda rows, x, x_ND: x_ND)
    monkeypatch.setattr(Rows, "again", lambda rows, kept: kept)
    assert min(measured_over_formula("gathered again")) > 1.02


@pytest.mark.host
@pytest.mark.parametrize("mode", ["block", "rows, block"])
def test_dropout_that_is_drawn_again(world, monkeypatch, mode):
    """A recomputation that takes the next masks of a generator. On one rank too."""
    from mpitp.layers import recompute
    right = recompute.parts_again

    def wrong(block, first, second, call):
        return right(block, first, second, call._replace(step=call.step + 1))
    monkeypatch.setattr(recompute, "parts_again", wrong)
    with mpitp.TensorParallelGroup() as group:
        assert "layers.0.mlp.down.weight" in problems(group, mode=mode, **DROPOUT)


@pytest.mark.host
def test_dropout_of_a_ranks_own_rows_from_the_start(mistakes):
    """Each rank draws as if its rows were the first ones."""
    group, monkeypatch = mistakes
    from mpitp.layers import block, decoder
    right = block.hidden_dropout

    def wrong(group, seed, name, step, probability, shape, dtype, rows=None):
        return right(group, seed, name, step, probability, shape, dtype)
    monkeypatch.setattr(block, "hidden_dropout", wrong)
    monkeypatch.setattr(decoder, "hidden_dropout", wrong)
    assert {"logits", "loss"} <= problems(group, **DROPOUT)


@pytest.mark.host
def test_positions_that_are_left_global(mistakes):
    """The first rows of the table for every rank's rows."""
    group, monkeypatch = mistakes
    from mpitp.comm.rows import Rows
    monkeypatch.setattr(Rows, "positions", property(lambda rows: np.arange(rows.own.stop - rows.own.start)))
    assert {"logits", "loss"} <= problems(group, "gpt2", shape=(1, 7))


@pytest.mark.host
def test_labels_of_a_ranks_own_rows(mistakes):
    """Logits are of all rows, so labels are too: those of a rank's rows are refused, not paired with the wrong ones."""
    group, _ = mistakes
    model = mpitp.Decoder(group, config("gpt2"), sequence_parallel=True)
    ids = np.arange(7)[None]
    logits, _ = model.forward(ids)
    assert logits.shape[:2] == (1, 7)
    with pytest.raises(InputError, match="targets: found shape"):
        model.loss(logits, ids[:, mpitp.Rows(group, (1, 7)).own])


def test_weights_that_a_dense_run_has(group):
    """The gradients of a block alone, which adds up its own norms'."""
    options = dict(sequence_parallel=True)
    block = mpitp.ParallelBlock(group, config("gpt2"), dtype="float64", **options)
    whole = mpitp.ParallelBlock(group, config("gpt2"), dtype="float64")
    weights = dense_weights(block.specs)
    rows, x = mpitp.Rows(group, (2, 5)), draw(1, 2, 5, 20)
    for layer in (block, whole):
        layer.load_dense(weights)
    y, saved = whole.forward(x)
    dx, expected = whole.backward(x, saved)
    y_n, saved = block.forward(rows.split(x), rows=rows)
    dx_n, found = block.backward(rows.split(x), saved)
    assert everywhere(np.allclose(rows.all_gather(y_n).reshape(y.shape), y, rtol=0, atol=1e-12))
    assert everywhere(np.allclose(rows.all_gather(dx_n).reshape(y.shape), dx, rtol=0, atol=1e-12))
    assert everywhere(all(np.allclose(found[name], expected[name], rtol=0, atol=1e-11) for name in expected))
