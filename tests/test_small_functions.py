"""Functions of a few lines that commands and the watchdog stand on, each by itself."""
import inspect as python
import math
import os
import threading
from stat import S_ISCHR, S_ISFIFO
from types import SimpleNamespace

import numpy as np
import pytest

from mpitp import DecoderConfig, InputError, tables
from mpitp.checkpoints import steps
from mpitp.checkpoints.families.rope import temperature
from mpitp.comm import mpi, stand, watchdog
from mpitp.comm.gpu.peer import peer_bytes
from mpitp.comm.workers import Workers
from mpitp.commands import bench_calibrate, bench_page, chat, inspect, progress, score, text
from mpitp.court import verdict
from mpitp.court.mistakes import left_out, vocabulary
from mpitp.inference.generation import as_prompts
from mpitp.measure.links import busiest
from mpitp.ops.greatest import greatest_of_rank
from mpitp.sharding.decoder_specs import output_init_std
from mpitp.sharding.partition import Partition
from mpitp.training import log
from mpitp.training.spikes import FEWEST, Spikes
from mpitp.verification import feed_forward


def test_blocks_are_computed_by_this_thread_or_by_others():
    """One core, or one block, needs no other; several take as many threads, and come in order."""
    def where(item):
        return threading.current_thread().name
    here = threading.current_thread().name
    for count, items, others in ((1, range(5), False), (3, range(1), False), (3, range(7), True)):
        workers = Workers(count)
        found = list(workers.each(where, items))
        assert [item for item, _ in found] == list(items)
        assert all((name != here) == others for _, name in found)
        workers.close()


@pytest.mark.parametrize("opened", [[], [False], [True], [False, True], [True, True]])
def test_any_open_group_is_watched(monkeypatch, opened):
    monkeypatch.setattr(watchdog, "_watches", {i: SimpleNamespace(open=each) for i, each in enumerate(opened)})
    assert watchdog.is_watching() == (True in opened)


@pytest.mark.parametrize("text, limit", [("3", 3.0), ("0", 0.0), ("0.5", 0.5), ("x", None), ("-1", None), ("inf", None),
                                         ("nan", None)])
def test_the_stall_limit(monkeypatch, text, limit):
    monkeypatch.setenv(watchdog.VARIABLE, text)
    if limit is None:
        with pytest.raises(InputError, match=f"found MPITP_STALL_LIMIT = '{text}', expected seconds"):
            watchdog.stall_limit()
    else:
        assert watchdog.stall_limit() == limit


def test_the_call_that_a_frame_is_in():
    """By the line of mpitp that it has come to; a line that calls no communicator is none, another file's either."""
    lines = python.getsourcelines(mpi)[0]
    code = SimpleNamespace(co_filename=mpi.__file__)
    at = next(number for number, line in enumerate(lines, 1) if "self.comm.Allreduce(" in line)
    assert stand.mpi_call(SimpleNamespace(f_code=code, f_lineno=at)) == "Allreduce"
    assert stand.mpi_call(SimpleNamespace(f_code=code, f_lineno=1)) is None
    elsewhere = SimpleNamespace(co_filename=__file__)
    assert stand.mpi_call(SimpleNamespace(f_code=elsewhere, f_lineno=1)) is None


def test_a_number_that_was_multiplied_twice_or_never():
    assert vocabulary.multiplied([3.0, -1.0], factor=4.0) == [12.0, -4.0]


def test_words_are_wrapped_where_the_line_is_full():
    words = ["aaaa", "bbbb", "cccc", "dddd"]
    assert list(inspect.wrapped("  of ", words, 12)) == ["  of aaaa,", "  bbbb,", "  cccc, dddd"]


@pytest.mark.parametrize("out, err, watched", [(True, True, True), (True, False, False), (False, True, False),
                                               (None, True, False), (True, None, False)])
def test_only_terminals_are_watched(monkeypatch, out, err, watched):
    """A stream is None where it was closed."""
    monkeypatch.delenv("MPITP_PROGRESS", raising=False)
    monkeypatch.setattr(progress, "is_first_rank", lambda: True)
    monkeypatch.setattr(progress, "launcher", lambda: ("", ""))
    for name, terminal in (("stdout", out), ("stderr", err)):
        stream = None if terminal is None else SimpleNamespace(isatty=lambda terminal=terminal: terminal)
        monkeypatch.setattr(progress.sys, name, stream)
    assert progress.is_watched() is watched


def test_the_worst_rank_of_a_tensor_is_shown():
    """Infinite and NaN are worse than any number."""
    tensor = SimpleNamespace(phase="forward", name="y", title="y", layout=SimpleNamespace(how="split"), dtype="F32")
    for excesses, worst in (([1.0, 5.0, 2.0], 1), ([9.0, 5.0, float("nan")], 2)):
        yard = SimpleNamespace(dump=SimpleNamespace(ranks=3), read=lambda tensor, rank, excesses=excesses:
                               SimpleNamespace(rank=rank, excess=excesses[rank], good=excesses[rank] < 4))
        row = verdict.judged(tensor, yard)
        assert row.reading.rank == worst and row.verdict == "wrong"


