"""Scaling studies: jobs on growing numbers of ranks, and what their times are measured by."""
import json
import os
import subprocess
import sys

import pytest

from mpitp.commands import parse_or_help
from mpitp.commands.scale import Point, check_arguments, launcher_words, points_of
from mpitp.errors import InputError
from spmd import ROOT, job, job_environment, mpirun


def report(ranks, tokens, **seconds):
    rows = [dict(bench="ffn", case=case.replace("_", " "), median_seconds=t, least_seconds=t, most_seconds=t,
                 share_of_limit=0.9) for case, t in seconds.items()]
    limit = dict(bench="ffn", case="products", median_seconds=1, least_seconds=1, most_seconds=1, share_of_limit=None)
    return dict(ranks=ranks, tokens=tokens, rows=[*rows, limit])


def test_efficiencies():
    points = []
    for ranks, tokens, forward in ((2, 64, 6.0), (4, 64, 4.0)):
        points += points_of(report(ranks, tokens, forward=forward, one_token_forward=1.0), "strong", points)
    assert [(p.case, p.ranks, p.efficiency) for p in points] == [
        ("forward", 2, 1.0), ("one token forward", 2, 1.0), ("forward", 4, 0.75), ("one token forward", 4, 0.5)]
    for ranks, tokens, forward in ((2, 64, 6.0), (4, 128, 8.0)):
        points += points_of(report(ranks, tokens, forward=forward, one_token_forward=1.0), "weak", points)
    assert [(p.case, p.tokens, p.efficiency) for p in points[4:]] == [("forward", 64, 1.0), ("forward", 128, 0.75)]


@pytest.mark.parametrize("options, message", [
    (["--ranks", "2,1"], "ascending"), (["--ranks", "1,1"], "ascending"), (["--ranks", "0"], "such as 1,2,4"),
    (["--ranks", "1,x"], "such as 1,2,4"), (["matmul"], "found bench matmul, expected one of ffn, block, decode"),
    (["--scaling", "sideways"], "strong, weak"), (["decode", "--scaling", "weak"], "one token is not divided"),
    (["--rounds", "0"], "rounds = 0"), (["--limit", "0"], "seconds above 0"), (["--threads", "0"], "threads = 0"),
    (["--json", "/nowhere/x.json"], "/nowhere/x.json")])
def test_bad_input(options, message, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PMI_", "OMPI_COMM"))]:
        monkeypatch.delenv(name)
    with pytest.raises(InputError) as found:
        check_arguments(parse_or_help(["scale", *options])[1])
    assert message in str(found.value)


def test_launchers(monkeypatch):
    monkeypatch.delenv("MPITP_LAUNCHER", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launcher_words(None) == ["mpirun"]
    assert launcher_words("srun --mpi='pmix v4'") == ["srun", "--mpi=pmix v4"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launcher_words(None) == ["srun", "--overlap"]
    monkeypatch.setenv("MPITP_LAUNCHER", "mpiexec.hydra -bind-to none")
    assert launcher_words(None) == ["mpiexec.hydra", "-bind-to", "none"]


def study(*arguments):
    small = ["--hidden-size", "16", "--rounds", "1", "--seq-length", "6", "--ranks", "1,2"]
    return subprocess.run([sys.executable, "-m", "mpitp", "scale", *small, *map(str, arguments)], cwd=ROOT, text=True,
                          env=job_environment(), capture_output=True, timeout=120)


@pytest.mark.launcher
def test_a_study(tmp_path):
    found = study("--launcher", mpirun(1)[0], "ffn", "--json", tmp_path / "scale.json")
    assert found.returncode == 0, found.stderr
    written = json.loads((tmp_path / "scale.json").read_text())
    points = [Point(**point) for point in written["points"]]
    assert {(p.kind, p.ranks, p.tokens) for p in points} == {("strong", 1, 6), ("strong", 2, 6), ("weak", 1, 6),
                                                             ("weak", 2, 12)}
    assert all(p.efficiency == 1 for p in points if p.ranks == 1)
    assert found.stdout.count("\n  ffn ") == len(points)
    for p in points:
        assert f"{p.efficiency:.0%}" in found.stdout


@pytest.mark.launcher
def test_what_a_job_says_is_passed_on(tmp_path):
    found = study("--launcher", "no-such-launcher")
    assert found.returncode == 2 and found.stderr.splitlines()[-1] == \
        "mpitp: found no no-such-launcher, expected a launcher: --launcher WORDS"
    found = study("--launcher", mpirun(1)[0], "--dtype", "float16")
    assert found.returncode == 2
    assert "found exit status 2, expected 0; it said: mpitp: found dtype 'float16'" in found.stderr
    found = job(2, "-m", "mpitp", "scale")
    assert found.returncode == 2 and "it starts the ranks itself" in found.stderr
