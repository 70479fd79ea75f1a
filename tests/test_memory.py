"""No rank ever holds a whole matrix: not when it is made, not in forward, not in backward."""
import pytest

import mpitp
from mpitp.verification import feed_forward
from spmd import ROOT, job


@pytest.mark.launcher
@pytest.mark.slow
def test_a_rank_holds_its_slices_and_activations():
    done = job(4, "-m", "mpi4py", ROOT / "tests" / "support" / "memory_job.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("backward") == 4


def test_a_dense_side_beyond_the_memory(monkeypatch):
    """verify counts what its dense side takes before it makes anything: weights, and what comes with each token."""
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}           # 4 GiB
    monkeypatch.setattr(feed_forward.os, "sysconf", pages.__getitem__)
    with mpitp.TensorParallelGroup() as group:
        feed_forward.require_room(group, 4096, 8192, False, 512)
        for sizes in ((8192, 32768, False, 1), (4096, 16384, True, 1), (64, 256, False, 1 << 18)):
            with pytest.raises(mpitp.InputError, match="found 4 GiB of memory, expected [0-9]+ GiB for the dense side"):
                feed_forward.require_room(group, *sizes)
