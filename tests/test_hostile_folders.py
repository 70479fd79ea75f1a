"""Folders that were made to cost or to mislead are refused in one line, soon, before anything of their size is made."""
import json
import os
import random
import time
import tracemalloc

import pytest

import fuzz_folders
import make_tiny_checkpoints as tiny
import mpitp
from groups import group_fixture
from mpitp import InputError
from mpitp.checkpoints import room
from mpitp.checkpoints.json_files import read_json
from mpitp.checkpoints.model_folder import CheckpointWarning, open_folder
from mpitp.errors import printable
from mpitp.training.log import append_log, read_log

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
group = group_fixture("ordinary", scope="module")
alone = pytest.mark.launcher                    # nothing here depends on ranks
pytestmark = pytest.mark.host                   # nor on a device: what is read, and what it costs the host


def refused(folder, group):
    """The refusal, which costs at most ten times the folder's bytes plus 64 MiB, and 2 s of this process's time."""
    size = fuzz_folders.stored_bytes(folder)
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(InputError) as caught:
            mpitp.load_model(folder, group)
        took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert peak <= 10 * size + (64 << 20) and took < 10, (peak, size, took)     # tracing is several times as slow
    assert text == printable(text) and "found" in text and "expected" in text
    return text


def layers_of_nothing(folder, count, shape=(0,)):
    """Tensors without elements, as many as a config of many layers needs names."""
    header, data = fuzz_folders.headers(folder / FILE)
    for i in range(count):
        header[f"model.layers.{i}.x.weight"] = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}
    fuzz_folders.write_header(folder / FILE, header, data)


@alone
def test_thousands_of_layers(group, tmp_path):
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden, config={**golden["config"], "num_hidden_layers": 5000, "hidden_size": 1 << 16})
    layers_of_nothing(tmp_path, 5000)
    assert "num_hidden_layers = 5000, expected a positive integer, at most 4096" in refused(tmp_path, group)
    config = {**golden["config"], "num_hidden_layers": 2500}
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = time.process_time()
    with pytest.raises(InputError, match=r"model.layers.\*.mlp.up_proj.weight \(2498\)"):
        mpitp.load_model(tmp_path, group)
    assert time.process_time() - started < 10               # 2 on a machine of its own


@alone
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "head_dim"])
def test_the_axis_of_an_empty_tensor_is_no_size(group, tmp_path, key):
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden, config={**golden["config"], key: 1 << 40})
    layers_of_nothing(tmp_path, 1, (0, 1 << 40))
    assert f"found {key} = {1 << 40}, expected a positive integer, at most 65536" in refused(tmp_path, group)


@alone
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00003.safetensors"])
@pytest.mark.parametrize("kind, said", [("zero", "a device"), ("pipe", "a pipe"), ("folder", "directory"),
                                        ("loop", "Too many levels")])
def test_what_is_no_file(group, tmp_path, name, kind, said):
    tiny.write(tmp_path, tiny.load("llama"), shards=3)
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "zero" else name)
    if (name, kind) == (INDEX, "loop"):
        said = "No such file"                   # a link that leads nowhere is no index
    assert said in refused(tmp_path, group)


