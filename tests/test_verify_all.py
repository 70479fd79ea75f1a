"""`verify --all`: every layer against dense, on any number of ranks; a mistake is seen and named."""
import json
import re

import pytest

from spmd import job

pytestmark = pytest.mark.launcher

FAULT = """
import sys
from collections import Counter
from mpitp.comm.guard import guarded
from mpitp.layers.attention import ParallelAttention
from mpitp.layers import block
from mpitp.commands import run_command
{}
sys.exit(guarded(lambda: run_command(["verify", "--all"])))
"""


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_check_holds(ranks, tmp_path):
    done = job(ranks, "-m", "mpitp", "verify", "--all", "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("every check holds") and "FAILED" not in done.stdout and max(map(len, lines)) <= 100
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["schema"] == "mpitp.verify_all/1" and report["good"] and report["ranks"] == ranks
    assert len(report["layers"]) == 25 and sum(line.endswith("  ok") for line in lines) == 25
    names = {ratio["name"] for layer in report["layers"] for ratio in layer["ratios"]}
    assert {"logits", "loss", "dx", "embedding.weight", "layers.1.attention.key_norm.weight", "head.weight"} <= names
    assert all(layer["as_closed_form"] for layer in report["layers"])


def test_same_bits():
    found = [job(ranks, "-m", "mpitp", "verify", "--all", "--reproducible").stdout for ranks in (1, 2, 3)]
    hashes = [re.findall(r"[0-9a-f]{64} .*", text) for text in found]
    assert len(hashes[0]) == 25 and hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize("fault, complaint", [
    ("ParallelAttention.sum_key_value = lambda self, unit, dkv, call: next(iter(dkv.values()))",
     "attention.key.weight"),
    ("block.hidden_dropout = lambda group, *rest: 1 + 2e-5", "block: y"),
    ("ParallelAttention.collectives = lambda self, tokens: (Counter(), Counter())", "not those of the closed form"),
])
def test_a_mistake_is_seen(fault, complaint, tmp_path):
    (tmp_path / "fault.py").write_text(FAULT.format(fault))
    done = job(2, tmp_path / "fault.py")
    assert done.returncode != 0 and "FAILED: see the lines" in done.stdout
    assert any(line.startswith("  FAILED") and complaint in line for line in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_a_mistake_in_one_block_is_seen(activation, tmp_path):
    """`verify` exits with 1, and names the result with its worst element."""
    (tmp_path / "fault.py").write_text(f"""
import sys
from mpitp.commands import run_command
from mpitp.comm.guard import guarded
from mpitp.layers.mlp import ParallelMLP
right = ParallelMLP.backward
def wrong(self, dy, saved, **options):
    dx, gradients = right(self, dy, saved, **options)
    dx[0, 3, 5] *= 1.01
    return dx, gradients
ParallelMLP.backward = wrong
sys.exit(guarded(lambda: run_command(["verify", "--hidden-size", "16", "--activation", "{activation}"])))
""")
    done = job(2, tmp_path / "fault.py")
    assert done.returncode != 0 and "FAILED: see the lines" in done.stdout, done.stdout + done.stderr
    assert re.search(r"^  dx \(128, 16\): error .* FAILED; worst at \[3, 5\]: found ", done.stdout, re.M), done.stdout
    assert re.search(r"^  y .* ok$", done.stdout, re.M)


def test_options_of_one_block_are_refused():
    done = job(1, "-m", "mpitp", "verify", "--all", "--hidden-size", 8, "--gated")
    assert done.returncode == 2 and done.stderr.count("mpitp: ") == 1
    assert "found --hidden-size, --gated beside --all" in done.stderr
    assert job(1, "-m", "mpitp", "verify", "--all", "--dtype", "float16").returncode == 2


def test_a_step_is_named_while_it_runs(monkeypatch):
    """Of both checks, in order; and what each step returned comes back."""
    from mpitp.commands import verify_report
    shown = []

    class Bar(verify_report.Progress):
        def __enter__(self):
            shown.append(self)
            return self
    monkeypatch.setattr(verify_report, "Progress", Bar)
    steps = [(name, lambda: (shown[0].what, shown[0].done)) for name in ("one", "two", "three")]
    assert verify_report.take_steps(steps) == [("one", 0), ("two", 1), ("three", 2)] and shown[0].total == 3


def test_a_bar_and_only_where_it_is_asked_for():
    command = ("-m", "mpitp", "verify", "--hidden-size", 1024)
    bar = job(1, *command, environment={"MPITP_PROGRESS": "1"})
    assert bar.returncode == 0 and "exact results and their magnitudes" in bar.stderr
    assert job(1, *command).stderr == ""
