"""The suite runs as `mpirun -n P python -m pytest tests`: every rank runs the same tests (SPMD), or on one process.

Rank 0 reports, unless another rank fails: a failure on any rank prints its traceback and ends the job at once, since
the other ranks may be waiting for the failed one in a collective.

A session of several ranks runs the tests that need them: those that take the fixture `group` or `world`, or name
TensorParallelGroup, Grid or COMM_WORLD, themselves or in a fixture. All others run in the session of one rank. With
MPITP_SECOND_MPI=1, for an MPI after the first one, sessions leave out what would be the same: tests without ranks, jobs
that run commands, and on other than three ranks what layers make of collectives.

With MPITP_SAMPLE=4 a session that comes after others of the same tests (of more than three ranks, of a second MPI on
three, on a device) runs one in four of the cases of a test that has many, and no session those that are marked weekly.
.ci/run sets it, .ci/weekly does not.

A test that is not over after LONGEST seconds ends the job by its name.
"""
import atexit
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter

# One BLAS thread a rank, before NumPy is imported: the ranks of a test share the machine's cores.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "support"))       # what tests share

import pytest
from mpi4py import MPI

os.environ.pop("PYTEST_ADDOPTS", None)          # of this session, which has read it: not of those that tests start

from groups import group_fixture
from mpitp.comm import guard
from mpitp.errors import InputError

WORLD = MPI.COMM_WORLD
SECOND_MPI = os.environ.get("MPITP_SECOND_MPI") == "1"
SAMPLE = int(os.environ.get("MPITP_SAMPLE", "1"))
MANY = 6                # cases of a test

# A shell that starts pytest in the background makes it ignore SIGINT, and jobs would inherit that. With a handler of
# its own, the process starts others with SIGINT as it is by default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test that fails inside `with TensorParallelGroup()` is reported as any other, and end_job() does the rest: abort()
# would end the job while pytest still captures what it says.
guard.abort = lambda error: None


if WORLD.size > 1:                              # ranks that share pytest's folder race to clean it up
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix=f"mpitp-rank{WORLD.rank}-")
    atexit.register(shutil.rmtree, os.environ["PYTEST_DEBUG_TEMPROOT"], ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "gpu", "stand-in"),
                     help="gpu: the tests of groups, layers, decoders and training on CuPy arrays, see devices.py")
    parser.addoption("--longest", type=float, default=LONGEST, metavar="SECONDS",
                     help="that a test may take before it ends the job by its name")
    parser.addoption("--transport", default="auto", choices=("auto", "mpi", "nccl", "staged", "peer"),
                     help="between GPUs")


@pytest.hookimpl(trylast=True)                  # after the terminal reporter is there
def pytest_configure(config):
    if config.option.device != "cpu":           # before test modules import anything
        import devices
        devices.install(config.option.device, config.option.transport)
    if WORLD.rank != 0:
        config.pluginmanager.getplugin("terminalreporter")._tw._file = open(os.devnull, "w")


def end_job(text):
    sys.stderr.write(f"\n{'=' * 30} rank {WORLD.rank} of {WORLD.size} failed {'=' * 30}\n{text}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    time.sleep(0.2)                             # the launcher drops what it has not forwarded when it kills (seen)
    WORLD.Abort(1)
    os._exit(1)


def pytest_exception_interact(node, call, report):
    if WORLD.size > 1:
        end_job(f"{report.nodeid}\n{report.longreprtext}\n{''.join(text for _, text in report.sections)}")


def pytest_internalerror(excrepr):
    if WORLD.size > 1:
        end_job(str(excrepr))


# What another MPI can change, beside the sums of all tests on three ranks: the collectives themselves, and how jobs
# start, are told to stop, and end.
EACH_MPI = {f"test_{name}" for name in (
    "agreement", "by_hand", "device", "doctor", "group", "guard", "launch", "ledger", "own_layer", "peer", "products",
    "rank_faults", "run_sh", "same_bits", "suite", "train_stops", "transports", "tree")}
EACH_MPI_TOO = {"test_killed_at_any_moment", "test_usr1_makes_a_checkpoint", "test_the_same_bits"}
LONGEST = 600           # seconds; measured: the slowest test takes 60 on a quiet machine of two cores


def names(code):
    """The global names and attributes that a function's code uses, with the functions inside it."""
    inside = [names(constant) for constant in code.co_consts if hasattr(constant, "co_names")]
    return set(code.co_names).union(*inside)


def needs_ranks(item):
    """Whether a test says more on several ranks than on one."""
    if {"group", "world"} & set(item.fixturenames):
        return True
    inner = getattr(item.function, "hypothesis", None)
    functions = [inner.inner_test if inner else item.function]
    functions += [definition.func for made in item._fixtureinfo.name2fixturedefs.values() for definition in made]
    return any({"TensorParallelGroup", "Grid", "COMM_WORLD"} & names(function.__code__) for function in functions)


def left_out(item, config):
    """Whether this session is not the one for the test, see above."""
    if config.option.device != "cpu":           # there, those that take a group
        return "group" not in item.fixturenames or item.get_closest_marker("host")
    if SAMPLE > 1 and "weekly" in item.keywords:
        return True
    again = SECOND_MPI and item.module.__name__ not in EACH_MPI and item.originalname not in EACH_MPI_TOO
    again = again or SECOND_MPI and "any_mpi" in item.keywords
    if "launcher" in item.keywords:
        return WORLD.size > 1 or again
    if again and WORLD.size != 3:
        return True
    return (WORLD.size > 1 or SECOND_MPI) and not needs_ranks(item)


def pytest_collection_modifyitems(config, items):
    """Leave out what another session runs."""
    cases = Counter(item.nodeid.split("[")[0] for item in items)
    sampled = WORLD.size > 3 or SECOND_MPI and WORLD.size > 1 or config.option.device != "cpu"
    # by a hash of the names: every fourth one could have the same last parameter
    out = [item for item in items if left_out(item, config) or sampled and cases[item.nodeid.split("[")[0]] > MANY
           and zlib.crc32(item.nodeid.encode()) % SAMPLE]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


@pytest.hookimpl(hookwrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of what every rank refuses on a GPU is skipped there."""
    outcome = yield
    error = outcome.excinfo and outcome.excinfo[1]
    if pyfuncitem.config.option.device != "cpu" and isinstance(error, InputError) and "on a GPU" in str(error):
        outcome.force_exception(pytest.skip.Exception(str(error)))


def end_hanging(item):
    """End the job by the name of the test that runs; in a thread, while pytest captures what is written."""
    capture = item.config.pluginmanager.getplugin("capturemanager")
    if capture:
        capture.suspend_global_capture(in_=True)
    faulthandler.dump_traceback(sys.__stderr__)
    end_job(f"{item.nodeid}\nfound it running after {item.config.option.longest:g} seconds")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """A test that hangs is named: the limit of a whole session would not say which one it was."""
    limit = threading.Timer(item.config.option.longest, end_hanging, [item])
    limit.daemon = True
    limit.start()
    yield
    limit.cancel()


def pytest_runtest_setup(item):
    """Every rank must be at the same test: the name is agreed on first."""
    names = WORLD.allgather(item.nodeid)
    if len(set(names)) > 1:
        end_job(f"the ranks run different tests: {names}")


def pytest_sessionfinish(session, exitstatus):
    if WORLD.size > 1 and exitstatus not in (0, 5):
        end_job(f"pytest ends with status {int(exitstatus)}")


@pytest.fixture(scope="session")
def world():
    """MPI.COMM_WORLD."""
    return WORLD


group = group_fixture("ordinary", "reproducible")
