"""Step folders as models: what they hold is what was saved; exported, what transformers computes from their weights.

The weights are those of tiny checkpoints of several families, so that the golden values are those of data/tiny_*.json;
what transformers makes of an exported run itself is a recorded run, support/check_exported_runs.py.
"""
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from safetensors.numpy import load_file

import make_tiny_checkpoints as tiny
import mpitp
from mpitp import InputError
from mpitp.checkpoints import steps
from mpitp.checkpoints.byte_vocabulary import documents
from mpitp.checkpoints.families import family_named
from mpitp.checkpoints.loading import feed_forward
from mpitp.checkpoints.model_folder import open_folder
from mpitp.checkpoints.saving import companions_of, write_model
from mpitp.checkpoints.step_models import byte_vocabulary, open_checkpoint
from mpitp.checkpoints.steps import DamagedStep, sealed
from mpitp.commands import Parser, export, inspect, run_command, text
from mpitp.commands.byte_tokenizer import ByteTokenizer
from mpitp.commands.tokenizer import tokenizer_of
from groups import group_fixture
from spmd import everywhere, job

CASES = ("llama", "gpt2", "gpt_neox", "falcon_40b", "phi3", "opt", "gemma3_text", "olmo2", "smollm3", "llama_longrope")
SEVERAL = ("llama", "falcon_40b")           # on several ranks


group = group_fixture("ordinary")


@pytest.fixture
def shared(world, tmp_path):
    """One folder for all ranks."""
    return Path(world.bcast(str(tmp_path)))


def save_step(group, run, step, decoder, **state):
    """Write a step folder with a decoder's weights, as a Trainer does; returns its path."""
    files = {"model.safetensors": {name: (decoder.specs[name], w) for name, w in decoder.weights.items()}}
    group.on_root(lambda: run.mkdir(exist_ok=True))
    state = json.loads(json.dumps({"config": asdict(decoder.config), "seq_length": 12, **state}))
    return Path(steps.save(group, str(run), step, files, state))


def model_of_case(group, folder, case, dtype="float32"):
    group.on_root(lambda: tiny.write(folder, tiny.load(case)))
    return mpitp.load_model(folder, group, dtype)


def exported(group, model, target, family=None, dtype=None):
    name, keys, companions, more = group.comm.bcast(group.on_root(lambda: export.form_of(model, family)))
    write_model(model, target, family_named(name), keys, dtype, companions=companions, documents=more)
    return mpitp.load_model(target, group, model.dtype.name)


def edit(folder, **changes):
    """Change what state.json says, with the digest that fits; a change to None leaves the key out."""
    state = json.loads((folder / "state.json").read_text())
    state = {key: value for key, value in {**state, **changes}.items() if key != "digest" and value is not None}
    (folder / "state.json").write_text(json.dumps(sealed(state)))


def logits_of(model, ids):
    return model.gather_logits(model.forward(np.array([ids]), save=False)[0])[0]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(group, case, shared):
    """Loaded and exported: the same weights, names, logits to the bit, and transformers' numbers."""
    if group.size > 1 and case not in SEVERAL:
        return
    golden = tiny.load(case)
    saved = model_of_case(group, shared / "a", case, "float64")
    step = save_step(group, shared / "run", 6, saved)
    model = mpitp.load_model(step, group, "float64")
    assert model.config == saved.config and model.folder.family is None
    assert everywhere(model.bytes_read == model.local_bytes())
    assert everywhere(all(w.tobytes() == saved.weights[name].tobytes() for name, w in model.weights.items()))
    again = exported(group, model, shared / "b", golden["config"]["model_type"])
    a, b = (load_file(shared / folder / "model.safetensors") for folder in "ab")
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) and b[name].dtype == "f8" for name in a)
    assert logits_of(again, golden["ids"]).tobytes() == logits_of(model, golden["ids"]).tobytes()
    exact = np.array(golden["logits"])
    assert np.abs(logits_of(again, golden["ids"]) - exact).max() <= 1e-11 * np.abs(exact).max()
    keys = json.loads((shared / "b" / "config.json").read_text())
    assert keys["eos_token_id"] is None and keys["dtype"] == "float64"


