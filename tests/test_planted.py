"""tests/planted.py plants what it says: every edit finds its place, every test is there; and one of them is run."""
import ast
import re

import pytest

import planted
from spmd import ROOT


@pytest.mark.parametrize("mistake", planted.MISTAKES, ids=lambda mistake: mistake.name)
def test_it_can_be_planted(mistake):
    text = (ROOT / mistake.file).read_text(encoding="utf-8")
    was, now = mistake.edit(text)
    assert text.count(was) == 1 and was != now
    if mistake.file.endswith(".py"):
        ast.parse(text.replace(was, now))
    file, _, name = mistake.test.partition("::")
    assert re.search(rf"^def {name.partition('[')[0] or 'test_'}", (ROOT / file).read_text(encoding="utf-8"), re.M)


def test_names_differ():
    assert len({mistake.name for mistake in planted.MISTAKES}) == len(planted.MISTAKES) > 45


@pytest.mark.launcher
def test_one_is_caught_and_no_mistake_is_not(tmp_path):
    tree = planted.copy_of(ROOT, tmp_path)
    one, = [mistake for mistake in planted.MISTAKES if mistake.name == "--z-loss that the command drops"]
    found, _ = planted.verdict(tree, one)
    assert found == "caught by test_train_figures.py::test_flags_reach_the_settings"
    nothing = planted.Mistake("nothing", one.file, one.was, one.was, one.test)
    assert planted.verdict(tree, nothing)[0] == "NOT NOTICED"
    assert (tree / one.file).read_bytes() == (ROOT / one.file).read_bytes()