@alone
def test_json_that_costs(group, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    costly = {'{"a": [' + "[]," * 1_000_000 + "[]]}": "lists and objects",
              '{"a": "' + "x" * (1 << 24) + '"}': "found more than 16777216 bytes",
              '{"a": 1, "b": 2, "a": 1}': "found 'a' twice",
              '{"a": {"b": 1, "b\\u0000": 2, "b": 3}}': "found 'b' twice"}
    for text, said in costly.items():
        (tmp_path / "config.json").write_text(text)
        assert said in refused(tmp_path, group)


@alone
def test_names_print_as_they_are_spelt(group, tmp_path):
    """A name cannot forge a line of the program's own, nor move the cursor."""
    tiny.write(tmp_path, tiny.load("llama"))
    header, data = fuzz_folders.headers(tmp_path / FILE)
    header["x\nmpitp: every check holds\x1b[2J\u202e"] = header.pop("lm_head.weight")
    fuzz_folders.write_header(tmp_path / FILE, header, data)
    assert r"x\nmpitp: every check holds\x1b[2J\u202e" in refused(tmp_path, group)
    golden = tiny.load("llama")
    folder = tmp_path / "a\nb"
    tiny.write(folder, golden, config={**golden["config"], "a\x1b[31mkey": 1})
    with pytest.warns(CheckpointWarning) as caught:
        open_folder(folder).warn()
    assert all(printable(str(warning.message)) == str(warning.message) for warning in caught)
    assert all("\n" not in warning.filename for warning in caught)


@alone
def test_a_folder_larger_than_memory(group, tmp_path, monkeypatch):
    """What it needs is known from the headers: said before anything is made."""
    tiny.write(tmp_path, tiny.load("llama"))
    header, data = fuzz_folders.headers(tmp_path / FILE)
    rows, size = 1 << 32, 20 * (1 << 34)
    entry = header["lm_head.weight"]
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        old = header[name]["data_offsets"]
        for entry in header.values():
            if "data_offsets" in entry and entry["data_offsets"][0] >= old[1]:
                entry["data_offsets"] = [n + size - (old[1] - old[0]) for n in entry["data_offsets"]]
        header[name].update(shape=[rows, 20], data_offsets=[old[0], old[0] + size])
    text = json.dumps(header).encode()
    with open(tmp_path / FILE, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values() if "shape" in entry))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    assert "GiB of memory free on " in refused(tmp_path, group)
    monkeypatch.setattr(room, "free_bytes", lambda: None)       # where that is not known, nothing is refused
    tiny.write(tmp_path / "small", tiny.load("llama"))
    mpitp.load_model(tmp_path / "small", group)
    monkeypatch.setattr(room, "free_bytes", lambda: 10_000)
    assert "found 0.0 GiB of memory free" in refused(tmp_path / "small", group)


@alone
def test_an_error_of_the_disk_names_the_path(group, tmp_path, monkeypatch):
    tiny.write(tmp_path, tiny.load("llama"))

    def broken(*arguments):
        raise OSError(5, os.strerror(5))
    monkeypatch.setattr(os, "preadv", broken)
    assert refused(tmp_path, group) == f"{tmp_path / FILE}: found {os.strerror(5)}, expected to read it"
    monkeypatch.undo()
    model = mpitp.load_model(tmp_path, group)
    for name in ("fsync", "pwrite", "rename"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, broken)
            with pytest.raises(InputError, match=f"{tmp_path}/new.*: found {os.strerror(5)}, expected "):
                mpitp.save_model(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


@alone
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_log_that_is_no_file(tmp_path, kind):
    path = tmp_path / "log.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    for call in (lambda: append_log(tmp_path, 1, {}), lambda: read_log(tmp_path)):
        with pytest.raises(InputError, match=f"{path}: found "):
            call()


@alone
def test_a_log_without_end(tmp_path):
    (tmp_path / "log.jsonl").touch()
    os.truncate(tmp_path / "log.jsonl", 1 << 36)            # a sparse file
    with pytest.raises(InputError, match="log.jsonl: found a line of more than 65536 characters"):
        read_log(tmp_path)


@alone
def test_a_tokenizer_that_does_not_work():
    from mpitp.commands.tokenizing import encode

    class Panics:
        def encode(self, text, add_special_tokens):
            raise type("PanicException", (BaseException,), {})("index out of bounds\nmore")
    with pytest.raises(InputError, match="^tokenizer.json: found index out of bounds in a text, expected"):
        encode(Panics(), "x")


@alone
def test_a_byte_order_mark_is_no_part(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(str(tmp_path / "a.json")) == {"a": [1]}


# --- the fuzzer --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole_steps(group, tmp_path_factory):
    return fuzz_folders.make_steps(group, tmp_path_factory.mktemp("steps") / "run" / "whole")


CORPUS = sorted(fuzz_folders.CORPUS.glob("*.json"))


@alone
@pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
def test_what_once_was_a_finding(group, whole_steps, path):
    finding, _ = fuzz_folders.attempt(group, json.loads(path.read_text()), whole_steps)
    assert not finding, finding


@alone
def test_a_few_seconds_of_fuzzing(group, whole_steps):
    dice, deadline = random.Random(int(os.environ.get("MPITP_FUZZ_SEED", "1"))), time.monotonic() + 5
    while time.monotonic() < deadline:
        recipe = fuzz_folders.draw(dice)
        finding, _ = fuzz_folders.attempt(group, recipe, whole_steps)
        assert not finding, (recipe, finding)
