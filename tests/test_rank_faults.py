"""Some rows of tests/faults.py, one of each kind; and the watchdog's own parts."""
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import faults
import mpitp
from mpitp import InputError
from mpitp.comm import agreement, stand
from mpitp.comm.ledger import Collective, Ledger
from mpitp.verification.feed_forward import FeedForwardCheck
from spmd import job, job_environment

FAULTS = {              # (fault, command, rank, hosts): one of each kind
    ("another --weight-decay", "train", 1, 1), ("an unknown option", "verify", 0, 1),
    ("another command", "generate", 1, 1), ("other weights", "score", 1, 1), ("no folder", "generate", 1, 1),
    ("a flipped bit, --verify-weights", "verify", 1, 1), ("is stopped", "train", 0, 1), ("spins", "generate", 1, 1),
    ("exits with 0", "with", 1, 1), ("closes the group", "with", 1, 1), ("raises", "bare", 1, 1),
    ("finds bad input", "guarded", 1, 1), ("does another collective", "bare", 1, 1),
    ("fails in a thread", "bare", 1, 1), ("computes in a thread", "with", 1, 1),
    ("makes a subgroup alone, check=True", "with", 1, 1), ("a forked child raises", "with", 1, 1),
    ("a handle is dropped", "with", 0, 1), ("others leave while it goes on", "with", 0, 1),
    ("another kind of machine", "verify", 1, 1), ("is stopped", "train", 1, 2),
    ("exits with 0 before the group", "with", 1, 1), ("is stopped before it begins", "verify", 1, 1),
    ("exits with 0", "train, data-parallel", 1, 1)}


def key(row):
    return row.fault, row.command, row.rank, row.hosts


def chosen():
    return {key(row): row for row in faults.rows() if key(row) in FAULTS}


@pytest.fixture(scope="module")
def outcomes():
    """{row: its outcome to come}; most of their time is waiting."""
    mpi = faults.mpi_of(sys.executable)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        faults.prepare(folder)
        yield {name: pool.submit(faults.run, row, sys.executable, mpi, folder)
               for name, row in chosen().items() if faults.is_possible(row, mpi)}


def test_every_row_is_known():
    assert set(chosen()) == FAULTS
    assert len(faults.rows()) > 150 and len({(*key(row), row.words) for row in faults.rows()}) == len(faults.rows())


@pytest.mark.launcher
@pytest.mark.parametrize("row", sorted(FAULTS), ids=lambda row: ", ".join(map(str, row)))
def test_row(outcomes, row):
    if row not in outcomes:
        pytest.skip("this launcher cannot do it")
    outcome = outcomes[row].result()
    assert outcome.problems == [], outcome


@pytest.mark.launcher
def test_a_row_that_fails_is_seen(tmp_path):
    """The tester, tested: without the watchdog the row takes too long, and nothing is said."""
    faults.prepare(tmp_path)
    row = faults.failing("sleeps", "bare", ["bare"], 1, 3)
    off = [({"MPITP_STALL_LIMIT": "0"}, ("-c", f"import faulthandler; faulthandler.dump_traceback_later(4, exit=True)\n"
                                               f"import sys, runpy; sys.argv = {list(arguments)}\n"
                                               f"runpy.run_path(sys.argv[0], run_name='__main__')"))
           for _, arguments in row.starts]
    outcome = faults.run(faults.replace(row, starts=tuple(off)), sys.executable, "MPI", tmp_path)
    assert any("does not say it" in problem for problem in outcome.problems), outcome


# --- without an MPI, before the work ------------------------------------------------------------------------

def without_mpi(*words):
    return subprocess.run([sys.executable, "-m", "mpitp", *words], text=True, capture_output=True, timeout=60,
                          env=job_environment(MPI4PY_LIBMPI="/nowhere/libmpi.so"))


@pytest.mark.launcher
def test_help_and_version_need_no_mpi():
    assert without_mpi("--version").stdout == f"mpitp {mpitp.__version__}\n"
    assert "commands:" in without_mpi("--help").stdout
    done = without_mpi("verify")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "found no MPI for mpi4py (cannot" in done.stderr


@pytest.mark.launcher
@pytest.mark.parametrize("words, said", [
    (("verify", "--blocks", "3"), "found --blocks 3 without --reproducible, expected both"),
    (("train", "--blocks", "3"), "found --blocks 3 without --reproducible, expected both"),
    (("inspect", "nowhere", "--blocks", "3"), "found --blocks 3 without --reproducible, expected both"),
    (("verify", "--verify-weights"), "found --verify-weights without --model"),
    (("verify", "--stall-limit", "-1"), "found MPITP_STALL_LIMIT = '-1.0', expected seconds"),
    (("doctor", "--json", "/nowhere/x"), "found no way to write '/nowhere/x'")])
