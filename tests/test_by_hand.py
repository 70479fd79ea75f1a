"""examples/by_hand.py: right on any number of ranks and for any size, and it says so when it is wrong."""
import re

import pytest

from spmd import ROOT, job

EXAMPLE = ROOT / "examples" / "by_hand.py"
SOURCE = EXAMPLE.read_text()
LINE = re.compile(r"rank (\d+): features +(\d+): *(\d+), summand ([-+]\S+), y ([-+]\S+), dense ([-+]\S+), "
                  r"largest difference (\S+)")

pytestmark = pytest.mark.launcher


def run(folder, ranks, *changes):
    """The example on so many ranks, after each text of `changes` has taken the place of the one before it."""
    text = SOURCE
    for before, after in zip(changes[::2], changes[1::2]):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    program = folder / "by_hand.py"
    program.write_text(text)
    return job(ranks, program)


def lines(done):
    return [LINE.fullmatch(line).groups() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("features", [40, 41, 2, 1])                # 3 ranks on 2 features: one has none
def test_it_agrees_with_dense(tmp_path, ranks, features):
    done = run(tmp_path, ranks, "N, D, F = 5, 10, 40", f"N, D, F = 7, 9, {features}")
    assert done.returncode == 0, done.stderr
    found = lines(done)
    assert [int(line[0]) for line in found] == list(range(ranks))
    stops = [0] + [int(line[2]) for line in found]
    assert [int(line[1]) for line in found] == stops[:-1] and stops[-1] == features     # side by side, nothing left
    assert all(line[4] == line[5] and float(line[6]) < 1e-13 for line in found), done.stdout


def test_the_summands_add_up_to_y(tmp_path):
    """Without the bias of the second product y is the sum of what the ranks print."""
    done = run(tmp_path, 3, "return y_ND + down_bias_D, h_NFp", "return y_ND + 0 * down_bias_D, h_NFp",
               "return h_NF @ down_DF.T + down_bias_D,", "return h_NF @ down_DF.T,")
    assert done.returncode == 0, done.stderr
    found = lines(done)
    assert abs(sum(float(line[3]) for line in found) - float(found[0][4])) < 3e-6


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("before, after", [
    ("return all_reduce(dx_ND)", "return dx_ND"),                                   # f's backward adds nothing up
    ("return all_reduce(y_ND)", "return y_ND"),                                     # nor does g
    ("(h_NFp @ down_DFp.T)", "(h_NFp @ down_DFp.T + down_bias_D)"),                 # every rank adds the row bias
    ("def reduce_from_ranks_backward(dy_ND):                          # and moves y as much as it moves itself\n"
     "    return dy_ND", "def reduce_from_ranks_backward(dy_ND):\n    return all_reduce(dy_ND)"),
    ("    return total", "    return total * np.nan"),
], ids=["f backward", "g", "row bias on every rank", "g backward twice", "nan"])
def test_a_fault_ends_the_job(tmp_path, ranks, before, after):
    changes = [before, after]
    if "bias" in after:
        changes += ["return y_ND + down_bias_D, h_NFp", "return y_ND, h_NFp"]
    done = run(tmp_path, ranks, *changes)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_it_is_short_and_stands_alone():
    assert len(SOURCE.splitlines()) < 60
    assert re.findall(r"^(?:import|from) (\S+)", SOURCE, re.M) == ["numpy", "mpi4py"] and "mpitp" not in SOURCE
