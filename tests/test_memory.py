"""No rank ever holds a whole matrix: not when it is made, not in forward, not in backward."""
import pytest

from spmd import ROOT, job


@pytest.mark.launcher
@pytest.mark.slow
def test_a_rank_holds_its_slices_and_activations():
    done = job(4, "-m", "mpi4py", ROOT / "tests" / "support" / "memory_job.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("backward") == 4