def test_refused_in_one_line(words, said):
    done = job(2, "-m", "mpitp", *words, timeout=20)
    assert done.returncode == 2 and done.stderr.count("mpitp: ") == 1 and said in done.stderr, done.stderr
    assert done.stdout == ""


# --- agreement ----------------------------------------------------------------------------------------------

def test_same_everywhere(world):
    assert agreement.same_everywhere(world, lambda: world.rank, lambda rank: {"all": "the same"}) == world.rank
    if world.size > 1:
        with pytest.raises(InputError, match=r"^the ranks disagree on b: rank 0: 0; ranks? 1.*: 1$"):
            agreement.same_everywhere(world, lambda: min(world.rank, 1), lambda n: {"a": "x", "b": str(n)})
        with pytest.raises(InputError, match=r"^rank 1 on .*: nowhere: found No such file or directory, expected to"):
            agreement.same_everywhere(world, lambda: os.stat("nowhere" if world.rank == 1 else "/"), lambda found: {})
    with pytest.raises(InputError, match="^found a, expected b$"):
        agreement.same_everywhere(world, bad_input, lambda found: {})


def bad_input():
    raise InputError("found a, expected b")


def test_first_difference():
    same = ({"a": "1"}, None, "h0")
    assert agreement.first_difference([same, ({}, "found x", "h1")]) == "rank 1 on h1: found x"
    assert agreement.first_difference([same, ({"a": "1", "c": "3"}, None, "h1")]) == \
        "the ranks disagree on c: rank 0: nothing; rank 1: 3"


# --- the API under misuse -----------------------------------------------------------------------------------

@pytest.mark.host
def test_another_thread_is_refused_and_may_be_given_the_group(group):
    caught = []

    def reduce():
        for call in (lambda: group.all_reduce(np.ones(2)), lambda: group.any(True),
                     lambda: group.begin_all_reduce(np.ones(2)), lambda: group.subgroup(0), group.close,
                     lambda: mpitp.ParallelMLP(group, 4).forward(np.ones((1, 4), "f"))):
            with pytest.raises(InputError, match="found a collective in another thread"):
                call()
            caught.append(call)
        before, group.ledger.thread = group.ledger.thread, threading.get_ident()
        caught.append(group.all_reduce(np.ones(2))[0])
        group.ledger.thread = before

    thread = threading.Thread(target=reduce)
    if group.check:                             # the check's own collectives are refused, too
        group.check = False
    thread.start()
    thread.join()
    assert len(caught) == 7 and caught[-1] == group.size


def test_pending_reductions_are_kept_and_waited_for(world):
    group = mpitp.TensorParallelGroup()
    x, out = np.ones(100000), np.zeros(100000)
    group.begin_all_reduce(x, out=out)          # dropped
    kept = group.begin_all_reduce(x)
    assert len(group.pending) == 2 and kept.wait()[0] == world.size and len(group.pending) == 1
    group.close()
    assert group.pending == [] and (out == world.size).all()


@pytest.mark.host
def test_arrays_that_mpi_or_numpy_would_misread(group):
    x, good = np.ones((2, 4), "f"), np.zeros((2, 4), "f")
    read_only = good.copy()
    read_only.flags.writeable = False
    unaligned = np.zeros(33, "u1")[1:].view("f").reshape(2, 4)
    for out in (read_only, unaligned):
        with pytest.raises(InputError, match="found out float32.*aligned and writable"):
            group.all_reduce(x, out=out)
    with pytest.raises(InputError, match="found out float32.*aligned and writable"):
        group.all_reduce(unaligned, out=unaligned)
    masked = np.ma.masked_array(x, mask=x > 0)
    with pytest.raises(InputError, match="found numpy.ma.MaskedArray, expected an array of numpy"):
        group.all_reduce(masked)
    unaligned[...] = 3
    assert (group.all_reduce(unaligned) == 3 * group.size).all() and (group.broadcast(unaligned) == 3).all()
    partition = group.partition(4)
    part = partition.range(group.rank)
    mine = np.zeros(2 * (part.stop - part.start) * 4 + 1, "u1")[1:].view("f").reshape(2, -1)
    mine[...] = 3
    assert (group.all_gather(mine, partition) == 3).all()


