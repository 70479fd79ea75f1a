"""Timelines: what they hold, who they blame, and that nothing of them is left when they end."""
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import mpitp
from mpitp.comm.ledger import Collective, Ledger
from mpitp.errors import InputError
from mpitp.timeline.answer import answer
from mpitp.timeline.clocks import Clock, Reading, read_clock
from mpitp.timeline.places import DEVICE, MPI as IN_MPI, PRODUCTS, PYTHON, TRACKS, WORKERS, timed_places
from mpitp.timeline.spans import Span, Spans, timed
from mpitp.timeline.timeline import Timeline, described
from mpitp.timeline.trace import thread_of, write_trace
from mpitp.timeline.waiting import blamed, own_times, waiting_of
import slow_ranks
from spmd import job


def small_decoder(group):
    return mpitp.Decoder(group, mpitp.DecoderConfig(27, 16, 2, 4, max_position_embeddings=32))


def step(model, ids):
    logits, saved = model.forward(ids)
    loss, of_loss = model.loss(logits, ids)
    gradients = model.backward(model.loss_backward(of_loss), saved)
    return logits, loss, gradients


def shared_path(group, tmp_path, name):
    return group.comm.bcast(str(tmp_path / name))


# --- a real run --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(the trace as rank 0 reads it, the ledger's counts of the recorded step, whether bits and functions stayed)."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("mpitp.timeline.spans.SHORT", 0)    # a small model's calls are
        yield record(tmp_path_factory)


def record(tmp_path_factory):
    path = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("timeline") / "run.json"))
    with mpitp.TensorParallelGroup() as group:
        model, ids = small_decoder(group), np.arange(24).reshape(2, 12) % 27
        before, plain = {(owner, name): owner.__dict__[name] for owner, name, _ in timed_places()}, step(model, ids)
        group.ledger.clear()
        timeline = Timeline(group, path)
        with timeline:
            assert group.timeline is timeline
            found = step(model, ids)
        counts = {key.operation: 0 for key in group.ledger.data}
        for key, entry in group.ledger.data.items():
            counts[key.operation] += entry.calls
        same = all(a.tobytes() == b.tobytes() for a, b in zip((plain[0], *plain[2].values()),
                                                              (found[0], *found[2].values())))
        left = [name for (owner, name), function in before.items() if owner.__dict__[name] is not function]
        assert type(group.ledger) is Ledger and group.timeline is None and group.ledger.current is None
        trace = json.loads(Path(path).read_text()) if group.rank == 0 else None
    return trace, counts, same, left, timeline


def spans(trace, rank, track):
    own = rank, thread_of(rank, track)
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == own]


def test_it_changes_no_bit_and_leaves_nothing_behind(recorded):
    _, _, same, left, _ = recorded
    assert same and not left


def test_spans_nest_and_cover_the_step(recorded, world):
    trace = recorded[0]
    if trace is None:
        return
    for rank in range(world.size):
        events = sorted((e for track in (PYTHON, PRODUCTS, IN_MPI) for e in spans(trace, rank, track)),
                        key=lambda e: (e["ts"], -e["dur"]))
        stack, covered = [], 0.0
        for event in events:
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"] + 5e-4:
                stack.pop()
            if stack:
                assert event["ts"] + event["dur"] <= stack[-1]["ts"] + stack[-1]["dur"] + 5e-4, (stack[-1], event)
            else:
                covered += event["dur"]
            stack.append(event)
        whole = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
        assert covered >= 0.95 * whole


def test_it_names_layers_operations_and_shapes(recorded, world):
    trace = recorded[0]
    if trace is None:
        return
    for rank in range(world.size):
        layers = {event["name"] for event in spans(trace, rank, PYTHON)}
        assert {"layers.0.attention forward", "layers.1.mlp backward", "Decoder forward", "Decoder loss"} <= layers
        products = spans(trace, rank, PRODUCTS)
        assert {"linear_forward", "attention_forward", "linear_backward"} <= {event["name"] for event in products}
        assert all(isinstance(event["args"]["shapes"], list) for event in products)
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert len(names) == world.size and all(name.startswith("rank ") for name in names)


def test_it_has_the_collectives_of_the_ledger(recorded, world):
    trace, counts, *_ = recorded
    if trace is None:
        return
    for rank in range(world.size):
        found = [event for event in spans(trace, rank, IN_MPI) if "args" in event]
        assert {name: sum(event["name"] == name for event in found) for name in counts} == counts
        assert all(event["args"]["bytes"] == 4 * event["args"]["elements"] > 0 for event in found)


