"""The sdist is the checkout, and what pip makes of the sdist and of the wheel runs without the checkout.

Nothing is downloaded: setuptools is called as pip calls it, and the new environments borrow NumPy and mpi4py.
"""
import email.parser
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from spmd import ROOT, job_environment

import mpitp

try:
    SETUPTOOLS = int(importlib.metadata.version("setuptools").split(".")[0])
except importlib.metadata.PackageNotFoundError:
    SETUPTOOLS = 0

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(SETUPTOOLS < 77, reason="found no setuptools >= 77 in this environment: pip install '.[dev]'"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs into the sdist is asked of git"),
]

# As pip does it; that NumPy cannot be imported proves that the version is read without it.
BUILD_SDIST = """
import sys
sys.modules["numpy"] = None
from setuptools import build_meta
build_meta.build_sdist("dist")
"""
USE = """
import importlib.resources, sys, mpitp
for name in mpitp.__all__:
    getattr(mpitp, name)
assert importlib.resources.files("mpitp").joinpath("py.typed").is_file()
print(mpitp.__version__, mpitp.__file__)
"""


def run(*command, cwd):
    environment = {k: v for k, v in job_environment().items() if k != "PYTHONPATH"}
    libraries = sorted(Path(sys.prefix, "lib").glob("libmpi.so.*"))
    if libraries:                                               # mpi4py would look for it in the new environment
        environment.setdefault("MPI4PY_LIBMPI", str(libraries[0]))
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked():
    """The files of the checkout, those included that git does not know yet and does not ignore."""
    names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout.splitlines()
    return sorted(name for name in names if (ROOT / name).exists())


def pip(python, *arguments, cwd):
    """This environment's pip, at work on another one, without a network."""
    return run(sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check", *arguments,
               "--no-deps", "--no-index", "--no-build-isolation", cwd=cwd)


def environment(folder):
    """A virtual environment that sees this one's packages, but none that is installed in editable form."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{sysconfig.get_paths()['platlib']}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder that the sdist unpacks to; the sdist lies beside it."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-c", BUILD_SDIST, cwd=folder / "checkout")
    (sdist,) = (folder / "checkout" / "dist").iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)                              # written two lines above: nothing hostile
    return folder / f"mpitp-{mpitp.__version__}"


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
        "-w", folder, unpacked, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def test_the_sdist_is_the_checkout(unpacked):
    made = {"PKG-INFO", "setup.cfg"}
    found = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    found = {name for name in found - made if not name.startswith(("mpitp.egg-info/", "build/"))}
    assert found == set(tracked()) - made


def test_the_tests_of_the_sdist_are_complete(unpacked):
    """They import their helpers and find their data."""
    environment = {**job_environment(), "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-qq", "tests"], cwd=unpacked, text=True,
                          capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0].split(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert files == {name for name in tracked() if name.startswith("tests/test_")}


def test_what_the_wheel_says_and_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = email.parser.Parser().parsestr(archive.read(metadata).decode())
    assert {name for name in names if ".dist-info/" not in name} == {n for n in tracked() if n.startswith("mpitp/")}
    assert said["Version"] == mpitp.__version__
    assert said["License-Expression"] == "MIT" and said["Author"] == "The mpitp developers"
    assert {"numpy>=2.0", "mpi4py>=4.1"} <= set(said.get_all("Requires-Dist"))


@pytest.mark.parametrize("form", ["sdist", "wheel"])
def test_installed(form, unpacked, wheel, tmp_path):
    python = environment(tmp_path / "venv")
    pip(python, "install", wheel if form == "wheel" else unpacked, cwd=tmp_path)
    version, file = run(python, "-c", USE, cwd=tmp_path).split()
    assert version == mpitp.__version__ and Path(file).is_relative_to(tmp_path / "venv")
    assert "verify" in run(python, "-m", "mpitp", "--help", cwd=tmp_path)
    assert run(tmp_path / "venv" / "bin" / "mpitp", "--version", cwd=tmp_path) == f"mpitp {version}\n"
    assert os.listdir(tmp_path) == ["venv"]


def test_one_version():
    """The version that is written down elsewhere is the package's."""
    for name, text in (("CHANGELOG.md", "\n## {}\n"), ("CITATION.cff", "\nversion: {}\n"),
                       ("README.md", ", version {}"),
                       ("docs/packaging/spack/package.py", 'version("{}")'),
                       ("docs/packaging/mpitp.def", "version {}\n"),
                       ("docs/packaging/conda/recipe.yaml", 'version: "{}"')):
        assert text.format(mpitp.__version__) in (ROOT / name).read_text(), name