@pytest.mark.host
def test_layers_under_misuse(group):
    x, other = np.ones((2, 4), "f"), mpitp.ParallelMLP(group, 4, seed=1)
    layer = mpitp.ParallelMLP(group, 4)
    _, saved = layer.forward(x)
    _, gradients = layer.backward(x, saved)
    for wrong in (other.forward(x)[1], saved[1:], (), [layer], x):
        with pytest.raises(InputError, match="found saved of another layer, expected what this ParallelMLP's forward"):
            layer.backward(x, wrong)
    for out in (layer.weights, dict(layer.weights)):
        with pytest.raises(InputError, match="weights.*in the same memory, expected an array for each gradient"):
            layer.backward(x, saved, out=out)
    for replace in (lambda: layer.weights.__setitem__("up.weight", gradients["up.weight"]),
                    lambda: layer.weights.update(gradients)):
        with pytest.raises(InputError, match=r"another array for weights\['up.weight'\]"):
            replace()
    layer.weights["up.weight"] *= 2             # in place
    masked = np.ma.masked_array(x, mask=x > 0)
    with pytest.raises(InputError, match="found numpy.ma.MaskedArray"):
        layer.forward(masked)
    with pytest.raises(InputError, match="up.weight: found a masked array"):
        layer.load_dense({name: np.ma.zeros(spec.shape) for name, spec in layer.specs.items()})
    embedding = mpitp.VocabParallelEmbedding(group, 9, 4)
    with pytest.raises(InputError, match="ids: a masked array"):
        embedding.forward(np.ma.masked_array([1, 2]))


def test_ids_without_positions_give_no_logits(group):
    model = mpitp.Decoder(group, mpitp.DecoderConfig(12, 8, 1, 2))
    for shape in ((2, 0), (0, 3)):
        logits, saved = model.forward(np.zeros(shape, int))
        assert logits.shape == (*shape, model.partition.lengths[group.rank])
        assert not any(g.any() for g in model.backward(logits, saved).values())


# --- the watchdog's parts -----------------------------------------------------------------------------------

def test_where_a_thread_stands():
    """The program's line; mpitp's and the program's; the MPI function that mpitp's line calls."""
    def wait():
        event.wait()

    event = threading.Event()
    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    found = stand.where(sys._current_frames()[thread.ident])
    event.set()
    thread.join()
    assert found.call is None and not found.is_in_comm and "in wait" in found.place
    assert stand.where(None).place == "its end"
    assert stand.MPI_CALL.search("        x = self.comm.allgather(1)")[1] == "allgather"


def test_a_rank_waits_where_any_line_of_mpitp_calls_a_communicator():
    from mpitp.training import loop
    lines = Path(loop.__file__).read_text().splitlines()
    for words, waits in (("comm.allgather(problem)", "allgather"), ("self.sum.begin()", None)):
        number = next(number for number, line in enumerate(lines, 1) if words in line)
        code = SimpleNamespace(co_filename=loop.__file__, co_name="sum_gradients")
        found = stand.where(SimpleNamespace(f_code=code, f_lineno=number, f_lasti=0, f_back=None))
        assert found.call == waits and found.is_in_comm == (waits is not None)


def test_the_state_of_a_process():
    assert stand.is_there(os.getpid()) and stand.state(os.getpid()) == ""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)      # it has ended; what is left of it stays
    assert not stand.is_there(gone.pid) and stand.state(gone.pid) == " (dead)"
    gone.wait()
    assert not stand.is_there(gone.pid) and stand.state(gone.pid) == " (there is no such process)"


def test_what_is_done_stays_done():
    ledger = Ledger()
    with ledger.record_data(Collective("all_reduce", 3, "float32"), 8):
        assert stand.text_of(ledger.current) == "all_reduce 3 float32"
    with ledger.record_control("any"):
        assert stand.text_of(ledger.current) == "any"
    assert ledger.current is None and stand.done(ledger) == 2
    ledger.clear()
    assert stand.done(ledger) == 2


@pytest.mark.launcher
def test_the_watchdog_is_not_imported_where_it_is_off():
    program = "import sys, mpitp\nwith mpitp.TensorParallelGroup() as group: pass\nassert ('mpitp.comm.watchdog' in " \
              "sys.modules) == (sys.argv[1] == '5')"
    program += "\nassert ('mpitp.comm.early' in sys.modules) == (sys.argv[1] == '5')"
    for limit in ("0", "5"):
        done = job(2, "-c", program, limit, environment={"MPITP_STALL_LIMIT": limit})
        assert done.returncode == 0, done.stderr


def test_heartbeats(world):
    from mpitp.comm.heartbeats import Heartbeats
    beats = Heartbeats(world)
    beats.write({"rank": world.rank})
    world.Barrier()
    assert beats.here == list(range(world.size)) and len(beats.hosts) == world.size
    assert [beats.read(rank) for rank in beats.here] == [{"rank": rank} for rank in beats.here]
    world.Barrier()


