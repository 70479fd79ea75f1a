"""Waits for rank 0 that leave it the cores: who sleeps, what the watchdog sees of them, and errors."""
import sys
import threading
import time

import pytest

from mpitp import InputError
from mpitp.comm.patience import on_root_asleep
from mpitp.comm.stand import where

WAIT = 0.2          # seconds


def seen_meanwhile(group, found):
    """Note the collective that this rank's ledger is inside of, and where its thread stands, in the middle of WAIT."""
    main = threading.main_thread().ident

    def look():
        time.sleep(WAIT / 2)
        found.append((group.ledger.current, where(sys._current_frames()[main])))
    thread = threading.Thread(target=look)
    thread.start()
    return thread


@pytest.mark.parametrize("in_its_time", [False, True])
def test_others_sleep_while_rank_0_works(group, in_its_time):
    """They use no processor; the watchdog sees what they wait for, unless rank 0 waits for a person."""
    found, before = [], time.process_time()
    group.comm.Barrier()
    looking = seen_meanwhile(group, found)
    result = on_root_asleep(group, lambda: time.sleep(WAIT) or "an answer", in_its_time)
    used = time.process_time() - before
    looking.join()
    assert result == ("an answer" if group.rank == 0 else None)
    if group.rank:
        assert used < WAIT / 2
        current, stand = found[0]
        assert current == (None if in_its_time else "on_root") and stand.is_in_comm
        assert "test_patience.py" in stand.place


@pytest.mark.parametrize("error", [ValueError, OSError, InputError])
def test_an_error_of_rank_0_is_raised_everywhere(group, error):
    def fails():
        raise error("found nothing, expected something")
    with pytest.raises(InputError, match="^found nothing, expected something$"):
        on_root_asleep(group, fails)
    assert on_root_asleep(group, lambda: 1) == (1 if group.rank == 0 else None)
