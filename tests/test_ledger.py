"""The record of every collective."""
import time

import numpy as np
import pytest

import mpitp
from mpitp.comm.ledger import Collective, Entry, Ledger, wire_bytes
from spmd import sum_of_blocks


def test_wire_bytes():
    assert wire_bytes("all_reduce", 100, 4, 1) == 0
    assert wire_bytes("all_reduce", 100, 4, 4) == 600
    assert wire_bytes("all_reduce", 101, 4, 3) == 538               # whole bytes: 538 2/3
    for operation in ("all_gather", "reduce_scatter", "broadcast", "gather"):
        assert wire_bytes(operation, 100, 4, 4) == 300


def test_one_entry_a_kind():
    """A long run does not grow it."""
    ledger, key = Ledger(), Collective("all_reduce", 24, "float32")
    for _ in range(5):
        with ledger.record_data(key, 10):
            time.sleep(0.001)
    with ledger.record_control("agreement", 16):
        pass
    assert list(ledger.data) == [key] and ledger.data[key].calls == 5 and ledger.data[key].wire_bytes == 50
    assert 0.005 <= ledger.data[key].seconds <= ledger.seconds()
    assert ledger.counts() == {key: 5} and ledger.wire_bytes() == 50           # data only
    assert ledger.control["agreement"].calls == 1
    ledger.clear()
    assert ledger == Ledger() and ledger.seconds() == 0 and Entry() == Entry(0, 0, 0.0)


def test_what_raises_is_not_counted():
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError):
        with ledger.record_data("key", 1):
            raise ZeroDivisionError
    assert ledger.data == {}


def test_a_pending_reduction_is_counted_once_when_it_is_done():
    with mpitp.TensorParallelGroup() as group:
        pending = group.begin_all_reduce(np.ones(3))
        assert not group.ledger.data
        pending.wait()
        pending.wait()
        assert group.ledger.counts() == {Collective("all_reduce", 3, "float64"): 1}


def test_both_modes_record_the_same_logical_operation():
    """What a sum is made of on the wire is another matter: one all_reduce of the whole array either way."""
    for reproducible in (False, True):
        with mpitp.TensorParallelGroup(reproducible=reproducible, blocks=5) as group:
            sum_of_blocks(group, lambda block: np.ones((2, 3), "f"), group.partition(50), (2, 3), "float32")
            assert group.ledger.counts() == {Collective("all_reduce", 6, "float32"): 1}
            assert (group.ledger.wire_bytes() == 0) == (group.size == 1)
