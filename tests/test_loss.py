"""Cross entropy of split logits against that of the whole ones: loss, gradient, collectives, for every option."""
import hashlib
import math
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpitp
from groups import group_fixture
from check_loss import draw_targets, plain_loss, problems, require_none, seen_everywhere, whole_and_part
from mpitp.layers import loss as loss_module
from mpitp.layers.loss import vocab_parallel_cross_entropy_backward, vocab_parallel_cross_entropy_forward
from mpitp.ops import cross_entropy
from spmd import draw, job, same_bytes

RANKS = (1, 3, 5)
smoothings = pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])


group = group_fixture("ordinary", "reproducible", scope="module")


@pytest.fixture
def several_ranks(world):
    if world.size == 1:
        pytest.skip("on one rank these are not mistakes")


@smoothings
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ignored", [True, False], ids=["some", "all"])
@pytest.mark.parametrize("sizes", [(0, 1), (0, 2), (0, 9), (13, 1), (16, 0)],
                         ids=lambda sizes: f"V={sizes[0]}P+{sizes[1]}")
def test_equals_dense(group, sizes, label_smoothing, ignored, dtype):
    """A vocabulary of one, fewer than ranks, uneven, even."""
    vocab = sizes[0] * group.size + sizes[1]
    require_none(problems(group, vocab, label_smoothing, dtype=dtype, ignored=ignored), group)


@smoothings
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_z_loss(group, label_smoothing, dtype):
    """Against the dense loss; and equal logits c make lse = ln V + c, so the loss is ln V + w (ln V + c)^2."""
    for scale in (1.0, 30.0):
        require_none(problems(group, 13 * group.size + 1, label_smoothing, dtype=dtype, scale=scale, z_loss=0.3), group)
    partition, targets = group.partition(29), draw_targets(29, (3, 4), ignored=False)
    for c in (0.0, 5.0):
        loss, _ = vocab_parallel_cross_entropy_forward(
            np.full((3, 4, partition.lengths[group.rank]), c, dtype), targets, group, partition,
            label_smoothing=label_smoothing, z_loss=0.25)
        assert loss == pytest.approx(math.log(29) + 0.25 * (math.log(29) + c) ** 2, rel=1e-6)


@smoothings
@pytest.mark.parametrize("scale", [1e-3, 30.0, 3000.0])
def test_stable(group, label_smoothing, scale):
    """e^3000 is no float64: the maximum over the ranks is taken off first."""
    for dtype in ("float32", "float64"):
        require_none(problems(group, 29, label_smoothing, dtype=dtype, scale=scale), group)


@settings(derandomize=True, deadline=None, database=None, max_examples=30)
@given(vocab=st.integers(1, 40), lead=st.lists(st.integers(0, 4), max_size=3).map(tuple),
       label_smoothing=st.sampled_from([0, 0.1, 0.7, 1]), dtype=st.sampled_from(["float32", "float64"]),
       ignore_index=st.sampled_from([-100, -1, 0]), d_loss=st.sampled_from([1.0, -2.5, 0.0]))
def test_any_shape(group, vocab, lead, label_smoothing, dtype, ignore_index, d_loss):
    require_none(problems(group, vocab, label_smoothing, lead, dtype, ignore_index, d_loss=d_loss), group)


def test_longer_than_a_piece(group, monkeypatch):
    require_none(problems(group, 40_000 * group.size + 1, 0.1, (3,)), group)
    monkeypatch.setattr(cross_entropy, "PIECE", 5)
    require_none(problems(group, 29, 0.1), group)


@smoothings
@pytest.mark.parametrize("z_loss", [0.0, 0.4])
def test_numeric_gradient(group, label_smoothing, z_loss):
    partition, z, _ = whole_and_part(group, 23, (2, 5))
    targets, d, h = draw_targets(23, (2, 5)), draw(2, 2, 5, 23), 1e-5
    part = partition.range(group.rank)

    def both(z):
        return vocab_parallel_cross_entropy_forward(z[..., part], targets, group, partition,
                                                    label_smoothing=label_smoothing, z_loss=z_loss)
    dz = vocab_parallel_cross_entropy_backward(both(z)[1])
    numeric = (both(z + h * d)[0] - both(z - h * d)[0]) / (2 * h)
    assert abs(numeric - group.comm.allreduce((dz * d[..., part]).sum())) <= 1e-9