def test_the_file_is_of_the_trace_event_format(recorded, world):
    """As the document says, and Perfetto needs it: threads of their own numbers, arrows that begin before they end."""
    trace = recorded[0]
    if trace is None:
        return
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"} and trace["displayTimeUnit"] in ("ms", "ns")
    threads, begun = {}, set()
    for event in trace["traceEvents"]:
        assert event["ph"] in "MXsf" and isinstance(event["name"], str) and event["pid"] in range(world.size)
        if event["ph"] == "M":
            assert set(event) - {"tid"} == {"ph", "name", "pid", "args"} and event["name"].split("_")[0] in (
                "process", "thread")
            if event["name"] == "thread_name":
                assert threads.setdefault(event["tid"], event["pid"]) == event["pid"] and event["tid"] >= world.size
            continue
        assert threads[event["tid"]] == event["pid"] and type(event["ts"]) is float and event["ts"] >= 0
        assert isinstance(event["cat"], str) and isinstance(event.get("args", {}), dict)
        assert event["ph"] != "X" or event["dur"] >= 0
        if event["ph"] == "s":
            begun.add(event["id"])
        assert event["ph"] != "f" or event["bp"] == "e" and event["id"] in begun
    assert len(threads) == world.size * len(TRACKS)


@pytest.mark.parametrize("has_workers", [False, True])
def test_shapes_are_those_of_the_arrays(has_workers, monkeypatch):
    """Of an operation its first two, of which one may be missing; of a method what it was given; of a long call."""
    monkeypatch.setattr("mpitp.timeline.spans.SHORT", 0)
    found = Spans([], has_workers=has_workers)

    def product(name: str, a: mpitp.arrays.Array, b: mpitp.arrays.Array, out: mpitp.arrays.Array | None = None):
        if name == "fails":
            raise ZeroDivisionError
        return name

    def negative(x: mpitp.arrays.Array):
        return x

    class Layer:
        def forward(self, x):
            return x

        def train_step(self):
            return 1

    a, b = np.ones((2, 3)), np.ones((3, 4))
    call, one = timed(product, found, PRODUCTS, False), timed(negative, found, PYTHON, False)
    assert call("name", a, b) == "name" and call("name", b, a, out=a) == "name" and one(b) is b
    with pytest.raises(ZeroDivisionError):
        call("fails", a, b)
    call("name", a=a, b=b)
    Layer.forward, Layer.train_step = (timed(f, found, PYTHON, True) for f in (Layer.forward, Layer.train_step))
    assert Layer().forward(a) is a and Layer().train_step() == 1
    assert [(span.name, span.details) for span in found.found] == [
        ("product", ((2, 3), (3, 4))), ("product", ((3, 4), (2, 3))), ("negative", ((3, 4),)),
        ("product", ((2, 3), (3, 4))), ("product", ()), ("Layer forward", ((2, 3),)), ("Layer train_step", ())]
    assert all(span.start <= span.end for span in found.found)
    monkeypatch.setattr("mpitp.timeline.spans.SHORT", 10**12)
    call("name", a, b)
    assert found.found[-1].details is None
    track = {WORKERS} if has_workers else {PRODUCTS}
    thread = threading.Thread(target=call, args=("name", a, b))
    thread.start()
    thread.join()
    assert {span.track for span in found.found[-1:]} == track and {span.track for span in found.found[:2]} == {PRODUCTS}


@pytest.mark.parametrize("by", ["calls", "collectives"])
def test_where_there_is_no_more_room_nothing_is_timed(group, monkeypatch, by):
    monkeypatch.setattr("mpitp.timeline.spans.SHORT", 0 if by == "calls" else 10**12)
    monkeypatch.setattr("mpitp.timeline.spans.MOST", 50)
    model, ids = small_decoder(group), np.arange(24).reshape(2, 12) % 27
    before = {(owner, name): owner.__dict__[name] for owner, name, _ in timed_places()}
    with Timeline(group) as timeline:
        for _ in range(20):
            step(model, ids)
            if by == "collectives":
                group.any(False)
        assert 50 < len(timeline.spans.found) < 150 and type(group.ledger) is Ledger
        assert all(owner.__dict__[name] is function for (owner, name), function in before.items())
    assert group.rank > 0 or "later ones are left out" in timeline.answer


