"""Data x tensor grids: the same run on every grid, against a dense one in float64, and the same bits where promised."""
import copy
import hashlib
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import layouts
import mpitp
from decoder_cases import config
from mpitp import oracle
from mpitp.comm import grid_nodes
from mpitp.comm.grid_nodes import nodes_of, order_by_node
from mpitp.comm.ledger import Collective
from mpitp.layers.closed_forms import decoder_collectives
from mpitp.layers.loss import cross_entropy_collectives
from mpitp.layers.norm import NormOverflow
from mpitp.layers.norm_sums import NormSums, NormSumsOfStep
from mpitp.ops.dropout import PartOfStep, dropout_scale
from mpitp.sharding.partition import Partition
from mpitp.training import dealing, gradients, loop
from mpitp.training.data import IGNORED, Tokens
from mpitp.training.dealing import Dealing
from mpitp.training.loop import Settings, Trainer, TrainingStopped
from mpitp.training.resume import resume
from spmd import ROOT, everywhere, job, job_environment

SETTINGS = dict(micro_batch_size=2, gradient_accumulation=3, train_iters=4, lr=0.05, min_lr=0.01, warmup=2,
                clip_grad=0.5, weight_decay=0.3, seed=4, eval_batches=2)
KIND = "llama, one kv head"
WORLD = MPI.COMM_WORLD
# Data ranks of the grids that these ranks make; tensor groups alone are tested elsewhere.
GRIDS = [data for data in (2, 3, 4) if WORLD.size % data == 0] or [1]
RUNS = {}
several = pytest.mark.skipif(WORLD.size == 1, reason="one rank makes no grid")


class Uneven(Tokens):
    """Tokens of which the last sequences of a batch count for less than the first: 5 of 7, then 1 of 7, in turns."""

    def batch(self, number, size):
        ids, targets = super().batch(number, size)
        targets = targets.copy()
        for row, of_sequence in enumerate(targets):
            of_sequence[5 if row < size // 2 else 1:] = IGNORED
        return ids, targets


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory)