def test_a_family_that_cannot_say_it(group, shared):
    """Biases and ALiBi in a Llama are refused by name, with those that can; without a family, they are named."""
    for case, family, said in [("gpt2", "llama", "--family llama: found gated = False, expected True, as model_type"),
                               ("llama3_biases", "qwen2", "found attention_bias = True, expected False"),
                               ("bloom", "gpt2", "found position_embedding = 'alibi', expected 'learned'"),
                               ("llama", "mamba", "found model_type 'mamba'")]:
        saved = model_of_case(group, shared / case, case)
        model = mpitp.load_model(save_step(group, shared / f"{case} run", 1, saved), group)
        with pytest.raises(InputError) as caught:
            exported(group, model, shared / "b", family)
        can = {"gpt2": "gpt2, gpt_bigcode can", "bloom": "bloom can", "llama": ""}.get(
            case, "llama, seed_oss, granite, smollm3 can")
        assert said in str(caught.value) and str(caught.value).endswith(can), caught.value
    with pytest.raises(InputError, match="found no --family, expected one of llama, .*, which can have this model"):
        exported(group, model, shared / "b")
    assert not (shared / "b").exists()
    with pytest.raises(InputError, match="a model that load_model did not make, expected family"):
        mpitp.save_model(model, shared / "b")


def test_the_newest_step_that_is_whole(group, shared, capfd):
    saved = model_of_case(group, shared / "a", "llama")
    run = shared / "run"
    folders = [save_step(group, run, step, saved) for step in (2, 4, 6)]
    assert export.load_run(group, str(run)).folder.checkpoint.folder == str(folders[2])
    if group.rank == 0:
        content = bytearray((folders[2] / "model.safetensors").read_bytes())
        content[-9] ^= 1
        (folders[2] / "model.safetensors").write_bytes(bytes(content))
    group.comm.Barrier()
    with pytest.raises(DamagedStep, match="head.weight: found checksum .*, expected "):
        mpitp.load_model(folders[2], group)
    if group.rank == 0:
        (folders[1] / "model.safetensors").write_bytes(content[:-8])
    group.comm.Barrier()
    assert export.load_run(group, str(run)).folder.checkpoint.folder == str(folders[0])
    notes = capfd.readouterr().err.splitlines()
    assert len(notes) == (2 if group.rank == 0 else 0) and all("an older one is taken" in note for note in notes)
    group.on_root(lambda: shutil.rmtree(folders[0]))
    with pytest.raises(InputError, match="step-00000006.*; no other step folder of .* is whole"):
        export.load_run(group, str(run))
    with pytest.raises(InputError, match="found no step folder in"):
        export.load_run(group, str(shared / "a"))


def test_a_folder_without_checksums(group, shared, capfd):
    """Of mpitp 0.2.0: it is loaded, with a note."""
    saved = model_of_case(group, shared / "a", "llama")
    step = save_step(group, shared / "run", 1, saved)

    def of_old():
        state = json.loads((step / "state.json").read_text())
        del state["checksums"], state["digest"]
        (step / "state.json").write_text(json.dumps({**state, "schema": "mpitp.checkpoint/1"}))
    group.on_root(of_old)
    model = mpitp.load_model(step, group)
    assert everywhere(all(w.tobytes() == saved.weights[name].tobytes() for name, w in model.weights.items()))
    assert ("not verified" in capfd.readouterr().err) == (group.rank == 0)


def group_of_one():
    return mpitp.TensorParallelGroup(MPI.COMM_SELF)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A group of one process and a step folder: tests of it run in the session of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    with group_of_one() as group:
        yield group, save_step(group, folder / "run", 6, model_of_case(group, folder / "a", "llama"))


