"""Scaling studies: jobs on growing numbers of ranks, and what their times are measured by."""
import json
import os
import subprocess
import sys

import pytest

from mpitp.commands import parse_or_help
from mpitp.commands.scale import KINDS, Point, check_arguments, launcher_words, points_of, run_bench, shared_folder
from mpitp.commands.scale_plan import Predictions, work_of
from mpitp.errors import InputError
from mpitp.measure.decode import decode_config
from mpitp.plan import outcome
from mpitp.plan.job import Job, Layout
from mpitp.plan.machines import MACHINES
from spmd import ROOT, job, job_environment, mpirun


def report(ranks, tokens, **seconds):
    rows = [dict(bench="ffn", case=case.replace("_", " "), median_seconds=t, least_seconds=t, most_seconds=t,
                 share_of_limit=0.9) for case, t in seconds.items()]
    limit = dict(bench="ffn", case="products", median_seconds=1, least_seconds=1, most_seconds=1, share_of_limit=None)
    return dict(ranks=ranks, tokens=tokens, rows=[*rows, limit])


def test_limits_are_no_points_and_tokens_are_not_divided():
    rows = [dict(bench=bench, case=case, median_seconds=1, least_seconds=1, most_seconds=1, share_of_limit=1.0)
            for bench, case in (("decode", "decode"), ("decode", "matrix-vector products"), ("ffn", "forward"),
                                ("ffn", "one token forward"), ("matmul", "read"))]
    found = {kind: [p.case for p in points_of(dict(ranks=1, tokens=8, rows=rows), kind, [])] for kind in KINDS}
    assert found == {"strong": ["decode", "forward", "one token forward"], "weak": ["forward"]}


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
    (["--json", "/nowhere/x.json"], "/nowhere/x.json"), (["--plot", "x.txt"], "ends with .png, .svg, .pdf")])
def test_bad_input(options, message, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("PMI_", "OMPI_COMM"))]:
        monkeypatch.delenv(name)
    with pytest.raises(InputError) as found:
        check_arguments(parse_or_help(["scale", *options])[1])
    assert message in str(found.value)


def predictions(*words, calibrate=None):
    return Predictions(parse_or_help(["scale", *words])[1], calibrate)


