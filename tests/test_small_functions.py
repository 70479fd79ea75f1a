"""Functions of a few lines that commands and the watchdog stand on, each by itself."""
import inspect as python
import threading
from types import SimpleNamespace

import pytest

from mpitp import InputError
from mpitp.commands import inspect, progress
from mpitp.comm import mpi, stand, watchdog
from mpitp.comm.workers import Workers
from mpitp.court.mistakes import vocabulary


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