def test_the_memory_order_of_logits_is_not_part_of_the_bits(group):
    partition, _, mine = whole_and_part(group, 370, (12,), "float32")
    targets = draw_targets(370, (12,))
    gaps = np.zeros((12, 2 * mine.shape[-1] + 1), "float32")[..., 1::2]
    gaps[...] = mine
    results = []
    for z in (mine, np.asfortranarray(mine), gaps):
        loss, saved = vocab_parallel_cross_entropy_forward(z, targets, group, partition, label_smoothing=0.1)
        results.append((loss, vocab_parallel_cross_entropy_backward(saved).tobytes()))
    assert results[0] == results[1] == results[2]


def test_saved_serves_twice(group):
    partition, _, mine = whole_and_part(group, 37, (4, 3), "float32")
    _, saved = vocab_parallel_cross_entropy_forward(mine, draw_targets(37, (4, 3)), group, partition)
    once, again, double = (vocab_parallel_cross_entropy_backward(saved, d_loss) for d_loss in (1.0, 1.0, 2.0))
    assert same_bytes(once, again) and same_bytes(2 * once, double)


@pytest.mark.host
def test_memory(group):
    """Nothing as large as the logits is made, but their gradient."""
    partition = group.partition(20_000 * group.size)
    logits = draw(1, 256, partition.lengths[group.rank], dtype="float32")     # each of up to 8 threads has a piece
    targets = draw_targets(20_000, (256,))
    tracemalloc.start()
    _, saved = vocab_parallel_cross_entropy_forward(logits, targets, group, partition, label_smoothing=0.1)
    _, forward_peak = tracemalloc.get_traced_memory()
    dz = vocab_parallel_cross_entropy_backward(saved)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert forward_peak < logits.nbytes / 8 and peak - dz.nbytes < logits.nbytes / 8


@smoothings
def test_nothing_counts(group, label_smoothing):
    """0.0 and a zero gradient, even with NaN in the logits; and no token at all."""
    partition, _, mine = whole_and_part(group, 9, (2, 3), "float32")
    mine[0] = np.nan
    loss, saved = vocab_parallel_cross_entropy_forward(mine, np.full((2, 3), -100), group, partition,
                                                       label_smoothing=label_smoothing)
    dz = vocab_parallel_cross_entropy_backward(saved)
    assert loss == 0.0 and type(loss) is float and same_bytes(dz, np.zeros_like(mine))
    loss, saved = vocab_parallel_cross_entropy_forward(mine[:0], np.zeros((0, 3), int), group, partition)
    assert loss == 0.0 and vocab_parallel_cross_entropy_backward(saved).shape == (0, 3, partition.lengths[group.rank])