@pytest.mark.parametrize("changes, said", [
    (dict(config=None), "found no config of a decoder"), (dict(config=[1]), "found no config of a decoder"),
    (dict(config=dict(num_layers=10 ** 12)), "found num_layers = 1000000000000, expected 1 to 21"),
    (dict(config=dict(num_layers="2")), "found num_layers = '2'"),
    (dict(config=dict(num_layers=2, novel=1)), "found no config of a decoder"),
    (dict(hidden_size=10 ** 9), r"found shape \(37, 20\), expected \(37, 1000000000\) by state.json"),
    (dict(vocab_size=38), r"embedding.weight: found shape \(37, 20\), expected \(38, 20\) by state.json"),
    (dict(qkv_bias=True), r"found no layers.\*.attention.key.bias \(2\), .* tensors that state.json describes"),
    (dict(gated=False), r"the unexpected layers.\*.mlp.gate.weight"), (dict(gated="no"), "found gated = 'no'"),
    (dict(activation="mish"), "state.json: found activation 'mish'"), (dict(rotary=7), "found no config of a decoder"),
    (dict(rotary=dict(base=-1)), "found rotary base = -1"), (dict(sliding_window=[3]), "sliding_window of 1 layers"),
    (dict(model=7), "found model = 7"), (dict(model=dict(family="mamba", config={})), "found model_type 'mamba'"),
    (dict(model=dict(family="llama", config=tiny.load("llama3_biases")["config"])), "found another config than"),
    (dict(schema="mpitp.checkpoint/9"), "found schema 'mpitp.checkpoint/9'"), (dict(checksums=[]), "no checksums"),
])
def test_a_state_that_is_none(alone, changes, said, tmp_path):
    """One line that says what it is."""
    group, step = alone
    copy = tmp_path / step.name
    shutil.copytree(step, copy)
    of_config = {key: value for key, value in changes.items() if key not in ("config", "model", "schema", "checksums")}
    if of_config:
        changes = {"config": {**json.loads((step / "state.json").read_text())["config"], **of_config}}
    edit(copy, **changes)
    with pytest.raises(InputError, match=said) as caught:
        mpitp.load_model(copy, group)
    assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_which_folder_it_is(alone, tmp_path):
    group, step = alone
    with pytest.raises(InputError, match="found the folder of a training run, expected one of its step folders, such "
                                         "as .*step-00000006"):
        open_folder(step.parent)
    with pytest.raises(InputError, match="config.json: found No such file"):
        open_folder(tmp_path)
    named = tmp_path / "mine"
    shutil.copytree(step, named)                    # a name of its own
    assert open_folder(named).specs == open_folder(step).specs
    edit(named, step=7, digest=None)
    state = json.loads((named / "state.json").read_text())
    (named / "state.json").write_text(json.dumps({**state, "seq_length": 13}))
    with pytest.raises(InputError, match="found contents that do not fit their digest"):
        open_folder(named)


def test_inspect_and_a_block(alone):
    group, step = alone
    parser = Parser()
    inspect.add_arguments(parser)
    found = inspect.inspect(parser.parse_args([str(step), "-n", "3"]))
    assert found.family == "step 6" and next(iter(found.tensors)).stored_as == "embedding.weight"
    assert "  step 6: " in "\n".join(inspect.lines(found))
    block = feed_forward(open_checkpoint(step), 1)
    assert np.array_equal(block.weights["up.weight"][:, :], tiny.tensors(tiny.load("llama"))[
        "model.layers.1.mlp.up_proj.weight"])


# --- bytes ----------------------------------------------------------------------------------------------------------

def test_bytes_and_text():
    tokenizer = ByteTokenizer(256)
    for sample in ("once\nupon\t", "naïve 日本 \U0001F600", ""):
        assert tokenizer.encode(sample)[0].tolist() == list(sample.encode())
        assert tokenizer.decode(tokenizer.encode(sample)[0].tolist()) == sample
    assert tokenizer.decode([104, 195, 300, 169, 105]) == "h\ufffd\ufffd\ufffdi"
    with pytest.raises(InputError, match="found byte 195 at position 2 of a text, expected 0 to 127"):
        text.encode(ByteTokenizer(128), "na\xefve", False, "it")
    stream = text.TextStream(tokenizer.decode, list(b"caf"))
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_the_exported_vocabulary():
    """The library has the same tokens for every text."""
    tokenizers = pytest.importorskip("tokenizers")
    exported = tokenizers.Tokenizer.from_str(documents(256)["tokenizer.json"])
    for sample in ("once\nupon\t", "naïve 日本 \U0001F600", " two  spaces ", "".join(map(chr, range(300)))):
        assert exported.encode(sample).ids == list(sample.encode()) and exported.decode(list(sample.encode())) == sample
    assert documents(255) == {}


