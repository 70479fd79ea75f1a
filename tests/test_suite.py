"""The suite itself: which session runs what, and that it may be started in the background."""
import subprocess
import sys

import pytest
from spmd import ROOT, SUPPORT, job, job_environment

pytestmark = pytest.mark.launcher


def collected(ranks, *files, **environment):
    environment = {"MPITP_SECOND_MPI": "0", "MPITP_SAMPLE": "1", **environment}     # this session may have others
    done = job(ranks, "-m", "pytest", "--collect-only", "-q", *files, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split("::")[-1].split("[")[0] for line in done.stdout.splitlines() if "::" in line}


@pytest.mark.any_mpi
def test_several_ranks_run_what_needs_them():
    """By its fixtures, by a fixture that makes a group, by its own code; a Hypothesis test too. The others run once."""
    names = ("partition", "norm", "same_bits", "decoder_dense", "ledger", "guard", "suite")
    files = [f"tests/test_{name}.py" for name in names]
    one, two, other = collected(1, *files), collected(2, *files), collected(1, *files, MPITP_SECOND_MPI="1")
    of_ranks = {"test_mlp", "test_any_size", "test_both_modes_record_the_same_logical_operation"}
    of_the_launcher = {"test_ctrl_c_without_a_launcher"}
    of_one_process = {"test_units_cover_the_heads_and_do_not_depend_on_the_ranks", "test_one_entry_a_kind"}
    assert of_ranks | of_the_launcher | of_one_process <= one
    assert of_ranks <= two and not two & (of_the_launcher | of_one_process)
    of_any_mpi = {"test_in_the_background_of_a_shell"}
    assert of_any_mpi <= one and not of_any_mpi & other and "test_a_test_that_hangs_is_named" in other
    of_sums = {"test_mlp", "test_both_modes_record_the_same_logical_operation"}
    assert of_sums | of_the_launcher <= other and not other & (of_one_process | {"test_any_size"})
    assert of_sums <= collected(2, *files, MPITP_SECOND_MPI="1") < two


def test_a_test_that_hangs_is_named(tmp_path):
    """On the rank that waits, whatever the others do; the session ends."""
    (tmp_path / "test_hangs.py").write_text("import time\ndef test_waits(world):\n    time.sleep(100 * world.rank)\n")
    done = job(2, "-m", "pytest", "-p", "conftest", "--longest=2", "-q", "-p", "no:cacheprovider",
               tmp_path / "test_hangs.py",
               environment={"PYTHONPATH": f"{ROOT}:{ROOT}/tests:{SUPPORT}", "MPITP_SECOND_MPI": "0"})
    assert done.returncode != 0 and "rank 1 of 2 failed" in done.stderr, done.stdout + done.stderr
    assert "test_hangs.py::test_waits\nfound it running after 2 seconds" in done.stderr


@pytest.mark.any_mpi
def test_in_the_background_of_a_shell():
    """There SIGINT is ignored, and the jobs that a test interrupts would inherit that."""
    test = "tests/test_guard.py::test_ctrl_c_without_a_launcher"
    done = subprocess.run(["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-m", "pytest", "-q", test],
                          cwd=ROOT, env=job_environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.any_mpi
def test_a_sample_of_many_cases():
    """On four ranks a quarter of the 96 cases of a test; on one rank all that is not weekly."""
    def cases(ranks, file):
        done = job(ranks, "-m", "pytest", "--collect-only", "-q", file,
                   environment={"MPITP_SECOND_MPI": "0", "MPITP_SAMPLE": "4"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    found = cases(4, "tests/test_layers.py")
    assert 12 < found.count("::test_mlp_equals_dense[") < 36 and found.count("::test_numeric_gradients[") < 10
    found = cases(1, "tests/test_reproducible.py")
    assert all((f"any_number_of_ranks[{ranks}]" in found) == (ranks in (3, 9)) for ranks in (2, 3, 5, 9))