def write_text(tmp_path_factory):
    """The path of the bytes that are trained on."""
    path = WORLD.bcast(str(tmp_path_factory.mktemp("data") / "text"))
    if WORLD.rank == 0:
        with open(path, "wb") as out:
            out.write(bytes((7 * i * i + i // 3) % 27 for i in range(900)))
    WORLD.Barrier()
    return path


@pytest.fixture(params=[False, True], ids=["ordinary", "reproducible"])
def reproducible(request):
    return request.param


def trainer(ranks, text, kind=KIND, dtype="float64", folder=None, tokens=Tokens, dropout=0.0, layers=1, **more):
    settings = Settings(**{**SETTINGS, **more})
    configuration = config(kind, num_layers=layers, hidden_dropout=dropout, attention_dropout=dropout)
    return Trainer(ranks, configuration, tokens(text, configuration.vocab_size, 7, settings.seed), settings,
                   dtype=dtype, folder=folder, say=lambda line: None)


def trained(made, steps=2):
    """{name: dense array} of weights and state after some steps, the losses and the validation loss, on every rank."""
    losses = [made.train_step()["loss"] for _ in range(steps)]
    losses.append(made.validate())
    found = {"losses": np.array(losses)}
    for what in ("master", "exp_avg", "exp_avg_sq"):
        dense = made.group.comm.bcast(made.model.gather(getattr(made.optimizer, what)))
        found.update({f"{what} {name}": array for name, array in dense.items()})
    return found


def digest(found):
    whole = hashlib.sha256()
    for name, array in sorted(found.items()):
        whole.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def far(found, expected):
    """Names of what differs by more than rounding."""
    return [name for name, array in found.items()
            if not np.abs(array - expected[name]).max() <= 1e-7 * max(1e-3, np.abs(expected[name]).max())]


def alone(text, reproducible=False, **options):
    """The same run on this rank alone, computed once."""
    key = str((reproducible, options))
    if key not in RUNS:
        with mpitp.TensorParallelGroup(MPI.COMM_SELF, reproducible=reproducible) as group:
            RUNS[key] = trained(trainer(group, text, **options))
    return RUNS[key]


# --- one run on every grid ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", GRIDS)
def test_a_grid_trains_as_one_rank_does(text, reproducible, data):
    """With dropout, a batch that no number of ranks divides, and tokens that count unevenly. Bits, where promised."""
    options = dict(tokens=Uneven, dropout=0.2, micro_batch_size=5, gradient_accumulation=1)
    exact = alone(text, reproducible=reproducible, **options)
    with mpitp.Grid(data=data, reproducible=reproducible, check=True) as grid:
        found = trained(trainer(grid, text, **options))
    assert everywhere(far(found, exact) == []), far(found, exact)
    if reproducible:
        assert everywhere(digest(found) == digest(exact))


def test_the_cut_into_micro_batches_changes_no_bit(text):
    expected = digest(alone(text, True, tokens=Uneven, dropout=0.2, micro_batch_size=5, gradient_accumulation=1))
    with mpitp.Grid(data=GRIDS[0], reproducible=True) as grid:
        found = digest(trained(trainer(grid, text, tokens=Uneven, dropout=0.2, micro_batch_size=1,
                                       gradient_accumulation=5)))
    assert everywhere(found == expected)


def test_micro_batches_as_units(text):
    """The same bits on every grid, for this cut alone; with fewer micro-batches than data ranks, too."""
    options = dict(dropout=0.1, micro_batch_size=2, gradient_accumulation=2, reproducible_unit="micro-batch")
    expected = digest(alone(text, True, **options))
    for data in GRIDS:
        with mpitp.Grid(data=data, reproducible=True) as grid:
            assert everywhere(digest(trained(trainer(grid, text, **options))) == expected)


@several
def test_more_data_ranks_than_sequences(text, reproducible):
    options = dict(micro_batch_size=1, gradient_accumulation=1)
    exact = alone(text, reproducible=reproducible, **options)
    with mpitp.Grid(data=WORLD.size, reproducible=reproducible) as grid:
        found = trained(trainer(grid, text, **options))
    assert everywhere(far(found, exact) == []) and (not reproducible or everywhere(digest(found) == digest(exact)))


def test_on_the_device(group, text):
    """Over what carries arrays between GPUs, too: the losses are those of the tensor group."""
    expected = trainer(group, text)
    with mpitp.Grid(data=group.size, reproducible=group.reproducible) as grid:
        made = trainer(grid, text)
        for _ in range(2):
            loss = made.train_step()["loss"]
            assert everywhere(loss == pytest.approx(expected.train_step()["loss"], rel=1e-9))


def test_groups_of_a_grid():
    for data in GRIDS:
        with mpitp.Grid(data=data, tensor=WORLD.size // data) as grid:
            tensor = WORLD.size // data
            assert (grid.data.size, grid.tensor.size, grid.world.size) == (data, tensor, WORLD.size)
            assert grid.data.rank * tensor + grid.tensor.rank == grid.world.rank == WORLD.rank


def test_the_order_of_ranks_by_node():
    """As many tensor groups inside of nodes as can be; the launcher's order where it has as many."""
    for nodes, tensor, expected in (("aabb", 2, [0, 1, 2, 3]), ("abab", 2, [0, 2, 1, 3]), ("abab", 4, [0, 1, 2, 3]),
                                    ("abababab", 2, [0, 2, 1, 3, 4, 6, 5, 7]), ("abcabc", 2, [0, 3, 1, 4, 2, 5]),
                                    ("abababab", 4, [0, 2, 4, 6, 1, 3, 5, 7]), ("aaabbb", 2, [0, 1, 2, 3, 4, 5]),
                                    ("aaabbccc", 2, [0, 1, 2, 7, 3, 4, 5, 6]), ("abbb", 2, [0, 1, 2, 3]),
                                    ("abcb", 2, [0, 2, 1, 3]), ("aabbaa", 2, [0, 1, 2, 3, 4, 5])):
        assert order_by_node(nodes, tensor) == expected, nodes


@pytest.mark.skipif(WORLD.size != 4, reason="two nodes of two ranks")
def test_tensor_groups_are_inside_of_nodes(text, reproducible, monkeypatch):
    """Ranks that are dealt to two nodes in turns change places, and the run is the same."""
    with mpitp.Grid(data=2) as grid:
        assert grid.tensor.comm.allgather(WORLD.rank) == [[0, 1], [2, 3]][WORLD.rank // 2]
        assert everywhere(nodes_of(grid.world.comm) == [0, 0, 0, 0])
    monkeypatch.setattr(grid_nodes, "node_of_this_rank", lambda comm: comm.rank % 2)
    with mpitp.Grid(data=2, by_node=False) as grid:
        assert grid.tensor.comm.allgather(WORLD.rank) == [[0, 1], [2, 3]][WORLD.rank // 2]
    options = dict(tokens=Uneven, dropout=0.2, micro_batch_size=5, gradient_accumulation=1)
    exact = alone(text, reproducible=reproducible, **options)
    with mpitp.Grid(data=2, reproducible=reproducible, check=True) as grid:
        assert grid.tensor.comm.allgather(WORLD.rank) == [[0, 2], [1, 3]][WORLD.rank % 2]
        assert grid.data.comm.allgather(WORLD.rank) == [[0, 1], [2, 3]][WORLD.rank // 2]
        assert grid.world.comm.allgather(WORLD.rank) == [0, 2, 1, 3]
        found = trained(trainer(grid, text, **options))
    assert everywhere(far(found, exact) == []), far(found, exact)
    assert not reproducible or everywhere(digest(found) == digest(exact))


# --- against a dense run, with planted faults -----------------------------------------------------------------------

def dense_gradients(made):
    """The gradients of the first global batch in one piece, clipped, on one process."""
    weights = made.group.comm.bcast(made.model.gather())
    ids, targets = made.tokens.batch(0, made.settings.global_batch_size)
    logits, saved = oracle.decoder.forward(ids, weights, made.config)
    loss, saved_loss = oracle.cross_entropy.forward(logits, targets)
    found = oracle.decoder.backward(oracle.cross_entropy.backward(saved_loss), saved)
    norm = math.sqrt(sum((g * g).sum() for g in found.values()))
    return float(loss), norm, {name: g * min(1.0, made.settings.clip_grad / norm) for name, g in found.items()}


def problems(grid: mpitp.Grid, text, count=2, **more):
    """What differs from the dense gradients after a step of AdamW without momentum: loss, norm, gradients.

    `count` micro-batches: a sum of two pieces, or of one.
    """
    made = trainer(grid, text, tokens=Uneven, micro_batch_size=4 // count, gradient_accumulation=count, adam_beta1=0.0,
                   lr=0.0, min_lr=0.0, **more)
    loss, norm, exact = dense_gradients(made)
    figures = made.train_step()
    found = made.group.comm.bcast(made.model.gather(made.optimizer.exp_avg))       # what clipping left of them
    wrong = far(found, exact) + [name for name, one, other in (
        ("loss", figures["loss"], loss), ("norm", figures["gradient_norm"], norm)) if abs(one - other) > 1e-9 * other]
    return sorted(set().union(*WORLD.allgather(wrong)))


@pytest.mark.parametrize("data", GRIDS)
def test_gradients_loss_and_norm_against_dense(text, reproducible, data):
    with mpitp.Grid(data=data, reproducible=reproducible) as grid:
        assert problems(grid, text) == []


@several
def test_fault_mean_a_rank_then_average(text, reproducible, monkeypatch):
    """5 tokens of each sequence count on one rank and 1 on another: the mean of means is another loss."""
    with mpitp.Grid(data=WORLD.size, reproducible=reproducible) as grid:
        right = Trainer.add_gradients

        def wrong(self, piece, ids, targets, counted):
            first, last = dealing.Dealing(self.settings, self.data.rank, self.data.size).partition.bounds[
                self.data.rank:self.data.rank + 2]
            _, whole = self.tokens.batch(0, self.settings.global_batch_size)
            right(self, piece, ids, targets, loop.counted_tokens(whole[first:last]) * self.data.size)
        monkeypatch.setattr(Trainer, "add_gradients", wrong)
        found = problems(grid, text)
        assert {"loss", "norm", "embedding.weight"} <= set(found)


@several
@pytest.mark.parametrize("by", ["data", "world"])
def test_fault_divided_by_ranks(text, reproducible, by, monkeypatch):
    with mpitp.Grid(data=GRIDS[0], reproducible=reproducible) as grid:      # of four ranks two, so they are two faults
        right = Trainer.add_gradients
        monkeypatch.setattr(Trainer, "add_gradients", lambda self, piece, ids, targets, counted: right(
            self, piece, ids, targets, counted * getattr(grid, by).size))
        assert {"loss", "norm"} <= set(problems(grid, text))


@several
def test_fault_norm_over_the_world(text, reproducible, monkeypatch):
    with mpitp.Grid(data=WORLD.size, reproducible=reproducible) as grid:
        right = loop.gradient_norm
        monkeypatch.setattr(loop, "gradient_norm", lambda *given: math.sqrt(WORLD.size) * right(*given))
        found = problems(grid, text)
        assert "norm" in found and "embedding.weight" in found and "loss" not in found


def test_fault_accumulation_of_another_count(text, reproducible, monkeypatch):
    """Divided by the tokens of a micro-batch, not of all of them; and all micro-batches but the first lost."""
    with mpitp.Grid(data=1, reproducible=reproducible) as grid:
        right = Trainer.add_gradients
        monkeypatch.setattr(Trainer, "add_gradients", lambda self, piece, ids, targets, counted: right(
            self, piece, ids, targets, loop.counted_tokens(targets)))
        assert {"loss", "norm"} <= set(problems(grid, text))
        monkeypatch.setattr(Trainer, "add_gradients", lambda self, piece, *given: right(self, piece, *given)
                            if piece.start == 0 else None)
        if not reproducible:                                # the tree would miss a leaf
            assert {"loss", "norm"} <= set(problems(grid, text))


@several
def test_fault_no_sum_over_data_ranks(text, monkeypatch):
    with mpitp.Grid(data=WORLD.size) as grid:
        monkeypatch.setattr(gradients, "buckets", lambda size, itemsize: [])
        assert "embedding.weight" in problems(grid, text)


# --- the ledger -----------------------------------------------------------------------------------------------------

def test_collectives_of_the_data_group(text, reproducible, monkeypatch):
    """A step's are the closed form; a run without a grid has none."""
    monkeypatch.setattr(gradients, "BUCKET", 1 << 14)       # several of them
    for data in GRIDS:
        with mpitp.Grid(data=data, reproducible=reproducible) as grid:
            made = trainer(grid, text)
            of_a_step = made.sum.collectives()
            for _ in range(2):
                made.train_step()
            assert everywhere(grid.data.ledger.counts() == of_a_step + of_a_step)
            assert everywhere(bool(of_a_step) == (data > 1))
            elements = sum(key.elements * calls for key, calls in of_a_step.items())
            padding = gradients.ALIGNED * len(made.model.weights)
            size = sum(w.size for w in made.model.weights.values())
            assert data == 1 or size < elements <= size + padding + 1
            if data > 1:
                made.validate()
                windows = sum(1 for _ in made.tokens.validation_batches(*made.dealing.windows()))
                assert grid.data.ledger.counts() == of_a_step + of_a_step + Counter(
                    [Collective("all_reduce", windows, "float64")])


# --- gradients of norms in sequence parallelism: one message of all micro-batches a step -----------------------------

NORMED = "neox with query norm"             # side by side, with norms of queries and keys, too
ROWS = dict(sequence_parallel=True, micro_batch_size=2, gradient_accumulation=2)
SPARED = {NORMED: dict(recompute="block"), "bloom": dict(gather_again=True)}
OF_ROWS = [(1, NORMED), (1, "bloom")] + [(2, NORMED)] * (WORLD.size == 4)      # data ranks, kind


@pytest.mark.parametrize("data, kind", OF_ROWS)
def test_gradients_of_norms_are_summed_once_a_step(text, reproducible, data, kind):
    """The same run as on one rank with whole rows, in which a piece's gradients are whole; and the closed form."""
    options = dict(ROWS, kind=kind, **SPARED[kind])
    exact = alone(text, reproducible, **dict(ROWS, kind=kind, sequence_parallel=False))
    with mpitp.Grid(data=data, reproducible=reproducible, check=True) as grid:
        made = trainer(grid, text, **options)
        grid.tensor.ledger.clear()
        loss = made.train_step()["loss"]
        pieces = [(piece.stop - piece.start) * 7 for piece in made.dealing.pieces]
        expected = made.sum.norm_collectives(len(pieces)) + Counter([Collective("all_reduce", 1, "float64")])
        for tokens in pieces:
            expected += sum((*decoder_collectives(made.model, tokens, with_norms=False),
                             cross_entropy_collectives(tokens, 0.0, "float64")), Counter())
        of_norms = sum(w.size for name, w in made.model.weights.items() if "norm" in name)
        elements = sum(key.elements * n for key, n in made.sum.norm_collectives(len(pieces)).items())
        assert elements == of_norms * (len(pieces) if reproducible else 1)
        assert everywhere(grid.tensor.ledger.counts() == expected)
        found = trained(made, steps=1)
        found["losses"] = np.array([loss, *found["losses"]])
    assert everywhere(far(found, exact) == []), far(found, exact)
    if reproducible:
        assert everywhere(digest(found) == digest(exact))


@several
@pytest.mark.parametrize("fault", ["not summed", "averaged", "each piece by itself, too", "the last piece alone"])
def test_faults_of_a_steps_norms(text, reproducible, fault, monkeypatch):
    right_sum, right_add, right_end = NormSumsOfStep.sum_of, NormSumsOfStep.add, NormSums.end
    if fault == "not summed":
        monkeypatch.setattr(NormSumsOfStep, "sum_of", lambda step, fold, elements: sum(
            fold.known.values(), np.zeros(elements)))
    elif fault == "averaged":
        monkeypatch.setattr(NormSumsOfStep, "sum_of", lambda step, *given: right_sum(step, *given) / WORLD.size)
    elif fault == "the last piece alone":
        def last(step, *given):
            for folds in step.pieces:
                for fold in folds:
                    for summand in fold.known.values():
                        summand *= 0
            right_add(step, *given)
        monkeypatch.setattr(NormSumsOfStep, "add", last)
    else:
        def twice(sums, gradients, step_sums=None):
            if step_sums is None:
                return right_end(sums, gradients)
            right_end(sums, gradients, step_sums)
            for folds in step_sums.pieces[-1:]:
                for number, fold in enumerate(folds):
                    whole = step_sums.sum_of(copy.deepcopy(fold), step_sums.elements[number])
                    for summand in fold.known.values():
                        summand[...] = whole
        monkeypatch.setattr(NormSums, "end", twice)
    with mpitp.Grid(data=1, reproducible=reproducible) as grid:
        found = problems(grid, text, kind=NORMED, sequence_parallel=True)
    assert {"norm", "final_norm.weight", "layers.0.attention.key_norm.weight"} <= set(found)
    assert "loss" not in found


# --- what ends a run, and what it leaves ----------------------------------------------------------------------------

@several
@pytest.mark.parametrize("beside", [False, True], ids=["after backward", "beside it"])
def test_a_norm_that_overflows_on_one_data_rank(text, monkeypatch, beside):
    """The others may have begun their sums: it begins its own, none is left under way, and a step can follow."""
    monkeypatch.setattr(gradients, "BUCKET", 1 << 13)
    with mpitp.Grid(data=WORLD.size) as grid:
        made = trainer(grid, text, micro_batch_size=1, gradient_accumulation=WORLD.size, layers=3,
                       overlap_grad_reduce=beside)
        right = Trainer.add_gradients

        def planted(self, *given):
            if self.data.rank == 1:
                raise NormOverflow("a norm overflows")
            right(self, *given)
        monkeypatch.setattr(Trainer, "add_gradients", planted)
        with pytest.raises(TrainingStopped, match="step 1: a norm overflows"):
            made.train_step()
        assert everywhere(not grid.data.pending)
        monkeypatch.setattr(Trainer, "add_gradients", right)
        assert everywhere(np.isfinite(made.train_step()["loss"]))


@several
def test_copies_that_differ_over_data_ranks(text, reproducible):
    """A slice that no tensor rank shares, and a replicated weight."""
    with mpitp.Grid(data=WORLD.size, reproducible=reproducible) as grid:
        for name in ("layers.0.mlp.up.weight", "final_norm.weight"):
            made = trainer(grid, text)
            made.require_equal_copies()
            if grid.data.rank == WORLD.size - 1:
                made.model.weights[name].flat[0] += 1e-9
            with pytest.raises(TrainingStopped, match=name):
                made.require_equal_copies()


@several
def test_a_wish_of_any_rank(text):
    with mpitp.Grid(data=WORLD.size) as grid:
        made = trainer(grid, text)
        requests = loop.Requests()
        if grid.world.rank == WORLD.size - 1:
            requests.wish = loop.STOP, "SIGTERM"
        assert made.agreed_wish(requests) == (loop.STOP, "SIGTERM")


def files(folder):
    return {path: hashlib.sha256((folder / path).read_bytes()).hexdigest()
            for path in ("model.safetensors", "optimizer.safetensors", "state.json")}


def test_resumed_on_another_grid(text, tmp_path):
    """Every grid goes on from what another one wrote, with another cut of the batch, to the same files."""
    folder = Path(WORLD.bcast(str(tmp_path)))
    found = []
    cuts = [dict(micro_batch_size=4, gradient_accumulation=1), dict(micro_batch_size=1, gradient_accumulation=4)]
    for number, (first, second) in enumerate(((GRIDS[-1], 1), (1, GRIDS[0]))):
        out = folder / f"{number}"
        if WORLD.rank == 0:
            out.mkdir()
        WORLD.Barrier()
        for data, steps, cut in ((first, 1, cuts[0]), (second, 2, cuts[1])):
            with mpitp.Grid(data=data, reproducible=True) as grid:
                made = trainer(grid, text, folder=str(out), train_iters=steps, lr_decay_iters=2, **cut)
                if steps == 2:
                    assert resume(made) and made.step == 1
                made.run()
        found.append(files(out / "step-00000002"))
        WORLD.Barrier()
    assert all(one == found[0] for one in found)


@several
def test_a_save_that_fails_is_an_error_everywhere(text, tmp_path):
    with mpitp.Grid(data=WORLD.size) as grid:
        made = trainer(grid, text, folder=WORLD.bcast(str(tmp_path / "gone")))
        with pytest.raises(mpitp.InputError, match="gone"):
            made.save()


# --- bad input ------------------------------------------------------------------------------------------------------

def test_grids_that_do_not_multiply(world):
    more = world.size + 1
    for options, said in ((dict(data=more), f"{world.size} ranks for data = {more}, expected a multiple of {more}"),
                          (dict(data=1, tensor=more), f"data = 1 x tensor = {more} on {world.size} ranks"),
                          (dict(data=0), "data"), (dict(data=1, tensor=0), "tensor")):
        with pytest.raises(mpitp.InputError) as caught:
            mpitp.Grid(**options)
        assert everywhere(said in str(caught.value)), str(caught.value)


def test_a_run_of_another_unit_is_refused(text, group, tmp_path):
    out = group.comm.bcast(str(tmp_path))
    if not group.reproducible:
        trainer(group, text, folder=out, train_iters=1, lr_decay_iters=4).run()
        with mpitp.TensorParallelGroup(reproducible=True) as other, \
                pytest.raises(mpitp.InputError, match=r"unit = None, expected sequence.*\(without --reproducible\)"):
            resume(trainer(other, text, folder=out))
        return
    trainer(group, text, folder=out, reproducible_unit="micro-batch", train_iters=2, lr_decay_iters=4).run()
    with pytest.raises(mpitp.InputError, match="found unit = micro-batch, expected sequence.*--reproducible-unit"):
        resume(trainer(group, text, folder=out))
    with mpitp.TensorParallelGroup() as other, pytest.raises(mpitp.InputError, match=r"expected None.*\(--reproduc"):
        resume(trainer(other, text, folder=out))
    assert resume(trainer(group, text, folder=out, reproducible_unit="micro-batch"))
    with pytest.raises(mpitp.InputError, match="micro_batch_size = 2, expected 3"):
        resume(trainer(group, text, folder=out, reproducible_unit="micro-batch", micro_batch_size=3, lr_decay_iters=4))


def test_units_of_older_runs():
    from mpitp.training.resume import older_unit
    assert older_unit({"blocks": None}) is None
    for count in (1, 2, 3):                                 # the tree over so many adds from left to right
        assert older_unit({"blocks": 8, "settings": {"gradient_accumulation": count}}) == "micro-batch"
    assert "in a row" in older_unit({"blocks": 8, "settings": {"gradient_accumulation": 4}})


@pytest.mark.launcher
def test_the_command():
    """Bad input in one line; a short run with dropout that says what it is; where there are too few ranks, too."""
    small = ("-m", "mpitp", "train", "--hidden-size", 20, "--num-layers", 1, "--num-attention-heads", 5,
             "--seq-length", 16, "--micro-batch-size", 3, "--train-iters", 2, "--eval-interval", 0, "--eval-batches", 1)
    done = job(2, *small, "--data-parallel", 2)
    assert done.returncode == 0 and "on 2 ranks (data 2 x tensor 1), float32" in done.stdout, done.stdout + done.stderr
    for more, said in ((("--data-parallel", 3), "found 2 ranks for data = 3, expected a multiple of 3"),
                       (("--reproducible-unit", "sequence"), "found --reproducible-unit sequence without")):
        done = job(2, *small, *more)
        assert done.returncode != 0 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.launcher
def test_a_rank_that_fails_ends_the_job(tmp_path):
    """While the other ranks wait for it in their tensor and data groups."""
    (tmp_path / "fails.py").write_text("""
import numpy as np, mpitp
with mpitp.Grid(data=2) as grid:
    if grid.world.rank == 3:
        raise RuntimeError("planted")
    (grid.data if grid.tensor.rank else grid.tensor).all_reduce(np.ones(3))
    grid.world.on_root(lambda: None)
""")
    done = job(4, tmp_path / "fails.py")
    assert done.returncode != 0 and "rank 3 of 4 ends the job" in done.stderr and "planted" in done.stderr, done.stderr


@pytest.mark.launcher
def test_one_hash_over_a_few_layouts():
    """The whole of layouts.py makes the table of docs/same_bits.md."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "layouts.py", "--few", "--steps", "3"], text=True,
                          env=job_environment(), capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("4 layouts, 1 hash\n"), done.stdout + done.stderr


def test_layouts_go_on_where_they_were_ended(tmp_path, monkeypatch):
    """MPI by MPI; what was kept counts if the first layout's digest still is the same. The table is of what was run."""
    ran, page, bits = [], tmp_path / "page.md", ["aa"]

    def train(python, layout, steps):
        if len(ran) == 2 and bits == ["aa"]:
            raise KeyboardInterrupt
        ran.append((python, layout))
        return bits[0] * 32
    monkeypatch.setattr(layouts, "train", train)
    monkeypatch.setattr(layouts, "mpi_of", lambda python: f"MPI of {python}")
    with pytest.raises(KeyboardInterrupt):
        list(layouts.Results(tmp_path / "kept").complete("p", layouts.FEW, 3))
    ran.append("ended")
    for python in "pq":
        found = list(layouts.Results(tmp_path / "kept").complete(python, layouts.FEW[:3], 3))
        assert [kept for _, _, kept in found] == [False, python == "p", False]
    page.write_text(f"before {layouts.BEGIN} old {layouts.END} after")
    names, results = ["MPI of p", "MPI of q"], layouts.Results(tmp_path / "kept")
    del results.of_mpi("MPI of q", 3)[" ".join(layouts.FEW[2].cells())]
    layouts.write(page, results.rows(names, layouts.FEW, 3), names, 3)
    assert "3 layouts, 3 steps each, with MPI of p, and 2 of them with MPI of q; 1 hash:" in page.read_text()
    assert page.read_text().count("| `aaaaaaaaaaaaaaaa` |") == 3 and page.read_text().endswith(f"{layouts.END} after")
    bits[0] = "bb"                                          # another machine, another source: nothing kept is of use
    assert [kept for _, _, kept in layouts.Results(tmp_path / "kept").complete("p", layouts.FEW, 3)] == [False] * 4


# --- how sequences are dealt ----------------------------------------------------------------------------------------

def test_every_sequence_once_in_order():
    for size, count in ((1, 1), (4, 1), (3, 4), (5, 2)):
        for unit in (None, "sequence", "micro-batch"):
            settings = Settings(micro_batch_size=size, gradient_accumulation=count,
                                reproducible_unit=unit or "sequence")
            for ranks in (1, 2, 3, 5, 30):
                pieces = [piece for rank in range(ranks)
                          for piece in Dealing(settings, rank, ranks, unit is not None).pieces]
                assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(size * count))
                assert all(piece.stop - piece.start <= size for piece in pieces)
                if unit:                                    # the leaves do not know how many ranks there are
                    whole = Dealing(settings, 0, 1, True).pieces
                    assert [(p.index, p.start, p.stop) for p in pieces] == [(p.index, p.start, p.stop) for p in whole]


def test_masks_of_a_part_are_those_of_the_whole():
    shape, every = (4, 6, 3), slice(None)
    whole = dropout_scale(3, "a", 5, 0.3, shape, (every, every, every), np.float32)
    part = PartOfStep(5, 1, 2, 4)
    found = dropout_scale(3, "a", part, 0.3, (2, 6, 3), (every, every, every), np.float32)
    assert (found == whole[1:3]).all()
    assert (dropout_scale(3, "a", part, 0.3, (2, 6, 3), (1, slice(2, 5), every), np.float32) == whole[2, 2:5]).all()
    rows = dropout_scale(3, "a", part, 0.3, (12, 3), (slice(4, 9), every), np.float32)    # rows of all sequences
    assert (rows == whole.reshape(24, 3)[10:15]).all()
    settings = Settings(micro_batch_size=4, gradient_accumulation=2)
    addresses = [Dealing(settings, 1, 3).address(2, piece) for piece in Dealing(settings, 1, 3).pieces]
    assert Partition(8, 3, 3).range(1) == slice(2, 5) and addresses == [PartOfStep(4, 2, 2, 4), PartOfStep(5, 0, 1, 4)]
