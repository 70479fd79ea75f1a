"""A run that begins with a checkpoint: its config, weights and tokens; its step folders go back into its layout."""
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import make_tiny_checkpoints as tiny
import mpitp
from groups import group_fixture
from mpitp import InputError
from mpitp.checkpoints.model_folder import open_folder
from mpitp.checkpoints.steps import sealed
from mpitp.commands import run_command
from mpitp.training.data import Tokens
from mpitp.training.initial import begin_with, description_of, keep_model_files
from mpitp.training.loop import Trainer
from mpitp.training.settings import Settings
from spmd import everywhere, job
from test_train import SETTINGS, dense_steps

group = group_fixture("ordinary")
IDS = np.array([(7 * i * i + i // 3) % 37 for i in range(900)])


def trainer(group, folder, dtype="float64", out=None):
    """A trainer that begins with a folder, and the weights that are in it."""
    found = open_folder(folder)
    tokens = Tokens("ids", found.config.vocab_size, 7, SETTINGS["seed"], ids=IDS)
    made = Trainer(group, found.config, tokens, Settings(**SETTINGS), dtype=dtype, folder=out, say=lambda text: None)
    begin_with(made, found)
    return made, {name: view[tuple(map(slice, view.shape))].astype(dtype) for name, view in found.views.items()}


@pytest.mark.parametrize("case", ["gemma3_text", "falcon_40b"])
def test_it_begins_with_the_weights(group, case, tmp_path):
    """Steps from there against those of the dense decoder from the same weights, every formula by hand."""
    tiny.write(tmp_path, tiny.load(case))
    made, weights = trainer(group, tmp_path)
    for _ in range(2):
        made.train_step()
    exact = dense_steps(made, weights, 2)[0]
    for name, w in group.comm.bcast(made.model.gather(made.model.weights)).items():
        assert np.abs(w - exact[name]).max() <= 1e-8 * max(1e-3, np.abs(exact[name]).max()), name
        assert np.abs(w - weights[name]).max() > 0, name


def test_what_the_run_knows(group, world, tmp_path):
    """A head of its own in a folder that says tied, a folder with images, companions: as save_model has them."""
    out = Path(world.bcast(str(tmp_path / "out")))
    for case, family in (("gemma3", "gemma3_text"), ("gpt2_own_head", "gpt2")):
        tiny.write(tmp_path / case, tiny.load(case))
        found = description_of(open_folder(tmp_path / case))
        assert found["family"] == family and found["config"].get("tie_word_embeddings") == (family != "gpt2")
    (tmp_path / case / "tokenizer.json").write_text("{}")
    made, weights = trainer(group, tmp_path / case, "float32", str(out))
    folder = open_folder(tmp_path / case)
    made.began_with = description_of(folder)
    group.on_root(lambda: keep_model_files(str(out), folder, made.began_with))
    made.save()
    model = mpitp.load_model(out / "step-00000000", group)
    mpitp.save_model(model, out / "again")
    stored, first = (load_file(path / "model.safetensors") for path in (out / "again", tmp_path / case))
    assert stored.keys() == first.keys()
    assert everywhere(all(np.array_equal(stored[name], w) for name, w in first.items()))
    keys = json.loads((out / "again" / "config.json").read_text())
    assert keys == {**tiny.load(case)["config"], "tie_word_embeddings": False}
    assert (out / "again" / "tokenizer.json").read_text() == "{}"
    world.barrier()


# --- the command ----------------------------------------------------------------------------------------------------

def run_here(*words):
    return run_command(list(map(str, words)))


def refused(*words):
    with pytest.raises(InputError) as caught:
        run_here(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


QUICK = ("--seq-length", 8, "--train-iters", 4, "--save-interval", 2, "--micro-batch-size", 2, "--reproducible")


@pytest.mark.launcher
def test_the_command(tmp_path, monkeypatch):
    """On 2 ranks, resumed on 3: the same bytes as on one; exported with the names and the config.json it came with."""
    monkeypatch.chdir(tmp_path)
    golden = tiny.load("gemma3_text")
    tiny.write(Path("a"), golden)
    IDS.astype("<u2").tofile("ids.bin")
    of_ids = ("--model", "a", "--data", "ids.bin", "--data-dtype", "uint16", *QUICK)
    assert run_here("train", *of_ids, "--out", "one") == 0
    done = job(2, "-m", "mpitp", "train", *of_ids, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = job(3, "-m", "mpitp", "train", *of_ids, "--out", "two", "--resume-from", "two/step-00000002", cwd=tmp_path)
    assert done.returncode == 0 and "verified" in done.stdout, done.stderr
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert Path("one/step-00000004", file).read_bytes() == Path("two/step-00000004", file).read_bytes(), file
    assert run_here("export", "two", "b") == 0
    assert json.loads(Path("b/config.json").read_text()) == golden["config"]
    a, b = (load_file(f"{folder}/model.safetensors") for folder in "ab")
    assert a.keys() == b.keys() and not np.array_equal(a["model.norm.weight"], b["model.norm.weight"])
    # Another model of the same shapes is another run; and so is a new one.
    tiny.write(Path("other"), golden, config={**golden["config"], "eos_token_id": 7})
    assert "eos_token_id = 1, expected 7" in refused(
        "train", "--model", "other", *of_ids[2:], "--out", "one", "--resume-from", "one/step-00000002")
    assert "activation = gelu_tanh, expected silu" in refused(
        "train", *of_ids[2:], "--out", "one", "--resume-from", "one/step-00000002")


@pytest.mark.launcher
def test_text(tmp_path, monkeypatch, capfd):
    """Through the folder's tokenizer, which comes along; of a model of bytes as it is."""
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    tiny.write(Path("a"), tiny.load("llama"))
    Path("book").write_text(200 * "once upon a time there was a row ")
    assert "no tokenizer.json in a for the text book" in refused("train", "--model", "a", "--data", "book", *QUICK)
    parts = "abcdefghijklmnopqrstuvwxyz "
    tokenizers.Tokenizer(tokenizers.models.BPE({part: i for i, part in enumerate(parts)}, [])).save("a/tokenizer.json")
    assert run_here("train", "--model", "a", "--data", "book", *QUICK, "--out", "run") == 0
    state = json.loads(Path("run/step-00000004/state.json").read_text())
    assert state["data"].startswith("6600 tokens") and "vocabulary" not in state and state["model"]["family"] == "llama"
    assert sorted(path.name for path in Path("run/model-files").iterdir()) == ["config.json", "tokenizer.json"]
    assert run_here("score", "--model", "run/step-00000004", "--text", "book") == 0
    assert run_here("export", "run", "b") == 0 and "1 file beside it: tokenizer.json" in capfd.readouterr().out
    # A run of bytes goes on with bytes, and the next one with its config.json where it was exported.
    sizes = ("--hidden-size", 24, "--num-layers", 1, "--num-attention-heads", 3)
    assert run_here("train", "--data", "book", *QUICK, *sizes, "--out", "bytes") == 0
    assert run_here("train", "--data", "book", *QUICK, "--model", "bytes/step-00000004", "--out", "more") == 0
    state = json.loads(Path("more/step-00000004/state.json").read_text())
    assert state["vocabulary"] == "bytes" and "model" not in state
    assert run_here("export", "more", "c", "--family", "llama") == 0
    assert run_here("train", "--data", "book", *QUICK, "--model", "c", "--hidden-dropout", 0.1, "--out", "most") == 0
    state = json.loads(Path("most/step-00000004/state.json").read_text())
    assert state["model"]["family"] == "llama" and state["config"]["hidden_dropout"] == 0.1
    assert state["data"] == "6600 tokens, CRC-32 " + state["data"][-8:]


def test_options_that_contradict(tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    assert refused("train", "--model", tmp_path, "--hidden-size", 8, "--num-query-groups", 1) == \
        "found --hidden-size, --num-query-groups beside --model, expected the checkpoint alone to say it"
    assert refused("train", "--strict", "--verify-weights") == \
        "found --strict, --verify-weights without --model, expected the checkpoint folder to begin with"
    assert "found token 37 at position 37" in refused("train", "--model", tmp_path, "--data", ids(tmp_path, 38),
                                                       "--data-dtype", "uint16", *QUICK)
    assert "no such folder" in refused("train", "--model", tmp_path / "gone", *QUICK)


def ids(folder, count):
    np.arange(count, dtype="<u2").tofile(folder / "ids.bin")
    return folder / "ids.bin"


def test_a_state_without_the_vocabulary_is_resumed(tmp_path, monkeypatch):
    """As mpitp 0.2.0 wrote it."""
    monkeypatch.chdir(tmp_path)
    sizes = ("--hidden-size", 24, "--num-layers", 1, "--num-attention-heads", 3, "--out", "run")
    Path("book").write_text(200 * "once upon a time there was a row ")
    assert run_here("train", "--data", "book", *QUICK, *sizes) == 0
    last = {file.name: file.read_bytes() for file in Path("run/step-00000004").iterdir()}
    path = Path("run/step-00000002/state.json")
    state = json.loads(path.read_text())
    assert state.pop("vocabulary") == "bytes" and state.pop("digest")
    path.write_text(json.dumps(sealed(state)))
    assert run_here("train", "--data", "book", *QUICK, *sizes, "--resume-from", "run/step-00000002") == 0
    assert last == {file.name: file.read_bytes() for file in Path("run/step-00000004").iterdir()}
