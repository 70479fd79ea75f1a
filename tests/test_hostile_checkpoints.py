"""Damaged and hostile folders: one clear error on every rank, or the weights that the format's own library reads.

No crash, no hang, and nothing made of a size that only the header or the config claims.
"""
import json
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from safetensors import SafetensorError
from safetensors.numpy import load_file

import make_tiny_checkpoints as tiny
import mpitp
from groups import group_fixture
from mpitp import InputError
from mpitp.checkpoints.families.layout import View
from spmd import everywhere

QUICK = settings(derandomize=True, deadline=None, database=None, max_examples=60 if MPI.COMM_WORLD.size == 1 else 20,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CASES = {"llama": np.float32, "gpt2": ml_dtypes.bfloat16, "falcon_40b": np.float32}
MOST_BYTES, MOST_SECONDS = 3_000_000, 20                        # the files have up to 30 thousand


group = group_fixture("ordinary", scope="module")


class InMemory:
    """What View reads from: an array of the reference library."""

    def __init__(self, array):
        self.array, self.dtype = array, "F32"

    def read(self, window, out):
        out[...] = self.array[window].astype("f")


def outcome(group, folder):
    """Load it. The InputError's text, or None where every weight is what the reference library reads."""
    tracemalloc.start()
    started = time.process_time()
    try:
        model, said = mpitp.load_model(folder, group), None
    except InputError as error:
        model, said = None, str(error)
    took, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    good = took < MOST_SECONDS and peak < MOST_BYTES
    if said is not None:
        good = good and "found" in said and "expected" in said and "\n" not in said and len(said) < 2000
    else:
        stored = {}
        for name in model.folder.checkpoint.files:
            stored.update(load_file(folder / name))
        for name, spec in model.specs.items():
            layout = model.folder.layouts[name]
            window = spec.window(group.place)
            expected = View({name: InMemory(stored[name]) for name in layout.names}, layout)[window]
            good = good and model.weights[name].tobytes() == expected.tobytes()
    assert everywhere(good), (said, took, peak)
    return said


def flipped(content, bits):
    content = bytearray(content)
    for bit in bits:
        content[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(content)


@pytest.mark.parametrize("case", CASES)
@QUICK
@given(keep=st.integers(0, 1 << 20))
@example(keep=0)
@example(keep=7)
@example(keep=8)
def test_truncated(group, case, keep, tmp_path):
    tiny.write(tmp_path, tiny.load(case), CASES[case])
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:keep % len(content)])
    assert outcome(group, tmp_path)


@pytest.mark.parametrize("case", CASES)
@QUICK
@given(bits=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4), header=st.booleans())
def test_flipped_bits(group, case, bits, header, tmp_path):
    tiny.write(tmp_path, tiny.load(case), CASES[case])
    content = (tmp_path / FILE).read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    changed = flipped(content[:size], bits) + content[size:] if header else flipped(content, bits)
    (tmp_path / FILE).write_bytes(changed)
    said = outcome(group, tmp_path)
    try:
        load_file(tmp_path / FILE)
    except SafetensorError:
        assert said                                             # what the library refuses we do not load


@QUICK
@given(bits=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=3), which=st.sampled_from([INDEX, "config.json"]))
def test_flipped_bits_of_json(group, bits, which, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"), shards=3)
    path = tmp_path / which
    path.write_bytes(flipped(path.read_bytes(), bits))
    outcome(group, tmp_path)


NASTY = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 100), st.sampled_from([1 << 31, 1 << 40, 1 << 62, 10 ** 30, -1 << 63]),
    st.floats(), st.text(max_size=8), st.lists(st.integers(0, 3), max_size=3), st.just({}), st.just([[]] * 50),
    st.just({"rope_type": "yarn"}), st.just({"rope_type": "linear", "factor": 0.0}))


@pytest.mark.parametrize("case", ["llama3_biases", "gpt2", "gemma3_text", "falcon_40b", "gpt_neox", "bloom", "qwen2"])
@QUICK
@given(data=st.data())
def test_hostile_configs(group, case, data, tmp_path):
    golden = tiny.load(case)
    config = dict(golden["config"])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True)):
        config[key] = data.draw(NASTY)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope and data.draw(st.booleans()):
        config["rope_parameters"] = {**rope, data.draw(st.sampled_from(sorted(rope))): data.draw(NASTY)}
    tiny.write(tmp_path, golden, config=config)
    outcome(group, tmp_path)


@QUICK
@given(data=st.data())
def test_hostile_indexes(group, data, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"), shards=3)
    index = json.loads((tmp_path / INDEX).read_text())
    where = index["weight_map"]
    for name in data.draw(st.lists(st.sampled_from(sorted(where)), min_size=1, max_size=3)):
        change = data.draw(st.sampled_from(["elsewhere", "gone", "renamed", "nasty"]))
        if change == "elsewhere":
            where[name] = data.draw(st.sampled_from(sorted(set(map(str, where.values())) |
                                                           {"../x.safetensors", "/dev/zero", "config.json", ".", ""})))
        elif change == "gone":
            where.pop(name, None)
        elif change == "renamed" and name in where:
            where[data.draw(st.text(max_size=20))] = where.pop(name)
        else:
            where[name] = data.draw(NASTY)
    (tmp_path / INDEX).write_text(json.dumps(index))
    outcome(group, tmp_path)


def headed(header, data=b""):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("shape", [[1 << 59], [1 << 30, 1 << 29], [0, 1 << 40], [1 << 40, 0]])
def test_a_header_that_claims_much(group, shape, tmp_path):
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden)
    elements = int(np.prod(shape, dtype=object))
    (tmp_path / FILE).write_bytes(headed({"model.embed_tokens.weight": {
        "dtype": "F32", "shape": shape, "data_offsets": [0, 4 * elements]}}))
    assert outcome(group, tmp_path)


@pytest.mark.parametrize("size", [1 << 16, 1 << 20, 1 << 33])
@pytest.mark.parametrize("case, key", [
    ("llama", "vocab_size"), ("llama", "hidden_size"), ("llama", "intermediate_size"), ("llama", "num_attention_heads"),
    ("llama", "num_key_value_heads"), ("llama", "head_dim"), ("llama", "num_hidden_layers"), ("qwen3", "head_dim"),
    ("gpt2", "n_positions"), ("gpt2", "n_embd"), ("gpt2", "n_head"), ("bloom", "n_head"),
    ("falcon_40b", "num_kv_heads"),
])
def test_a_config_that_claims_much(group, case, key, size, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden, config={**golden["config"], key: size})
    assert outcome(group, tmp_path)


def test_more_layers_than_there_are(group, tmp_path):
    """As many as there are tensors: still nothing of their size is made."""
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden, config={**golden["config"], "num_hidden_layers": len(golden["tensors"])})
    assert "found no model.layers.*.input_layernorm.weight (19), " in outcome(group, tmp_path)


def test_a_file_that_is_cut_short_while_it_is_read(group, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    from mpitp.checkpoints import loading, model_folder
    looked = model_folder.open_folder(tmp_path)
    content = (tmp_path / FILE).read_bytes()
    with open(tmp_path / FILE, "r+b") as file:
        file.truncate(len(content) // 2)
    model = mpitp.Decoder(group, looked.config, seed=None)
    with pytest.raises(InputError, match="cut short"):
        loading.read_slices(looked, model)
