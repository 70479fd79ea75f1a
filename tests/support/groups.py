"""The `group` fixtures: a test module says in one line on which groups its tests run.

    group = group_fixture("ordinary", "reproducible")       # a new group of all ranks for each test, in both modes
    group = group_fixture("ordinary", scope="module")       # one for the whole module

The agreement check is always on. conftest.py has the first of these, for modules that say nothing.
"""
import pytest

import mpitp


def group_fixture(*modes, scope="function"):
    """A fixture named `group`: the group of all ranks, in each of these modes; tests of several modes run in each."""
    params = modes if len(modes) > 1 else None

    @pytest.fixture(scope=scope, params=params, name="group")
    def group(request):
        mode = request.param if params else modes[0]
        with mpitp.TensorParallelGroup(reproducible=mode == "reproducible", check=True) as group:
            yield group
    return group
