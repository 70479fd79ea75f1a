"""The data group's sums beside backward: the values of a dense run, the order, the ledger, planted faults.

`StandIn` is a message that hides no mistake: it sums what is there when it is begun, and leaves NaN there until it is
waited for.
"""
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

import mpitp
import stand_in
from mpitp.layers.block import ParallelBlock
from mpitp.sharding.parameters import ParameterSpec
from mpitp.training import gradients, loop
from mpitp.training.buckets import GradientBuckets
from mpitp.training.gradients import Flat, GradientSum, GradientTreeSum
from mpitp.training.loop import TrainingStopped
from spmd import everywhere
from test_grid import GRIDS, NORMED, Uneven, alone, far, problems, trained, trainer, write_text

SIZE = MPI.COMM_WORLD.size
pytestmark = pytest.mark.skipif(SIZE == 1, reason="one rank makes no grid")
BESIDE = dict(overlap_grad_reduce=True, layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET", 1 << 13)


class StandIn:
    """What a group's begin_all_reduce returns in the place of a PendingReduction."""

    def __init__(self, group, x):
        self.group, self.x, self.total = group, x, x.copy()
        with group.ledger.record_control("at once"):
            group.comm.Allreduce(MPI.IN_PLACE, self.total)
        x[...] = np.nan

    def wait(self):
        with self.group._record("all_reduce", self.x):
            self.x[...] = self.total


@pytest.fixture
def grid(monkeypatch):
    """A grid of all ranks whose data groups are stand-ins."""
    with mpitp.Grid(data=GRIDS[0]) as made:
        monkeypatch.setattr(made.data, "begin_all_reduce", lambda x, out: StandIn(made.data, out), raising=False)
        yield made


# --- values -----------------------------------------------------------------------------------------------------------

KINDS = {"llama, one kv head": {}, "gpt2": dict(recompute="block"), NORMED: dict(sequence_parallel=True),
         "bloom": dict(sequence_parallel=True, gather_again=True)}       # gpt2's and bloom's embeddings are tied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", GRIDS)
def test_gradients_loss_and_norm_against_dense(text, data, kind):
    """Of as many pieces as there are sequences, which three data ranks do not divide, and of one piece a rank."""
    with mpitp.Grid(data=data) as grid:
        for count in (4, 1):
            assert problems(grid, text, count, kind=kind, **KINDS[kind], **BESIDE) == []
        assert not grid.data.pending


@pytest.mark.parametrize("kind", ["gpt2", NORMED])
def test_the_same_with_messages_that_are_done_at_once_and_delivered_late(text, grid, kind):
    for count in (4, 1):
        assert problems(grid, text, count, kind=kind, **KINDS[kind], **BESIDE) == []


def test_a_run_and_its_ledger(text):
    """Weights and state after two steps are those of one rank; data ranks without a sequence take part in the sums."""
    options = dict(tokens=Uneven, dropout=0.2, micro_batch_size=1, gradient_accumulation=SIZE - 1, layers=3)
    exact = alone(text, **options)
    with mpitp.Grid(data=SIZE) as grid:
        made = trainer(grid, text, overlap_grad_reduce=True, **options)
        found, of_a_step = trained(made), made.sum.collectives()
        del grid.data.ledger.data[next(key for key in grid.data.ledger.data if key not in of_a_step)]    # of validation
        assert everywhere(grid.data.ledger.counts() == of_a_step + of_a_step and of_a_step.total() > 5)
    assert everywhere(far(found, exact) == []), far(found, exact)


@pytest.mark.skipif(SIZE != 2, reason="the same on more ranks")
def test_a_timeline_has_each_message_once(text):
    """Where it is waited for."""
    with mpitp.Grid(data=SIZE) as grid:
        made = trainer(grid, text, **BESIDE)
        with mpitp.Timeline(grid) as timeline:
            made.train_step()
        found = [span.details for span in timeline.spans.found if getattr(span.details, "ranks", None) == [0, 1]]
        found = Counter(details.what for details in found if hasattr(details.what, "elements"))
        assert everywhere(found == made.sum.collectives())


# --- the order --------------------------------------------------------------------------------------------------------

def test_a_bucket_is_begun_before_the_backward_of_earlier_blocks(text, grid, monkeypatch):
    """In the backward of the last piece alone; all are waited for after it, before the norm."""
    made, found = trainer(grid, text, micro_batch_size=1, gradient_accumulation=2 * SIZE, **BESIDE), []
    begin, backward, norm, wait = grid.data.begin_all_reduce, ParallelBlock.backward, loop.gradient_norm, StandIn.wait
    total = Flat(made.model)

    def begun(x, out):
        first = (x.__array_interface__["data"][0] - made.sum.total.array.__array_interface__["data"][0]) // x.itemsize
        found.append(("begun", first))
        return begin(x, out)

    def block_backward(block, *given, **options):
        done = backward(block, *given, **options)
        found.append(("block", block.name))
        return done
    monkeypatch.setattr(grid.data, "begin_all_reduce", begun)
    monkeypatch.setattr(ParallelBlock, "backward", block_backward)
    monkeypatch.setattr(StandIn, "wait", lambda message: (found.append(("waited for", 0)), wait(message)))
    monkeypatch.setattr(loop, "gradient_norm", lambda *given: (found.append(("norm", 0)), norm(*given))[1])
    made.train_step()
    starts = [at for what, at in found if what == "begun"]
    assert starts == [part.start for part in reversed(gradients.buckets(total.array.size, 8))]      # each once
    begun_after, count, done = {}, Counter(), None
    for what, of in found:
        if what == "block":
            count[of], done = count[of] + 1, of
        elif what == "begun":
            assert count["layers.2"] == len(made.dealing.pieces) > 1
            begun_after.setdefault(done, []).append(of)
    for number in (2, 1):
        name = f"layers.{number}"
        first = total.start_of(made.model.blocks[number])
        assert begun_after[name] and min(begun_after[name]) >= first > min(begun_after[name]) - (1 << 10)
    kinds = [what for what, _ in found if what != "block"]
    assert kinds == ["begun"] * len(starts) + ["waited for"] * len(starts) + ["norm"]


def test_who_sums_beside_backward(text):
    """By default where the transport adds up by itself; never where every message waits for all ranks to agree."""
    for overlaps, asked, check, expected in ((False, None, False, GradientSum), (True, None, False, GradientBuckets),
                                             (True, False, False, GradientSum), (False, True, False, GradientBuckets),
                                             (True, None, True, GradientSum), (True, True, True, GradientSum)):
        with mpitp.Grid(data=SIZE, check=check) as grid:
            grid.data.overlaps = overlaps
            assert type(trainer(grid, text, overlap_grad_reduce=asked).sum) is expected
    with mpitp.Grid(data=SIZE, reproducible=True) as grid:
        assert type(trainer(grid, text).sum) is GradientTreeSum
        with pytest.raises(mpitp.InputError, match="found overlap_grad_reduce in reproducible mode, expected one"):
            trainer(grid, text, overlap_grad_reduce=True)
    with mpitp.TensorParallelGroup() as group:          # one copy has nothing to sum
        assert type(trainer(group, text, overlap_grad_reduce=True).sum) is GradientSum


# --- planted faults ---------------------------------------------------------------------------------------------------

def test_fault_a_bucket_that_is_never_waited_for(text, grid, monkeypatch):
    monkeypatch.setattr(GradientBuckets, "sum_over_ranks", lambda made, data, total: made.begin_from(0))
    with pytest.raises(TrainingStopped, match="found loss .* and gradient norm nan"):
        problems(grid, text, **BESIDE)


def test_fault_a_bucket_that_is_waited_for_too_late(text, grid, monkeypatch):
    """After the norm, which clips."""
    right = loop.gradient_norm

    def late(model, named):
        norm = right(model, named)
        while made[0].under_way:
            made[0].under_way.pop().wait()
        return norm
    made = []
    monkeypatch.setattr(GradientBuckets, "sum_over_ranks", lambda of_step, data, total: (
        of_step.begin_from(0), made.append(of_step)))
    monkeypatch.setattr(loop, "gradient_norm", late)
    with pytest.raises(TrainingStopped, match="gradient norm nan"):
        problems(grid, text, **BESIDE)


def test_fault_a_bucket_that_misses_one_gradient(text, grid, monkeypatch):
    """Begun when the last gradient in front of the block's is not there yet."""
    right = Flat.start_of

    def early(flat, layer):
        start, later = right(flat, layer), sorted(flat.starts.values())
        return later[max(0, later.index(start) - 1)]
    monkeypatch.setattr(Flat, "start_of", early)
    monkeypatch.setattr(gradients, "BUCKET", 8 * gradients.ALIGNED)      # so that one ends where that gradient begins
    missed = {f"layers.{number}.mlp_norm.weight" for number in (0, 1)} | {"embedding.weight", "norm"}
    assert missed == set(problems(grid, text, clip_grad=1e9, **BESIDE))


def test_fault_a_bucket_that_is_not_begun(text, grid, monkeypatch):
    right = GradientBuckets.messages
    monkeypatch.setattr(GradientBuckets, "messages", lambda *given: right(*given)[1:])
    assert {"embedding.weight", "norm"} <= set(problems(grid, text, **BESIDE))


def test_fault_pieces_before_the_last_are_left_out(text, grid, monkeypatch):
    def alone_in_it(made, start):
        if made.count:
            made.total.array[start:made.complete_from] = made.more.array[start:made.complete_from]
        made.complete_from = start
    monkeypatch.setattr(GradientBuckets, "add_from", alone_in_it)
    assert {"head.weight", "norm"} <= set(problems(grid, text, 4, **BESIDE))


# --- on a device ------------------------------------------------------------------------------------------------------

def test_the_stream_that_computes_waits_at_the_end(world, monkeypatch):
    """By NCCL a bucket is summed on a stream beside, behind what the stream that computes was told before."""
    stand_in.install(monkeypatch)
    with mpitp.TensorParallelGroup(device="gpu", transport="nccl") as data:
        shapes = {"embedding.weight": (64, 4), "layers.0.weight": (3000,), "layers.1.weight": (3000,)}
        weights = {name: data.xp.zeros(shape, "float32") for name, shape in shapes.items()}
        specs = {name: ParameterSpec(name, shape, None) for name, shape in shapes.items()}
        model = SimpleNamespace(group=data, weights=weights, specs=specs, sum_dtype=np.dtype("float32"),
                                sequence_parallel=False)
        found, main = GradientBuckets(model, data, None), stand_in.default_stream
        found.begin()
        room = found.room()
        main.reset()
        for number in (1, 0):
            room[f"layers.{number}.weight"][...] = stand_in.array(np.full(3000, data.rank + number, "f"))
            found.complete(SimpleNamespace(specs=[f"layers.{number}.weight"]))
            assert len(data.transport.side_stream.waited) == len(found.under_way) == 3 - number
            assert main.waited == [] and data.ledger.counts() == {}
        room["embedding.weight"][...] = stand_in.array(np.ones((64, 4), "f"))
        found.add(None, 1.0)
        loss, named = found.finish()
        assert main.waited == 4 * [data.transport.side_stream] and not found.under_way
        assert data.ledger.counts().total() == 5 and loss == SIZE
        for name, each in (("layers.0.weight", 0), ("layers.1.weight", 1)):
            assert (named[name].get() == sum(range(SIZE)) + SIZE * each).all()
        assert (named["embedding.weight"].get() == SIZE).all()