@smoothings
@pytest.mark.parametrize("column", [0, 8, 16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_shows(group, bad, column, label_smoothing):
    """One of 17 x 6, on one rank: NaN on every rank. MAX alone would lose it."""
    partition, z, _ = whole_and_part(group, 17, (2, 3))
    z[1, 1, column] = bad
    targets = np.array([[0, 8, 16], [1, 9, -100]])

    def loss():
        return vocab_parallel_cross_entropy_forward(z[..., partition.range(group.rank)], targets, group, partition,
                                                    label_smoothing=label_smoothing)[0]
    assert all(map(math.isnan, group.comm.allgather(loss())))
    targets[1, 1] = -100                            # the same logit where the token does not count
    assert all(map(math.isfinite, group.comm.allgather(loss())))


def test_a_logit_of_minus_infinity_is_a_probability_of_zero(group):
    partition, z, _ = whole_and_part(group, 17, (2, 3))
    z[:, :, 5] = -np.inf
    part, targets = partition.range(group.rank), np.array([[0, 8, 16], [1, 9, 4]])
    loss, saved = vocab_parallel_cross_entropy_forward(z[..., part], targets, group, partition)
    dz = vocab_parallel_cross_entropy_backward(saved)
    without = np.delete(z, 5, axis=-1)
    expected, dz_expected = plain_loss(without, targets - (targets > 5), 0.0, -100)
    assert abs(loss - expected) < 1e-14
    assert np.allclose(dz, np.insert(dz_expected, 5, 0, axis=-1)[..., part], 1e-14, 1e-15)
    assert vocab_parallel_cross_entropy_forward(z[..., part], targets * 0 + 5, group, partition)[0] == math.inf


def call(group, vocab=10, shape=(2, 3), targets=None, partition=None, dtype="float32", **options):
    partition = partition or group.partition(vocab)
    logits = np.zeros((*shape, partition.lengths[group.rank] if partition.ranks == group.size else 1), dtype)
    return vocab_parallel_cross_entropy_forward(logits, np.zeros(shape, int) if targets is None else targets, group,
                                                partition, **options)


@pytest.mark.parametrize("arguments, message", [
    (dict(targets=[[0, 1, 2], [3, 10, 99]]), r"targets\[1, 1\]: found token id 10, expected 0 to 9, or -100 to leave"),
    (dict(targets=[[0, 1, -1], [3, 4, 5]]), r"targets\[0, 2\]: found token id -1, expected 0 to 9"),
    (dict(targets=[[0, 1, -100], [3, 4, 5]], ignore_index=-1), r"targets\[0, 2\]: found token id -100, .* -1 to leave"),
    (dict(targets=[0, 1, 2]), r"targets: found shape \(3,\), expected \(2, 3\), as the logits'"),
    (dict(targets=np.zeros((2, 3))), "targets: found dtype float64, expected integers"),
    (dict(label_smoothing=-0.1), "found label_smoothing = -0.1, expected a number from 0 to 1"),
    (dict(label_smoothing=1.5), "found label_smoothing = 1.5, expected a number from 0 to 1"),
    (dict(label_smoothing=math.nan), "found label_smoothing = nan, expected a number from 0 to 1"),
    (dict(label_smoothing="0.1"), "found label_smoothing = '0.1', expected a number from 0 to 1"),
    (dict(z_loss=-1e-4), "found z_loss = -0.0001, expected a number of at least 0"),
    (dict(z_loss=math.inf), "found z_loss = inf, expected a number"),
    (dict(ignore_index=None), "found ignore_index = None, expected an integer"),
    (dict(partition=mpitp.Partition(10, 77, 77)), "found logits over Partition.*ranks=77.*, expected .*the group's"),
    (dict(dtype="float16"), "found dtype dtype.*float16.*, expected one of float32, float64"),
])
@pytest.mark.host
def test_bad_input(group, arguments, message):
    """One line on every rank, and no rank has entered a collective."""
    group.ledger.clear()
    with pytest.raises(mpitp.InputError, match=message):
        call(group, **arguments)
    assert group.ledger.counts() == {} and not group.ledger.control


@pytest.mark.host
def test_logits_of_another_shape(group):
    partition = group.partition(10)
    for shape in ((2, 11), (), (5, 0) if partition.lengths[group.rank] else (5, 1)):
        with pytest.raises(mpitp.InputError, match="logits: found shape .*, expected .* of rank"):
            vocab_parallel_cross_entropy_forward(np.zeros(shape), np.zeros(shape[:-1], int), group, partition)
    with pytest.raises(mpitp.InputError, match="logits: found builtins.list, expected an array of numpy"):
        vocab_parallel_cross_entropy_forward([[1.0]], [0], group, partition)


# Mistakes found in published tensor-parallel code (the same on every rank): `problems` must see each.

def test_nothing_is_found_without_a_fault(group):
    for vocab in (13 * group.size + 1, 16 * group.size):
        assert problems(group, vocab, 0.1) == [] and problems(group, vocab) == []


@pytest.mark.usefixtures("several_ranks")
def test_label_smoothing_with_the_local_vocabulary_size(group, monkeypatch):
    """Megatron-LM's: s over V / P, in the loss and in its gradient."""
    sums, gradient = cross_entropy.row_sums, cross_entropy.row_gradient

    def wrong_sums(z, largest, targets, with_sum):
        found = sums(z, largest, targets, with_sum)
        if with_sum:
            found[2] *= group.size
        return found

    def wrong_gradient(z, largest, targets, factor, at_target, everywhere, out):
        return gradient(z, largest, targets, factor, at_target, None if everywhere is None else everywhere * group.size,
                        out)
    monkeypatch.setattr(loss_module, "row_sums", wrong_sums)
    assert problems(group, 13 * group.size + 1) == []           # without smoothing there is nothing to see
    seen_everywhere(group, problems(group, 13 * group.size + 1, 0.1), "loss")
    monkeypatch.setattr(loss_module, "row_gradient", wrong_gradient)
    seen_everywhere(group, problems(group, 13 * group.size + 1, 0.1), "loss", "gradient")


@pytest.mark.host
@smoothings
def test_the_last_token_of_a_shard_masked(group, monkeypatch, label_smoothing):
    def wrong(z, targets):
        return np.flatnonzero((targets >= 0) & (targets < z.shape[1] - 1))
    monkeypatch.setattr(cross_entropy, "targets_here", wrong)
    found = problems(group, 13 * group.size + 1, label_smoothing)
    if label_smoothing < 1:
        seen_everywhere(group, found, "loss")
        assert any("gradient" in of_rank for of_rank in group.comm.allgather(found))


@pytest.mark.usefixtures("several_ranks")
def test_an_even_vocabulary_out_of_range(group, monkeypatch):
    """Ranges of V // P + 1, right where V is not a multiple of P: the ranks after the first look at other columns."""
    right = loss_module.row_sums

    def wrong(z, largest, targets, with_sum):
        return right(z, largest, targets - (group.rank if vocab % group.size == 0 else 0), with_sum)
    monkeypatch.setattr(loss_module, "row_sums", wrong)
    vocab = 16 * group.size + 1
    assert problems(group, vocab) == []
    vocab = 16 * group.size
    seen_everywhere(group, problems(group, vocab), "loss")


@pytest.mark.usefixtures("several_ranks")
def test_loss_off_by_log_p(group, monkeypatch):
    """Logits that were gathered already: the sum over the ranks counts each P times."""
    right = loss_module.row_sums

    def wrong(z, largest, targets, with_sum):
        found = right(z, largest, targets, with_sum)
        found[0] *= group.size
        return found
    monkeypatch.setattr(loss_module, "row_sums", wrong)
    seen_everywhere(group, problems(group, 13 * group.size + 1), "loss", "gradient")
    partition, z, mine = whole_and_part(group, 29, (3, 4))
    loss, _ = vocab_parallel_cross_entropy_forward(mine, draw_targets(29, (3, 4)), group, partition)
    expected, _ = plain_loss(z, draw_targets(29, (3, 4)), 0.0, -100)
    assert abs(loss - expected - math.log(group.size)) < 1e-13


# The same bytes for any number of ranks: this file is the job.

def main(workers=None):
    with mpitp.TensorParallelGroup(reproducible=True, check=True) as group:
        if workers:
            group.workers.count = workers
        for vocab in (1, 2, 7, 13 * 3 + 1, 64, 4001):
            for dtype in ("float32", "float64"):
                for label_smoothing in (0.0, 0.1):
                    partition, _, mine = whole_and_part(group, vocab, (3, 7), dtype, scale=4.0)
                    loss, saved = vocab_parallel_cross_entropy_forward(
                        mine, draw_targets(vocab, (3, 7)), group, partition, label_smoothing=label_smoothing)
                    dz = group.gather(vocab_parallel_cross_entropy_backward(saved), partition)
                    if group.rank == 0:
                        digest = hashlib.sha256(np.ascontiguousarray(dz).tobytes()).hexdigest()
                        print(vocab, dtype, label_smoothing, loss.hex(), digest)


@pytest.mark.launcher
def test_same_bytes_on_any_number_of_ranks():
    done = {ranks: job(ranks, __file__) for ranks in RANKS}
    assert all(run.returncode == 0 for run in done.values()), [run.stderr for run in done.values()]
    assert len(done[1].stdout.splitlines()) == 24
    assert {run.stdout for run in done.values()} == {done[1].stdout}
    assert job(1, __file__, 3).stdout == done[1].stdout         # blocks side by side


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
