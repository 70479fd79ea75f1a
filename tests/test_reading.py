"""What there is to read stays short: the numbers that `python tests/reading.py` prints."""
import pytest
import reading

pytestmark = pytest.mark.launcher
LIMITS = reading.LIMITS


def test_first_sitting():
    sizes = reading.first_sitting()
    assert len(sizes) == len(reading.FIRST_SITTING) + len(reading.ALL_REDUCE[1])
    assert sum(sizes.values()) <= LIMITS["first sitting"], sizes


def test_imported():
    sizes = reading.imported()
    assert {"mpitp/comm/group.py", "mpitp/layers/mlp.py"} <= set(sizes)
    assert sum(sizes.values()) <= LIMITS["imported"], sizes
    assert not [name for name in sizes if "/gpu/" in name or "/cuda/" in name]


def test_calls_of_one_forward():
    path = reading.calls("ordinary")
    calls, files, _ = reading.summary(path)
    assert path[0] == ("layers/mlp.py", "forward") and ("comm/mpi.py", "all_reduce") in path
    assert calls <= LIMITS["calls"] and files <= LIMITS["files"], path


def test_reading_list():
    sizes = reading.reading_list()
    assert {"mpitp/sharding/partition.py", "mpitp/layers/mlp.py"} <= set(sizes)
    assert sum(sizes.values()) <= LIMITS["reading list"], sizes


def test_summary():
    assert reading.summary([("a", "f"), ("a", "g"), ("b", "h"), ("a", "f")]) == (4, 2, 2)