def test_waiting_and_transfer_are_apart_and_arrows_join_the_ranks(recorded, world):
    trace = recorded[0]
    if trace is None or world.size == 1:
        return
    starts = {e["id"]: e for e in trace["traceEvents"] if e["ph"] == "s"}
    ends = [e for e in trace["traceEvents"] if e["ph"] == "f"]
    assert starts and len(ends) == len(starts) * (world.size - 1)
    for end in ends:
        assert end["ts"] >= starts[end["id"]]["ts"] and end["pid"] != starts[end["id"]]["pid"]
    for rank in range(world.size):
        events = spans(trace, rank, IN_MPI)
        waiting = [e for e in events if e["name"] == "waiting"]
        transfer = [e for e in events if e["name"] == "transfer"]
        sums = [e for e in events if e["name"] in ("all_reduce", "all_gather") and "args" in e]
        assert len(waiting) == len(transfer) >= len(sums) > 0
        for first, second in zip(waiting, transfer):
            assert first["dur"] >= 0 and second["dur"] >= 0
            assert first["ts"] + first["dur"] == pytest.approx(second["ts"], abs=2e-3)


@pytest.mark.parametrize("number, reproducible", [(0, False), (1, False), (2, True), (5, False)])
def test_a_rank_that_is_slow_in_one_operation_is_named(world, number, reproducible):
    """Each rank in turn; by more where a busy machine makes others late, too. All cases: support/slow_ranks.py."""
    with mpitp.TensorParallelGroup(reproducible=reproducible) as group:
        model = slow_ranks.decoder(group)
        for seconds in (0.04, 0.2, 1.0, 3.0):
            expected, answer = slow_ranks.run(group, model, number, seconds, steps=1)
            if group.comm.bcast(world.size == 1 or slow_ranks.is_named(expected, answer)):
                break
        if group.rank == 0:
            assert slow_ranks.is_named(expected, answer) or answer == "one rank: it waits for nobody", answer


# --- made-up runs, whose answer is known -----------------------------------------------------------------------------

def made_up(ranks, slow, layer, operation, rng, steps=4, layers=3, extra=300_000):
    """Spans of ranks whose clocks are one, of which one takes longer in one operation of one layer."""
    of_ranks = [[] for _ in range(ranks)]
    at = [0] * ranks
    for _ in range(steps):
        for number in range(layers):
            for part in ("attention", "mlp"):
                label, starts = f"layers.{number}.{part}", list(at)
                for rank in range(ranks):
                    for name, track in (("linear_forward", PRODUCTS), ("norm_forward", PYTHON)):
                        took = 1_000_000 + int(rng.integers(0, 20_000))
                        took += extra if (rank, label, name) == (slow, layer, operation) else 0
                        of_ranks[rank].append(Span(track, name, at[rank], at[rank] + took, None))
                        at[rank] += took + 1_000
                complete = max(at)
                for rank in range(ranks):
                    of_ranks[rank].append(Span(IN_MPI, "all_reduce", at[rank], complete + 50_000, None))
                    at[rank] = complete + 50_000 + int(rng.integers(0, 2_000))
                    of_ranks[rank].append(Span(PYTHON, f"{label} forward", starts[rank], at[rank], None))
                    at[rank] += 500
    return of_ranks


