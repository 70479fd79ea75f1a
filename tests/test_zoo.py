"""A part of the zoo: cases of each host are found and named, right programs are not, the page lists them all."""
import dataclasses
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from spmd import ROOT, job_environment

ZOO = ROOT / "examples" / "zoo"
TRACKER = re.compile(r"[\w.-]+/[\w.-]+ #\d+( \(.+\))?|no published case known")

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def zoo():
    """The modules of the zoo, by their names."""
    names = "case", "plain", "ranks", "problems", "plain_cases", "mpitp_cases", "torch_cases", "hosts", "correct", "run"
    before = set(sys.modules)
    sys.path.insert(0, str(ZOO))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(ZOO))
        for name in set(sys.modules) - before:
            if name in names:
                del sys.modules[name]


def zoo_run(*arguments):
    return subprocess.run([sys.executable, str(ZOO / "run.py"), *arguments], cwd=ROOT, env=job_environment(),
                          capture_output=True, text=True, timeout=300)


# --- cases ----------------------------------------------------------------------------------------------------------

def test_there_are_enough_and_each_says_where_it_is_from(zoo):
    cases = zoo["hosts"].cases_of(torch=True)
    assert len(cases) >= 40 and {case.host for case in cases} == {"plain", "mpitp", "torch"}
    assert len({(case.host, case.identity) for case in cases}) == len(cases) == len({(c.host, c.name) for c in cases})
    for case in cases:
        assert TRACKER.fullmatch(case.source), case.source
        assert case.ranks and min(case.ranks) > 1 and re.compile(case.named)


REPRESENTATIVE = ("BiasOnEveryRank", "NoSumOfDx", "MeanOfY", "DownReversed", "FusedGateUpCut", "ScaleOfHidden",
                  "NormNotSummed", "LastIdMasked", "LocalSmoothing", "LogPTooMuch", "TokensPerRank", "ReplicasCounted",
                  "NotCommunicated")


def test_some_of_the_plain_ones(zoo, tmp_path):
    cases = [case for case in zoo["hosts"].cases_of(torch=False) if case.identity in REPRESENTATIVE]
    assert len(cases) >= 13
    for case in cases:
        result = zoo["run"].run_case(dataclasses.replace(case, ranks=case.ranks[:1]), tmp_path)
        assert result.found and result.named, (case.name, result.answers)


def test_one_of_mpitps_layers_on_real_ranks():
    done = zoo_run("--host", "mpitp", "--only", "bias added by every rank", "--ranks", "3", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "mpitp.zoo/1" and found["named"] == found["of"] == 1


RIGHT = "BiasOnEveryRank", "FusedGateUpCut", "NormNotSummed"


def test_a_right_program_is_not_a_case(zoo, tmp_path):
    """The same problem without the mistake."""
    for case in zoo["hosts"].cases_of(torch=False):
        if case.host == "plain" and case.identity in RIGHT:
            program = zoo["hosts"].HOSTS["plain"].program(case, tmp_path / case.identity)
            program.cls = case.code.__mro__[1]
            zoo["ranks"].simulate(2, program)
            assert zoo["run"].judged(program.folder) == (False, "right", "")


def test_right_programs(zoo, capsys):
    assert zoo["correct"].main_correct(36, 5, zoo["run"].judged, False) == 0, capsys.readouterr().out


def test_a_false_alarm_would_be_seen(zoo, capsys):
    assert zoo["correct"].main_correct(1, 0, lambda folder: (True, "a mistake", "y"), False) == 1
    assert "1 false alarms" in capsys.readouterr().out


# --- the plain program --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_plain_program_is_the_dense_one(zoo, tmp_path, sequence_parallel):
    """Not by the judge: against mpitp.oracle, on one rank's part each."""
    import mpitp
    from mpitp import oracle
    setting = zoo["plain"].Setting(sequence_parallel=sequence_parallel)
    problem = zoo["problems"].make("block", 3, setting, H=6, G=2, F=13, S=7)
    found = []

    def program(comm):
        layer = zoo["plain"].Block(comm, replaced(setting, problem), problem.weights)
        cut = zoo["plain"].bounds(7, comm.size) if sequence_parallel else [0] * comm.size + [7]
        part = slice(cut[comm.rank], cut[comm.rank + 1]) if sequence_parallel else slice(None)
        y, dx = layer.forward(problem.inputs["x"][:, part]), layer.backward(problem.inputs["dy"][:, part])
        found.append((part, y, dx, layer.gradients["attention_norm.weight"], layer.gradients["mlp.down.bias"]))
    zoo["ranks"].simulate(3, program)
    config = mpitp.DecoderConfig(vocab_size=1, num_layers=1, **problem.config)
    y, saved = oracle.block.forward(problem.inputs["x"], problem.weights, config)
    dx, gradients = oracle.block.backward(problem.inputs["dy"], saved)
    assert len(found) == 3
    for part, *mine in found:
        expected = y[:, part], dx[:, part], gradients["attention_norm.weight"], gradients["mlp.down.bias"]
        assert all(np.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(mine, expected))


def replaced(setting, problem):
    return dataclasses.replace(setting, config=problem.config)


def test_the_plain_program_on_ranks_of_mpi():
    done = zoo_run("--mpi", "--host", "plain", "--only", "row bias added by every rank, of", "--ranks", "2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["named"] == 1, done.stdout + done.stderr


# --- the page ----------------------------------------------------------------------------------------------------

def test_the_page_has_every_case(zoo):
    text = (ROOT / "docs" / "zoo.md").read_text()
    rows = {(row[0], row[1]): row[6] for line in text.splitlines() if line.startswith("| ")
            for row in [[cell.strip() for cell in line.strip("|").split("|")]] if len(row) == 7}
    cases = zoo["hosts"].cases_of(torch=True)
    for case in cases:
        assert rows.get((case.name, case.host)) == case.source, f"{case.name}: run.py --torch --write docs/zoo.md"
    assert len(rows) - 2 == len(cases)