@pytest.mark.parametrize("state, expected", [
    ({}, None), (dict(vocabulary="bytes"), 37), (dict(vocabulary="ids"), None),
    (dict(vocabulary="bytes", model=dict(family="llama", config=tiny.load("llama")["config"])), 37)])
def test_which_models_have_bytes(alone, state, expected, tmp_path):
    group, step = alone
    copy = tmp_path / step.name
    shutil.copytree(step, copy)
    edit(copy, **state)
    assert byte_vocabulary(str(copy)) == expected and byte_vocabulary(str(tmp_path)) is None
    if expected is None:
        with pytest.raises(InputError, match="found no .*model-files/tokenizer.json, expected the tokenizer"):
            tokenizer_of(str(copy))


def test_a_run_that_knows_its_family(group, shared):
    """Its config.json and companions come along, under another step and from other ranks."""
    saved = model_of_case(group, shared / "a", "llama3_biases")
    golden = tiny.load("llama3_biases")
    kept = shared / "run" / "model-files"
    step = save_step(group, shared / "run", 2, saved, model=dict(family="llama", config=golden["config"]))
    group.on_root(lambda: (kept.mkdir(), (kept / "tokenizer.json").write_text("{}")))
    model = mpitp.load_model(step, group)
    assert model.folder.family.model_type == "llama" and companions_of(str(step)) == [str(kept / "tokenizer.json")]
    exported(group, model, shared / "b", dtype="bfloat16")
    keys = json.loads((shared / "b" / "config.json").read_text())
    assert keys == {**golden["config"], "dtype": "bfloat16"} and (shared / "b" / "tokenizer.json").exists()
    mpitp.save_model(model, shared / "c")
    assert json.loads((shared / "c" / "config.json").read_text()) == golden["config"]
    exported(group, model, shared / "d", "granite")
    assert (shared / "d" / "tokenizer.json").exists()
    group.comm.Barrier()


# --- the commands ---------------------------------------------------------------------------------------------------

def lines_of(capfd, *words):
    """What a command prints on this one process."""
    assert run_command(list(map(str, words))) == 0
    return capfd.readouterr().out.splitlines()


@pytest.mark.launcher
def test_the_commands(tmp_path, capfd, monkeypatch):
    """Train, export, and go on from both folders: the same text, the same loss."""
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("book").write_text(300 * "once upon a time there was a naïve row ")
    trained = job(2, "-m", "mpitp", "train", "--data", "book", "--hidden-size", 24, "--num-layers", 2, "--seq-length",
                  16, "--num-attention-heads", 3, "--train-iters", 4, "--out", "run", cwd=tmp_path)
    found = job(3, "-m", "mpitp", "export", "run", "out", "--family", "llama", cwd=tmp_path)
    assert found.stdout.splitlines() == ["run/step-00000004 as llama: 26,232 parameters, float32, in out",
                                         "  2 files beside it: tokenizer.json, tokenizer_config.json"], trained.stderr
    for words in (("generate", "--prompt", "once upon", "--max-new-tokens", 5),
                  ("score", "--text", "book", "--window", 64)):
        here, there = (lines_of(capfd, *words, "--model", folder)[0] for folder in ("run/step-00000004", "out"))
        assert here == there and here
    for words, said in [(("export", "run", "out", "--family", "llama"), "expected a path where nothing is"),
                        (("export", "run", "new"), "found no --family, expected one of llama, "),
                        (("export", "run", "gone/new", "--family", "llama"), "that can be written to, expected one"),
                        (("export", "book", "new", "--family", "llama"), "found no step folder in book"),
                        (("generate", "--model", "run", "--prompt", "a"), "expected one of its step folders, such as")]:
        with pytest.raises(InputError) as caught:
            run_command(list(words))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("new").exists()
    Path("empty").mkdir()
    lines_of(capfd, "export", "run", "empty", "--family", "phi3", "--dtype", "float16")
    assert {w.dtype.name for w in load_file("empty/model.safetensors").values()} == {"float16"}
