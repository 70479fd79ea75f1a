"""examples/own_layer.py runs, on any number of ranks, and learns the same."""
import re

import pytest

from spmd import ROOT, job

EXAMPLE = ROOT / "examples" / "own_layer.py"


@pytest.mark.launcher
def test_the_example_learns_the_same_on_any_number_of_ranks():
    losses = {}
    for ranks in (1, 3):
        done = job(ranks, EXAMPLE)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 6, done.stdout
        assert all(re.fullmatch(r"step +\d+  loss +\d+\.\d{4}", line) for line in lines), done.stdout
        losses[ranks] = [float(line.split()[-1]) for line in lines]
        assert losses[ranks] == sorted(losses[ranks], reverse=True) and losses[ranks][-1] < losses[ranks][0] / 100
    assert losses[1] == pytest.approx(losses[3], rel=0.01)


def test_it_is_as_short_as_promised():
    body = EXAMPLE.read_text().split('"""')[2]
    assert len([line for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]) <= 20