@pytest.mark.parametrize("phase, name, how, parts, summands", [
    ("backward", "attention.key", "split", [[0, 1], [1, 2]], True),
    ("backward", "value", "split", [[0, 1], [2]], False),
    ("backward", "attention.key", "copied", [[0, 1], [1, 2]], False),
    ("forward", "key", "split", [[0, 1], [1, 2]], False),
    ("backward", "attention.query", "split", [[0, 1], [1, 2]], False)])
def test_which_gradients_are_summands_of_shared_heads(phase, name, how, parts, summands):
    layout = SimpleNamespace(how=how, parts=parts, shape=(3,), axis=0)
    assert verdict.holds_summands(SimpleNamespace(phase=phase, name=name, layout=layout)) is summands


@pytest.mark.parametrize("ranks, orders", [(2, 1), (3, 5), (4, 23), (5, 1)])
def test_orders_in_which_tokens_may_be_gathered(ranks, orders):
    """All but the right one, and of many ranks the reversed one alone."""
    parts = [np.arange(2) + 2 * rank for rank in range(ranks)]
    case = SimpleNamespace(tokens=SimpleNamespace(parts=parts, axis=0), by_tokens=False, ranks=ranks, kind="mlp",
                           with_faults=dict)
    planted = list(left_out.gathered(case))
    assert len(planted) == 3 * orders and sum("in the order" in text for text, _ in planted) == 3 * orders


@pytest.mark.parametrize("kind, position, mistakes", [
    ("attention", "rotary", 2), ("decoder", "rotary", 2), ("mlp", None, 0), ("block", "alibi", 0),
    ("embedding", "rotary", 0)])
def test_gradients_are_turned_back_where_positions_are_rotary(kind, position, mistakes):
    case = SimpleNamespace(kind=kind, config=SimpleNamespace(position_embedding=position), with_faults=dict)
    assert len(list(left_out.rotary_back(case))) == mistakes


# --- files that are none -------------------------------------------------------------------------------------------

def test_a_report_takes_no_device_or_pipe_away(tmp_path):
    """A rename over a device would take it from every program of the machine; a link stays a link."""
    pipe, link, dangling = (tmp_path / name for name in ("pipe", "link", "dangling"))
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "linked.json")
    (tmp_path / "linked.json").write_text("old")
    dangling.symlink_to(pipe)
    for path in (pipe, dangling, tmp_path, "/dev/null", tmp_path / "nowhere" / "x"):
        with pytest.raises(InputError, match="found no way to write '.*', expected a file in an existing, writable"):
            tables.require_writable(str(path))
        with pytest.raises(InputError, match="found no way to write"):
            tables.write_json(str(path), "x/1", {})
    assert S_ISFIFO(os.stat(pipe).st_mode) and S_ISCHR(os.stat("/dev/null").st_mode)
    tables.write_json(str(link), "x/1", {"a": 1})
    assert link.is_symlink() and '"a": 1' in (tmp_path / "linked.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "linked.json", "pipe"]


@pytest.mark.parametrize("read", [text.read_text, text.read_ids, chat.read_messages, bench_page.read_report])
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"^{path}: found {kind}, expected a "):
            read(str(path))


def test_what_ends_a_text_is_not_passed_over(tmp_path):
    path = tmp_path / "generation_config.json"
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert text.end_tokens(str(tmp_path)) == [3]
    path.write_text('{"eos_token_id": [4, 5]}')
    assert text.end_tokens(str(tmp_path)) == [4, 5]
    for make, found in ((lambda: os.mkfifo(path), "a pipe"), (lambda: path.symlink_to("/dev/zero"), "a device"),
                        (lambda: path.symlink_to("gone"), "No such file"), (path.mkdir, "Is a directory")):
        path.unlink()
        make()
        with pytest.raises(InputError, match=f"generation_config.json: found {found}.*, expected a JSON file"):
            text.end_tokens(str(tmp_path))


def test_a_text_that_is_larger_than_memory(tmp_path, monkeypatch):
    (tmp_path / "text").write_bytes(b"12345")
    monkeypatch.setattr("builtins.open", no_memory)
    with pytest.raises(InputError, match="text: found 5 bytes, expected a file of fewer than memory has$"):
        text.read_text(str(tmp_path / "text"))


def no_memory(*_):
    raise MemoryError


