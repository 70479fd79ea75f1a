"""reproducible=True: the same bytes for any number of ranks, outputs and every gradient."""
import re

import pytest

from mpitp.comm.workers import Workers, one_blas_thread
from spmd import ROOT, SUPPORT, job

pytestmark = pytest.mark.launcher
SCRIPT = ROOT / "tests" / "hashes.py"


@pytest.fixture(scope="module")
def one_rank():
    done = job(1, SCRIPT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 200 and all(re.fullmatch(r".* [0-9a-f]{64}", line) for line in lines)
    return lines


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.weekly), 3,
                                   pytest.param(5, marks=pytest.mark.weekly), 9])
def test_same_bytes_on_any_number_of_ranks(one_rank, ranks):
    done = job(ranks, SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == one_rank


def test_same_bytes_on_spare_cores(one_rank):
    """Three blocks at a time against one after the other, or two where this machine has two cores."""
    assert job(1, SCRIPT, 3).stdout.splitlines() == one_rank


def test_ordinary_mode_is_not_reproducible(one_rank):
    """The tester, tested: one product and one sum a rank have other bits on 2 and on 3 ranks."""
    program = ("import mpitp, numpy as np, hashlib\n"
               "with mpitp.TensorParallelGroup() as g:\n"
               "    y, _ = mpitp.ParallelMLP(g, 64, 512).forward(np.ones((8, 64), 'f'))\n"
               "    if g.rank == 0: print(hashlib.sha256(y.tobytes()).hexdigest())\n")
    assert len({job(ranks, "-c", program).stdout for ranks in (2, 3)}) == 2


def test_verify_prints_the_same_hashes():
    found = {tuple(re.findall(r"sha256.*", job(ranks, "-m", "mpitp", "--hidden-size", 48, "--seq-length", 5, "--gated",
                                                "--bias", "--reproducible").stdout)) for ranks in (1, 2, 3)}
    assert len(found) == 1 and len(found.pop()) == 8


def test_workers_keep_the_order_and_raise():
    workers = Workers(3)
    assert list(workers.each(lambda i: i * i, range(20))) == [(i, i * i) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(workers.each(lambda i: 1 // (i - 5), range(20)))
    workers.close()


def test_one_blas_thread_gives_the_threads_back():
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads():
        return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}
    with threadpool_limits(2, user_api="blas"):
        give_back = one_blas_thread()
        assert threads() == {1}
        give_back()
        assert threads() == {2}


def test_without_threadpoolctl(tmp_path):
    """Then the environment must have said one thread before NumPy was imported."""
    (tmp_path / "threadpoolctl.py").write_text("raise ImportError('hidden')")
    program = "import mpitp; mpitp.TensorParallelGroup(reproducible=True); print('made')"
    hidden = {"PYTHONPATH": f"{tmp_path}:{ROOT}:{SUPPORT}", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = job(1, "-c", program, environment=hidden)
    assert done.returncode != 0
    assert "InputError: found no threadpoolctl, expected it for reproducible=True" in done.stderr
    half = job(1, "-c", program, environment={**hidden, "OMP_NUM_THREADS": "1"})       # OpenBLAS goes by its own: 2
    assert half.returncode != 0
    done = job(1, "-c", program, environment={**hidden, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    assert done.stdout == "made\n"
    done = job(2, "-m", "mpitp", "--reproducible", "--hidden-size", 16, environment=hidden)     # sets it by itself
    assert done.returncode == 0, done.stderr
