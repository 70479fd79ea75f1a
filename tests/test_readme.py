"""What the README shows is what happens: its commands are run, its output compared but for timings and machine."""
import os
import re
import subprocess
import sys

import pytest

from spmd import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:python)?\n(.*?)^```$", README, re.S | re.M)
NUMBER = re.compile(r"[-+]?\d+\.\d+(?:e[-+]?\d+)?|[-+]?\d+(?:\.\d+)?")


def shown(command):
    """The output under `$ command` in the README."""
    (block,) = [b for b in BLOCKS if b.startswith(f"$ {command}\n")]
    return block.split("\n", 1)[1]


def run(command):
    # The launcher beside this Python first: the suite runs under MPICH and under Open MPI.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "PMIX", "OMP", "OPENBLAS", "MKL"))}
    environment.update(MPITP_VENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}", MPIEXEC_TIMEOUT="60")
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def comparable(text):
    """Lines without what another machine or moment changes: the two first of verify, and times."""
    lines = [line for line in text.splitlines() if not line.startswith("mpitp ") and ", NumPy " not in line]
    return [line for line in lines if not line.startswith("  time ")]


def require_alike(found, expected):
    """The same words and whole numbers, fractions within a tenth; error ratios, which are rounding, within a half."""
    found, expected = comparable(found), comparable(expected)
    assert len(found) == len(expected), found
    for a, b in zip(found, expected):
        assert re.sub(r"\s+", " ", NUMBER.sub("#", a)) == re.sub(r"\s+", " ", NUMBER.sub("#", b))
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
            if "." in x:
                noise = 0.5 if a.endswith(" ok") else 1e-6          # another BLAS kernel, other last digits
                assert abs(float(x) - float(y)) <= max(0.1 * abs(float(y)), noise), (a, b)
            else:
                assert x == y, (a, b)


@pytest.mark.launcher
def test_the_first_screen():
    assert README.index("$ ./run.sh\n") < 400
    require_alike(run("./run.sh"), shown("./run.sh"))


@pytest.mark.launcher
def test_the_program_of_ones_own():
    assert (ROOT / "examples" / "own_layer.py").read_text() in [b for b in BLOCKS]
    require_alike(run("./run.sh -n 2 examples/own_layer.py"), shown("./run.sh -n 2 examples/own_layer.py"))


@pytest.mark.launcher
def test_every_layer():
    """The layers, how many results each has, its collectives, and the verdict; errors are rounding noise."""
    def verdicts(text):
        return [(*re.split(r"\s{2,}", line.strip())[:2], *line.split()[-2:]) for line in text.splitlines()
                if line.endswith("  ok")]
    command = "./run.sh -n 3 verify --all"
    found = run(command)
    assert len(verdicts(found)) == 20 and verdicts(found) == verdicts(shown(command))
    assert found.splitlines()[-1] == shown(command).splitlines()[-1]


@pytest.mark.launcher
def test_a_decoder_of_ones_own():
    command = "./run.sh -n 3 examples/decoder.py"
    require_alike(run(command), shown(command))
    assert run(command) == run(command.replace("-n 3", "-n 2"))     # to the last digit that is printed


@pytest.mark.launcher
def test_the_same_bits():
    command = "./run.sh -n 3 verify --hidden-size 64 --reproducible | grep sha256"
    names = [line.split()[-1] for line in shown(command).splitlines()]
    found = {run(command.replace("-n 3", f"-n {ranks}")) for ranks in (1, 2, 3)}
    assert len(found) == 1 and [line.split()[-1] for line in found.pop().splitlines()] == names


def test_a_number_that_is_off_would_be_seen():
    text = shown("./run.sh")
    require_alike(text, text)
    for wrong in (text.replace("2 x all_reduce", "3 x all_reduce"), text.replace("True", "False"),
                  text.replace("-0.447968; dense", "-0.347968; dense"), text.replace("  ok", "  FAILED", 1)):
        with pytest.raises(AssertionError):
            require_alike(wrong, text)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
    assert max(map(len, shown("./run.sh").splitlines())) <= 100
