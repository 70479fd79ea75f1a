"""The oracle is public and stands alone: it needs NumPy, and shares no code with what it judges."""
import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

from mpitp import oracle
from spmd import ROOT

MAY_IMPORT = {"mpitp", "mpitp.arrays", "mpitp.errors"}      # of mpitp, beside the oracle itself
MODULES = sorted(module.name for module in pkgutil.iter_modules(oracle.__path__, "mpitp.oracle."))


def file_of(module):
    """The file of a module of this repository, None for any other name."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path if path.exists() else None


def imported_by(module):
    """Names of modules that a module imports anywhere in it, but for those that only annotations need."""
    file = file_of(module)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            base = ".".join(filter(None, (base if node.level else "", node.module)))
            for alias in node.names:                        # a module, or a name in one
                yield f"{base}.{alias.name}" if file_of(f"{base}.{alias.name}") else base


def everything_imported(modules):
    """All modules that these import, directly or not."""
    found, left = set(), list(modules)
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            if file_of(module):
                left += [*imported_by(module), module.rpartition(".")[0] or module]     # its package runs first
    return found


def test_it_imports_nothing_of_what_it_judges():
    found = everything_imported(["mpitp.oracle", *MODULES])
    assert {"mpitp.oracle.magnitude", "numpy", "mpitp.arrays"} <= found             # the walk sees imports
    own = {name for name in found if name.split(".")[0] == "mpitp" and not name.startswith("mpitp.oracle")}
    assert own <= MAY_IMPORT
    assert "mpi4py" not in {name.split(".")[0] for name in found}


def test_the_walk_follows_imports():
    found = everything_imported(["mpitp.comm.group"])
    assert {"mpi4py", "mpitp", "mpitp.comm", "mpitp.sharding", "mpitp.sharding.partition"} <= found


@pytest.mark.launcher
def test_it_runs_where_there_is_no_mpi():
    """mpi4py and CuPy cannot be imported; nothing of mpitp is loaded that the oracle may not import."""
    program = """
import sys
sys.modules["mpi4py"] = sys.modules["cupy"] = None
import mpitp.oracle
for name in mpitp.oracle.__all__:
    getattr(mpitp.oracle, name)
print(*sorted(name for name in sys.modules if name.split(".")[0] == "mpitp"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {*MODULES, *MAY_IMPORT, "mpitp.oracle"}


@pytest.mark.parametrize("name", ["mpitp.oracle", *MODULES])
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
    assert name not in ("mpitp.oracle", "mpitp.oracle.magnitude") or doctest.testmod(module).attempted


def test_every_public_name_is_documented():
    assert all(getattr(oracle, name).__doc__ for name in oracle.__all__)
    for module in (oracle.linear, oracle.norm, oracle.embedding, oracle.feed_forward, oracle.attention, oracle.block,
                   oracle.decoder, oracle.cross_entropy):
        assert "Parameters\n" in module.forward.__doc__ and "Returns\n" in module.backward.__doc__, module


@pytest.mark.launcher
def test_the_example():
    """A layer of three shards is right to a few roundings; an error of a ten-thousandth is not."""
    done = subprocess.run([sys.executable, ROOT / "examples" / "oracle.py"], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    *right, wrong = done.stdout.splitlines()
    assert [line.split()[0] for line in right] == ["y", "dx", "up.weight", "down.weight"]
    assert all(line.endswith("  ok") for line in right)
    assert wrong.startswith("up.weight (48, 12): error ") and "FAILED; worst at [" in wrong
