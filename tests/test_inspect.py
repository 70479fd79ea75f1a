"""inspect tells what loading does: bytes held and read, heads and features of each rank."""
import json

import ml_dtypes
import pytest

import make_tiny_checkpoints as tiny
import mpitp
from mpitp.commands import Parser, inspect
from spmd import everywhere, job


def found(*words):
    parser = Parser()
    inspect.add_arguments(parser)
    return inspect.inspect(parser.parse_args(list(map(str, words))))


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2", "falcon_40b", "bloom", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_says_what_loading_does(group, case, dtype, tmp_path):
    tiny.write(tmp_path, tiny.load(case), ml_dtypes.bfloat16)
    model = mpitp.load_model(tmp_path, group, dtype)
    said = found(tmp_path, "-n", group.size, "--dtype", dtype, *(["--reproducible"] if group.reproducible else []))
    mine = said.ranks[group.rank]
    assert everywhere((mine.hold_bytes, mine.read_bytes) == (model.local_bytes(), model.bytes_read))
    attention = model.blocks[0].attention
    assert mine.query_heads == attention.heads.partition.lengths[group.rank]
    assert mine.key_value_heads * model.config.head_dim == len(attention.parameter("key.weight"))
    assert mine.vocabulary == len(model.embedding.parameter("weight"))
    assert sum(kind.stored_bytes for kind in said.tensors) == said.stored_bytes == 2 * said.parameters
    assert sum(kind.hold_bytes_of_ranks[group.rank] for kind in said.tensors) == mine.hold_bytes
    assert all(len(line) <= 100 for line in list(inspect.lines(said))[1:])


def test_sizes_of_a_real_model(tmp_path):
    """All of one rank is all of the checkpoint; more ranks than heads is no fault."""
    tiny.write(tmp_path, tiny.load("llama"))
    one, many = found(tmp_path), found(tmp_path, "-n", 12)
    assert one.ranks[0].read_bytes == one.stored_bytes
    assert sum(r.query_heads for r in many.ranks) == 5 and sum(r.vocabulary for r in many.ranks) == 37
    assert {r.key_value_heads for r in many.ranks} == {0, 1}


@pytest.mark.launcher
def test_the_command(tmp_path):
    golden = tiny.load("gpt_neox")
    tiny.write(tmp_path, golden, config={**golden["config"], "a_key_of_tomorrow": 1}, shards=3)
    done = job(1, "-m", "mpitp", "inspect", tmp_path, "-n", 3, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert "  gpt_neox: " in done.stdout and "in 3 files\n" in done.stdout
    assert "NOTE: keys of config.json that this family does not have: a_key_of_tomorrow\n" in done.stdout
    said = json.loads((tmp_path / "report.json").read_text())
    assert said["schema"] == "mpitp.inspect/1" and said["config"]["num_layers"] == 2 and len(said["ranks"]) == 3
    for words, message in [((tmp_path / "gone",), "found no such folder"), ((tmp_path, "-n", 0), "ranks = 0"),
                           ((tmp_path, "-n", 10 ** 9), "at most 16384"), ((), "required: DIR")]:
        done = job(1, "-m", "mpitp", "inspect", *words)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