def test_a_slow_operation_is_found_in_twenty_of_twenty():
    rng = np.random.default_rng(0)
    for case in range(20):
        ranks, part = 2 + case % 3, ("attention", "mlp")[case % 2]
        slow, number = int(rng.integers(ranks)), int(rng.integers(3))
        operation = ("linear_forward", "norm_forward")[case // 2 % 2]
        of_ranks = made_up(ranks, slow, f"layers.{number}.{part}", operation, rng)
        waiting = waiting_of(of_ranks)
        where, lost = blamed(of_ranks, waiting, slow)
        assert where == f"layers.{number}.{part} forward: {operation}", case
        assert lost == pytest.approx(4 * 300_000, rel=0.2)
        assert answer(of_ranks, waiting).startswith(f"rank {slow} arrives last in ")


def test_what_is_slow_in_every_layer_is_named_once():
    of_ranks = made_up(2, 1, "layers.0.mlp", "linear_forward", np.random.default_rng(1), layers=1)
    more = made_up(2, 1, "layers.1.mlp", "linear_forward", np.random.default_rng(2), layers=2)
    end = max(span.end for spans in of_ranks for span in spans)
    for spans_, later in zip(of_ranks, more):
        spans_ += [span._replace(start=span.start + end, end=span.end + end) for span in later]
    assert blamed(of_ranks, waiting_of(of_ranks), 1)[0] == "layers.*.mlp forward: linear_forward"


def test_ranks_that_are_alike_are_not_blamed():
    of_ranks = made_up(3, None, None, None, np.random.default_rng(3))
    assert answer(of_ranks, waiting_of(of_ranks)).startswith("no rank keeps the others waiting")


def test_own_times_add_up_to_the_time_outside_of_collectives():
    of_ranks = made_up(2, 0, "layers.1.mlp", "norm_forward", np.random.default_rng(4))
    for spans_ in of_ranks:
        inside = sum(span.end - span.start for span in spans_ if span.track == IN_MPI)
        whole = max(span.end for span in spans_) - min(span.start for span in spans_)
        assert sum(took for _, _, took in own_times(spans_)) == whole - inside


def test_bytes_of_a_collective():
    assert [described(Collective("all_reduce", 3, dtype))["bytes"] for dtype in ("float32", "bfloat16", "int64")] == [
        12, 6, 24]
    assert described("agreement") is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("an earlier one")
    of_ranks = [[Span(PYTHON, "x", 0, 1, {"shapes": object()})]]
    with pytest.raises(TypeError):
        write_trace(str(path), of_ranks, ["host"], waiting_of(of_ranks), {})
    assert path.read_text() == "an earlier one"


def test_waiting_of_known_arrivals():
    spans_ = [[Span(IN_MPI, "all_reduce", start, 90, Collective("all_reduce", 4, "float32")),
               Span(IN_MPI, "broadcast", 95, 96, None)] for start in (10, 40, 70)]
    waiting = waiting_of(spans_)
    assert waiting.number.tolist() == [[0]] * 3 and waiting.last.tolist() == [2]
    assert waiting.waited[:, 0].tolist() == [60, 30, 0] and waiting.late.tolist() == [30]


def test_waiting_in_the_groups_of_a_grid():
    """Ranks 0 and 1, and 2 and 3, are tensor groups, which need not add up as often; 0 and 2, 1 and 3 data groups."""
    def sums(*of_rank):
        return [Span(IN_MPI, "all_reduce", start, end, {"ranks": list(ranks)} if ranks else None)
                for ranks, start, end in of_rank]
    of_ranks = [sums(((0, 1), 0, 10), ((0, 2), 20, 42), ((), 50, 60)),
                sums(((0, 1), 5, 10), ((1, 3), 20, 32), ((), 45, 60)),
                sums(((2, 3), 0, 10), ((2, 3), 12, 30), ((0, 2), 40, 42), ((), 50, 60)),
                sums(((2, 3), 8, 10), ((2, 3), 28, 30), ((1, 3), 31, 32), ((), 58, 60)), ]
    waiting = waiting_of(of_ranks)
    assert waiting.number.T.tolist() == [[0, 0, -1, -1], [-1, -1, 0, 0], [-1, -1, 1, 1], [1, -1, 2, -1],
                                         [-1, 1, -1, 2], [2, 2, 3, 3]]
    assert waiting.last.tolist() == [1, 3, 3, 2, 3, 3] and waiting.late.tolist() == [5, 8, 16, 20, 11, 8]
    assert waiting.waited.sum(axis=1).tolist() == [5 + 20 + 8, 11 + 13, 8 + 16 + 8, 0]
    assert answer(of_ranks, waiting).startswith("rank 3 arrives last in 100% of the sums")


@pytest.mark.skipif(MPI.COMM_WORLD.size != 4, reason="a grid of 2 x 2")
@pytest.mark.parametrize("slow", [0, 3])
def test_a_grid(world, tmp_path, slow):
    """The collectives of the world, the tensor and the data groups are those of their ledgers; a slow rank is named."""
    with mpitp.Grid(data=2) as grid:
        path = shared_path(grid.world, tmp_path, "grid.json")
        model, ids = small_decoder(grid.tensor), np.arange(24).reshape(2, 12) % 27
        ledgers = {0: grid.world.ledger, 1: grid.tensor.ledger, 2: grid.data.ledger}
        with Timeline(grid, path) as timeline:
            for _ in range(3 + grid.data.rank):             # data ranks need not have as many pieces
                time.sleep(0.1 if grid.world.rank == slow else 0)
                step(model, ids)
            grid.data.all_reduce(np.ones(5))
            grid.world.any(False)
        found = [(key.operation, key.elements) for ledger in ledgers.values() for key, entry in ledger.data.items()
                 for _ in range(entry.calls)]
        assert type(grid.tensor.ledger) is type(grid.data.ledger) is Ledger and grid.world.timeline is None
        of_all = grid.world.comm.gather(sorted(found))
        if of_all:
            trace = json.loads(Path(path).read_text())
            for rank, expected in enumerate(of_all):
                events = [e for e in spans(trace, rank, IN_MPI) if "elements" in e.get("args", {})]
                assert sorted((e["name"], e["args"]["elements"]) for e in events) == expected
                rows, columns = [[0, 1], [2, 3]][rank // 2], [[0, 2], [1, 3]][rank % 2]
                assert {tuple(e["args"]["ranks"]) for e in events} == {tuple(rows), tuple(columns)}
            assert timeline.answer.startswith(f"rank {slow} arrives last in "), timeline.answer


# --- clocks ---------------------------------------------------------------------------------------------------

def test_offset_and_drift_are_taken_out():
    true = np.linspace(0, 1e9, 11)
    ours = true * (1 + 5e-5) + 123_456_789                  # a clock that runs fast by 50 parts in a million
    clock = Clock(*(Reading(int(ours[i]), true[i] - ours[i]) for i in (0, -1)))
    assert max(abs(clock(int(at)) - t) for at, t in zip(ours, true)) < 10


def test_clocks_of_one_host_agree(world):
    """They are one clock: what is found apart is the error of the method, half of the quickest round."""
    reading = read_clock(world)
    apart = [reading.ahead for reading in world.allgather(reading)]
    assert apart[0] == 0 and all(abs(ahead) < 50e6 for ahead in apart)


@pytest.mark.skipif("config.getoption('device') == 'cpu'", reason="needs --device gpu or stand-in")
def test_operations_of_a_gpu_lie_inside_the_recording(group):
    model, ids = small_decoder(group), np.arange(24).reshape(2, 12) % 27
    begin = time.perf_counter_ns()
    with Timeline(group) as timeline:
        model.forward(ids)
    device = [span for span in timeline.spans.found if span.track == DEVICE]
    assert {"linear_forward", "attention_forward"} <= {span.name for span in device}
    for span in device:
        first, last = map(timeline.device.time_of, span.details)
        assert begin - 1e6 <= first <= last <= time.perf_counter_ns() + 1e6


# --- bad input, and the command line --------------------------------------------------------------------------------

def test_bad_input(group, tmp_path):
    with pytest.raises(InputError, match=r"found timeline 'run.txt', expected FILE.json or FILE.png"):
        Timeline(group, "run.txt")
    missing = shared_path(group, tmp_path, "nowhere/run.json")
    with pytest.raises(InputError, match="found no way to write .*nowhere/run.json"):
        Timeline(group, missing)
    with Timeline(group), pytest.raises(InputError, match="found two timelines at once"):
        Timeline(group).start()
    MPI.COMM_WORLD.Barrier()


def test_an_error_inside_puts_everything_back(group):
    before = {(owner, name): owner.__dict__[name] for owner, name, _ in timed_places()}
    with pytest.raises(ZeroDivisionError), Timeline(group):
        raise ZeroDivisionError
    assert all(owner.__dict__[name] is function for (owner, name), function in before.items())


@pytest.mark.launcher
def test_commands_write_one(tmp_path):
    on_grid = job(2, "-m", "mpitp", "train", "--hidden-size", "16", "--num-layers", "1", "--num-attention-heads", "2",
                  "--seq-length", "16", "--train-iters", "2", "--data-parallel", "2", "--timeline", tmp_path / "g.json")
    assert on_grid.returncode == 0 and f"timeline ({tmp_path / 'g.json'}): " in on_grid.stderr, on_grid.stderr
    found = job(2, "-m", "mpitp", "train", "--hidden-size", "16", "--num-layers", "1", "--num-attention-heads", "2",
                "--seq-length", "16", "--train-iters", "2", "--timeline", tmp_path / "train.json")
    assert found.returncode == 0, found.stderr
    names = {event["name"] for event in json.loads((tmp_path / "train.json").read_text())["traceEvents"]}
    assert {"Trainer train_step", "AdamW step", "all_reduce", "layers.0.attention forward"} <= names
    assert f"timeline ({tmp_path / 'train.json'}): " in found.stderr and "BLAS products" in found.stderr
    found = job(2, "-m", "mpitp", "verify", "--timeline", tmp_path / "verify.txt")
    assert found.returncode == 2 and found.stderr.count("expected FILE.json or FILE.png") == 1


@pytest.mark.launcher
def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = job(2, "-m", "mpitp", "verify", "--hidden-size", "32", "--timeline", tmp_path / "verify.png")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "verify.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