def test_mail_between_hosts(world):
    """Each rank is a host of its own; one that has left is written to no more."""
    from mpi4py import MPI
    from mpitp.comm.heartbeats import Heartbeats
    from mpitp.comm.mail import Mail, obstacle
    beats = Heartbeats(world, MPI.COMM_SELF)
    assert beats.here == [world.rank] and beats.heads == {rank: [rank] for rank in range(world.size)}
    if world.size == 1 or obstacle(world):
        return
    mail = Mail(world, beats)
    mail.is_open = True
    while any(beats.read(rank) != {"of": rank} for rank in mail.to):
        mail.post({world.rank: {"of": world.rank}})
        time.sleep(0.01)
    assert [beats.read(rank) for rank in mail.to] == [{"of": rank} for rank in mail.to]
    world.Barrier()
    if world.rank == 0:
        with mail.lock:                                 # a message before the last one may still be under way
            mail.sent = dict.fromkeys(mail.to, (SimpleNamespace(Test=lambda: False), b""))
        while mail.is_open:                             # MPI may hold up the thread for longer than say_last() waits
            mail.say_last({0: {"leaving": True}})
    else:
        while mail.readers(0):                          # LONGEST ends a test that hangs
            with mail.lock:
                mail.receive()
        assert beats.read(0) == {"leaving": True}
        with mail.lock:
            sent = mail.sent.get(0)
            mail.send({world.rank: {}})
            assert mail.sent.get(0) is sent
    world.Barrier()
    while mail.is_open:
        mail.say_last({})


def test_the_lowest_rank_that_lives_carries_the_mail():
    """Three ranks of this host and two of another one, whose records come by mail."""
    from mpitp.comm.others import LEFT, Others
    record = {"round": 1, "process": os.getpid(), "open": {"0": [3, None]}, "closed": {}, "leaving": False,
              "place": "a", "since": "12:00:00", "waits": False, "call": None}
    slots = {rank: dict(record) for rank in range(5)}
    beats = SimpleNamespace(rank=1, hosts=["h0", "h0", "h0", "h1", "h1"], here=[0, 1, 2],
                            heads={0: [0, 1, 2], 3: [3, 4]}, processes=[1, 2, 3, 4, 5],
                            read=lambda rank: dict(slots[rank]))
    others = Others(beats, SimpleNamespace(rounds=1))
    others.read(1)
    assert not others.carries_mail() and "rank 3 of 5 on h1 (process " in others.missing("0", 3, "x")[2]
    for _ in range(6):
        for rank in (1, 2, 4):
            slots[rank]["round"] += 1
        others.read(1)
    assert others.carries_mail() and others.is_silent(0) and not others.is_silent(2)
    assert set(others.of_this_host(record)) == {0, 1, 2} and others.of_this_host(record)[0]["ended"] is False
    stopped, waiting = (next(text for text in others.missing("0", 3, "all_reduce") if text.startswith(name))
                        for name in ("rank 3 of 5 on h1", "rank 4 of 5 on h1"))
    assert "has given no sign of life since" in stopped and "network" not in stopped and "is at a since" in waiting
    slots[3]["state"], slots[3]["ended"] = " (dead)", True
    others.read(1)
    assert others.gone("0", 3) == [f"{others.name(3)} has ended without a word, last at a"]
    for _ in range(6):
        others.read(1)
    assert "(stopped, or h1 or the network to it is down)" in others.missing("0", 3, "all_reduce")[-1]
    slots[0]["leaving"] = slots[4]["leaving"] = True
    others.read(LEFT)
    assert others.carries_mail() and "has left the program at 12:00:00" in others.missing("0", 3, "all_reduce")[-1]


def test_groups_of_the_same_ranks_share_a_watch(world):
    groups = [mpitp.TensorParallelGroup() for _ in range(2)]
    assert groups[0].watch is groups[1].watch and (groups[0].watch is None) == (world.size == 1)
    for group in groups:
        group.close()
    assert world.size == 1 or not {id(group.ledger) for group in groups} & {id(one) for one in group.watch.ledgers()}


def test_the_dense_side_of_verify_takes_what_it_takes(group):
    layer = mpitp.ParallelMLP(group, 4)
    check = FeedForwardCheck(group, layer, 1, 2, 0)
    for _, step in check.steps()[:1]:
        step()
    assert group.watch is None or 0 < group.watch.limit < float("inf")
    check.run_exact()
    assert group.watch is None or group.watch.limit == float("inf")
    mpitp.TensorParallelGroup().close()
    assert group.watch is None or group.watch.limit < float("inf")


@pytest.mark.launcher
def test_an_exception_before_the_first_group(tmp_path):
    """Rank 1 has imported mpitp, and nothing out of it; rank 0 makes a group, and would wait for it in there."""
    (tmp_path / "program.py").write_text("import mpitp\nfrom mpi4py import MPI\nif MPI.COMM_WORLD.rank == 1:\n"
                                         "    raise KeyError('mine')\nmpitp.TensorParallelGroup()\n")
    done = job(2, tmp_path / "program.py")
    assert done.returncode != 0 and "rank 1 of 2 ends the job" in done.stderr and "KeyError: 'mine'" in done.stderr