def test_predictions(tmp_path, monkeypatch):
    """They are plan's for the same work; what no machine is known for is not planned, another kind of it refused."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nothing = predictions()
    assert nothing.seconds("ffn", "forward", 1, 64) is None and "nothing is planned" in nothing.note
    laptop = predictions("--machine", "laptop", "--hidden-size", "256")
    seconds = {case: laptop.seconds(*case.split(": "), 2, 64) for case in (
        "ffn: forward", "ffn: forward+backward", "ffn: one token forward", "block: forward", "block: forward+backward",
        "decode: decode")}
    assert 2 < seconds["ffn: forward+backward"] / seconds["ffn: forward"] < 4
    all_tokens = 2 * 4 * (2 * 256 * 512) + 4 * 64 * (4 * 256 + 3 * 512)     # push the weights of one out of the cache
    assert work_of("ffn", "one token forward", 2, 64, laptop.arguments)[1] == all_tokens
    assert seconds["ffn: one token forward"] < seconds["ffn: forward"] < seconds["block: forward"]
    job = Job(decode_config(256), "decode", 1, 64, 2)
    token = outcome.of_ranks(job, MACHINES["laptop"], Layout(2)).phases[1].seconds
    assert 0.9 * token < seconds["decode: decode"] < token              # which chooses none
    assert laptop.seconds("ffn", "forward", 1024, 64) is None           # of one host
    asked = []
    measured = predictions("--calibrate", calibrate=lambda ranks: asked.append(ranks) or MACHINES["laptop"])
    assert [measured.seconds("ffn", "forward", ranks, 64) is None for ranks in (1, 2, 2)] == 3 * [False]
    assert asked == [1, 2]
    for words, message in ((("--machine", "h100x2"), "found machine 'h100x2', a gpu, with --device cpu"),
                           (("--machine", "cray-1"), "found machine 'cray-1'"),
                           (("--machine", "laptop", "--calibrate"), "found --machine and --calibrate"),
                           (("--calibrate", "--device", "gpu"), "found --calibrate with --device gpu"),
                           (("--machine", "laptop", "--dtype", "int8"), "found int8 on machine 'laptop'")):
        with pytest.raises(InputError) as refused:
            predictions(*words)
        assert message in str(refused.value)


def test_launchers(monkeypatch):
    monkeypatch.delenv("MPITP_LAUNCHER", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launcher_words(None, 2) == ["mpirun"]
    assert launcher_words("srun --mpi='pmix v4'", 2) == ["srun", "--mpi=pmix v4"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launcher_words(None, 2) == ["srun", "--overlap", "--cpus-per-task=2"]
    monkeypatch.setenv("MPITP_LAUNCHER", "mpiexec.hydra -bind-to none")
    assert launcher_words(None, 2) == ["mpiexec.hydra", "-bind-to", "none"]


def study(*arguments):
    small = ["--hidden-size", "16", "--rounds", "1", "--seq-length", "6", "--ranks", "1,2"]
    return subprocess.run([sys.executable, "-m", "mpitp", "scale", *small, *map(str, arguments)], cwd=ROOT, text=True,
                          env=job_environment(), capture_output=True, timeout=120)


@pytest.mark.launcher
def test_a_study(tmp_path):
    found = study("--launcher", mpirun(1)[0], "ffn", "--machine", "laptop", "--json", tmp_path / "scale.json")
    assert found.returncode == 0, found.stderr
    written = json.loads((tmp_path / "scale.json").read_text())
    points = [Point(**point) for point in written["points"]]
    assert {(p.kind, p.ranks, p.tokens) for p in points} == {("strong", 1, 6), ("strong", 2, 6), ("weak", 1, 6),
                                                             ("weak", 2, 12)}
    assert all(p.efficiency == 1 for p in points if p.ranks == 1)
    assert found.stdout.count("\n  ffn ") == len(points)
    for p in points:
        assert f"{p.efficiency:.0%}" in found.stdout
        assert p.planned_seconds > 0 and f"{p.planned_seconds / p.median_seconds:.2f}" in found.stdout
    assert "\nplanned for laptop\n" in found.stdout


def test_jobs_that_do_not_end_as_they_should(tmp_path):
    """A launcher that takes too long is asked to end, not killed; one that wrote no report is not believed."""
    arguments = parse_or_help(["scale", "--limit", "0.5", "--threads", "1"])[1]
    stubborn = ["sh", "-c", f"trap 'echo ended > {tmp_path}/ended; exit' TERM; sleep 60 & wait"]
    with pytest.raises(InputError, match=r"found 3 ranks still at work after 0.5 seconds, expected an end: --limit"):
        run_bench(stubborn, 3, arguments, [], tmp_path / "report")
    assert (tmp_path / "ended").exists()
    with pytest.raises(InputError, match=r"true -n 3: no report in .*, expected a folder that rank 0 shares: TMPDIR"):
        run_bench(["true"], 3, arguments, [], tmp_path / "report")
    with pytest.raises(InputError, match="found exit status 3, expected 0; it said: no such partition"):
        run_bench(["sh", "-c", "echo no such partition >&2; exit 3"], 3, arguments, [], tmp_path / "report")


def test_the_folder_of_a_report(monkeypatch, tmp_path):
    """The /tmp of a node is not that of another one; the folder that a job is started in is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with shared_folder() as folder:
        assert os.path.samefile(os.path.dirname(folder), tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    with shared_folder() as folder:
        assert not os.path.samefile(os.path.dirname(folder), tmp_path)
    assert not list(tmp_path.iterdir())


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
