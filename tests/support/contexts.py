"""A plugin of pytest for tests/mutants.py: coverage.py's context is the test that runs, in its jobs as well."""
import json
import os
import time

import coverage
import pytest

seconds = {}                # of the tests that passed
failed = set()


def enter(test):
    """Count the lines that run from now on to this test: here, and in the processes that it starts."""
    os.environ["MPITP_TEST"] = test                 # coverage's configuration reads it, see COVERAGE of mutants.py
    coverage.Coverage.current().switch_context(test)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    enter(item.nodeid)
    start = time.perf_counter()
    yield
    if item.nodeid not in failed:
        seconds[item.nodeid] = round(time.perf_counter() - start, 3)
    enter("")


def pytest_runtest_logreport(report):
    if not report.passed:
        failed.add(report.nodeid)


def pytest_sessionstart(session):
    """Jobs read the configuration anew: what coverage hands on to them has the context that it had at the start."""
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    os.environ["COVERAGE_PROCESS_START"] = coverage.Coverage.current().config.config_file


def pytest_sessionfinish(session):
    if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
        with open(os.environ["MPITP_SECONDS"], "w", encoding="utf-8") as file:
            json.dump(seconds, file)
