"""Plans, pictures and defaults against those of data/golden_outputs.json: see support/golden_outputs.py."""
import contextlib
import io
import json

import pytest

import golden_outputs

EXPECTED = json.loads(golden_outputs.FILE.read_text())
ANEW = "python tests/support/golden_outputs.py writes them anew, where they should differ"


def require_same(found, expected):
    assert list(found) == list(expected)
    for name, value in found.items():
        assert json.loads(json.dumps(value)) == expected[name], f"{name}: {ANEW}"


def test_plans(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        require_same(golden_outputs.plans(tmp_path), EXPECTED["plans"])


def test_pictures(tmp_path):
    """Lines, bars and words, not pixels."""
    pytest.importorskip("matplotlib")
    with contextlib.redirect_stdout(io.StringIO()):
        require_same(golden_outputs.pictures(tmp_path), EXPECTED["pictures"])


def test_defaults():
    """What a user may leave out is part of the interface; more of it may come."""
    found = golden_outputs.defaults()
    require_same({kind: {name: found[kind].get(name) for name in named} for kind, named in
                  EXPECTED["defaults"].items()}, EXPECTED["defaults"])