def test_a_report_of_another_kind(tmp_path):
    for content in ("[" * 100_000, '{"schema": "mpitp.plan/1"}', "[]", '{"schema": "mpitp.bench/1", "schema": 1}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(InputError, match="found .*, expected "):
            bench_page.read_report(str(tmp_path / "x.json"))


def test_a_log_whose_unfinished_copy_is_a_pipe(tmp_path):
    for step in (1, 2):
        log.append_log(str(tmp_path), step, {"loss": 1.0})
    os.mkfifo(tmp_path / "log.jsonl.partial")
    log.cut_log(str(tmp_path), 1)
    assert [line["step"] for line in log.read_log(str(tmp_path))] == [1] and len(os.listdir(tmp_path)) == 1


# --- what mutants showed that no test asked -------------------------------------------------------------------------

def test_a_spike_needs_a_few_steps_before_it():
    found = Spikes(2.0)
    for figure in (1.0, 9.0, *[1.0] * (FEWEST - 2)):                # the second is ten times the first: too early
        assert found.find({"loss": figure, "gradient_norm": 1.0}) == ""
    assert found.find({"loss": 1.5, "gradient_norm": 1.0}) == ""
    assert found.find({"loss": 9.0, "gradient_norm": 1.0}).startswith("found loss 9, expected at most 2 times")


def test_ids_behind_the_end_of_a_prompt_may_be_anything():
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=5))
    ids, lengths = as_prompts(model, [[1, 99, 99], [1, 2, 99]], [1, 2])
    assert ids.tolist() == [[1, 0], [1, 2]] and lengths.tolist() == [1, 2]
    with pytest.raises(InputError, match="found token id 99 in prompt 1"):
        as_prompts(model, [[1, 2], [1, 99]], [1, 2])


def test_a_window_is_at_most_the_learned_positions():
    model = SimpleNamespace(position=SimpleNamespace(max_positions=6))
    assert score.sizes(SimpleNamespace(window=6, stride=None), model) == (6, 3)
    assert score.sizes(SimpleNamespace(window=None, stride=6), model) == (6, 6)
    with pytest.raises(InputError, match="found window = 7, expected at most 6"):
        score.sizes(SimpleNamespace(window=7, stride=None), model)


def test_a_rank_without_logits_has_no_largest():
    assert greatest_of_rank(np.empty((2, 0)), 3).tolist() == [[-np.inf, 0], [-np.inf, 0]]


def test_the_busiest_interface():
    before, after = {"a": 1000, "b": 5}, {"a": 1010, "b": 105, "new": 50}
    assert busiest(before, after, 100) == "b" and busiest(before, after, 101) == "" and busiest({}, {}, 0) == ""


def test_the_temperature_of_yarn():
    assert temperature(4.0, 0.7) == pytest.approx(1 + 0.07 * math.log(4)) and temperature(1.0, 0.7) == 1.0


def test_the_initial_weights_of_output_projections():
    config = DecoderConfig(vocab_size=5, hidden_size=4, num_layers=8, num_attention_heads=2, init_method_std=0.04)
    assert output_init_std(config) == pytest.approx(0.01)


def test_a_window_of_no_positions():
    for window in (0, -1, [2, 0]):
        with pytest.raises(InputError, match="sliding_window"):
            DecoderConfig(vocab_size=5, hidden_size=4, num_layers=2, num_attention_heads=2, sliding_window=window)


def test_what_a_killed_run_left_may_be_a_file(tmp_path):
    (tmp_path / "step-00000001.partial").write_text("not a folder")
    (tmp_path / ".step-00000002.old").mkdir()
    (tmp_path / "step-00000003").mkdir()
    assert steps.clean(str(tmp_path)) == [".step-00000002.old", "step-00000001.partial"]
    assert (tmp_path / "step-00000003").exists() and not (tmp_path / ".step-00000002.old").exists()


def test_the_bytes_of_a_sum_over_peers():
    """Each of 4 ranks folds its 2 blocks to one node, sends 3 quarters of it, and its quarter of the sum to 3."""
    partition = Partition(8, 4, 8)
    assert [peer_bytes(partition, rank, 12, 8, 2) for rank in range(4)] == [8 * 9 + 2 * 3 * 3] * 4


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0), (8, -1)])
def test_verify_refuses_sizes_that_are_not_positive(sizes):
    with pytest.raises(InputError, match="ffn_hidden_size" if sizes[0] else "hidden_size"):
        feed_forward.require_room(None, *sizes, False, 1)


def test_a_second_calibration_finds_its_folder(tmp_path, monkeypatch):
    path = str(tmp_path / "cache" / "machine.json")
    monkeypatch.setattr(bench_calibrate, "default_path", lambda: path)
    for _ in range(2):
        bench_calibrate.prepare(path)
    with pytest.raises(InputError, match="expected a file in an existing, writable folder"):
        bench_calibrate.prepare(str(tmp_path / "mistyped" / "machine.json"))
