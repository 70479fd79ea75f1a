"""Saved checkpoints: the bytes that were loaded, for every family and any number of ranks; nothing half-written."""
import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import make_tiny_checkpoints as tiny
import mpitp
from mpitp import InputError
from mpitp.checkpoints import folders
from mpitp.checkpoints.model_folder import open_folder
from mpitp.checkpoints.tensor_writer import narrowed
from spmd import everywhere
from test_load_model import LARGER, write_larger

# What the file of each case hashes to, from one rank: the same from any number of them.
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@pytest.fixture
def shared(world, tmp_path):
    """One folder for all ranks."""
    return Path(world.bcast(str(tmp_path)))


def written(world, folder, *arguments, **options):
    """tiny.write by one rank, seen by all."""
    if world.rank == 0:
        tiny.write(folder, *arguments, **options)
    world.barrier()


@pytest.mark.parametrize("case", [case for case in tiny.CASES if case != "gemma3"])      # saved as another family
def test_what_was_loaded_is_saved(group, world, case, shared):
    if group.size > 1 and group.reproducible:
        return                                              # nothing is computed
    golden = tiny.load(case)
    written(world, shared / "a", golden)
    model = mpitp.load_model(shared / "a", group)
    mpitp.save_model(model, shared / "b")
    a, b = (load_file(shared / folder / "model.safetensors") for folder in "ab")
    assert a.keys() == b.keys() and all(a[name].dtype == b[name].dtype for name in a)
    assert everywhere(all(a[name].tobytes() == b[name].tobytes() for name in a))
    assert json.loads((shared / "b" / "config.json").read_text()) == golden["config"]
    again = mpitp.load_model(shared / "b", group)
    assert everywhere(all(w.tobytes() == again.weights[name].tobytes() for name, w in model.weights.items()))
    world.barrier()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("case", ["gpt2", "falcon_40b", "qwen2"])
def test_dtypes(group, world, case, dtype, shared):
    """Numbers that 16 bits hold come back as they were, from any of them, whatever the model computes in."""
    golden = tiny.load(case)
    written(world, shared / "a", golden, {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype], 2)
    model = mpitp.load_model(shared / "a", group, "float64")
    mpitp.save_model(model, shared / "b", NAMES[dtype])
    found, expected = load_file(shared / "b" / "model.safetensors"), tiny.tensors(golden)
    assert {w.dtype.name for w in found.values()} == {NAMES[dtype]}
    assert all(np.array_equal(found[name].astype("f"), expected[name]) for name in expected)
    assert json.loads((shared / "b" / "config.json").read_text())["dtype"] == NAMES[dtype]
    mpitp.save_model(model, shared / "c")
    assert {w.dtype.name for w in load_file(shared / "c" / "model.safetensors").values()} == {"float64"}
    world.barrier()


@pytest.mark.parametrize("case", tiny.CASES)
def test_a_model_of_ones_own(group, world, case, shared):
    """A config.json made from nothing but the DecoderConfig says the same; and the model is the same again."""
    if group.size > 1 and group.reproducible:
        return                                              # where slices lie is all that differs
    golden = tiny.load(case)
    config = open_folder_config(golden, shared / "a", world)
    model = mpitp.Decoder(group, config, seed=3)
    mpitp.save_model(model, shared / "b", family=golden["config"]["model_type"])
    again = mpitp.load_model(shared / "b", group)
    assert everywhere(all(w.tobytes() == again.weights[name].tobytes() for name, w in model.weights.items()))
    ids = np.array([golden["ids"]])
    assert model.forward(ids, save=False)[0].tobytes() == again.forward(ids, save=False)[0].tobytes()
    world.barrier()


def open_folder_config(golden, folder, world):
    written(world, folder, golden)
    return open_folder(folder).config


def test_a_loaded_model_as_another_family(group, world, shared):
    written(world, shared / "a", tiny.load("llama"))
    model = mpitp.load_model(shared / "a", group)
    mpitp.save_model(model, shared / "b", "bfloat16", family="mistral")
    again = mpitp.load_model(shared / "b", group)
    assert again.folder.family.model_type == "mistral" and again.config.rotary == model.config.rotary
    assert everywhere(all(w.tobytes() == again.weights[name].tobytes() for name, w in model.weights.items()))
    world.barrier()


def test_the_same_file_from_any_number_of_ranks(world, shared):
    """Those of ranks 0, of 0 and 1, ... of all: one hash."""
    written(world, shared / "a", tiny.load("falcon_40b"))
    hashes = []
    for size in range(1, world.size + 1):
        part = world.Split(0 if world.rank < size else 1)
        if world.rank < size:
            with mpitp.TensorParallelGroup(part) as group:
                mpitp.save_model(mpitp.load_model(shared / "a", group), shared / f"from {size}")
        part.Free()
        world.barrier()
        hashes.append(hashlib.sha256((shared / f"from {size}" / "model.safetensors").read_bytes()).hexdigest())
    assert len(set(hashes)) == 1


def test_the_header_is_aligned_and_data_as_the_library_wants_it(group, world, shared):
    from safetensors import safe_open
    written(world, shared / "a", tiny.load("llama"))
    mpitp.save_model(mpitp.load_model(shared / "a", group), shared / "b")
    file = shared / "b" / "model.safetensors"
    assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 8 == 0
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    world.barrier()


def test_companions_come_along(group, world, shared):
    written(world, shared / "a", tiny.load("llama"))
    if world.rank == 0:
        (shared / "a" / "tokenizer.json").write_text("{}")
        (shared / "a" / "pytorch_model.bin").write_text("not this")
    world.barrier()
    mpitp.save_model(mpitp.load_model(shared / "a", group), shared / "b")
    assert sorted(os.listdir(shared / "b")) == ["config.json", "model.safetensors", "tokenizer.json"]
    world.barrier()


def test_refusals(group, world, shared):
    written(world, shared / "a", tiny.load("llama"))
    model = mpitp.load_model(shared / "a", group)
    before = sorted(os.listdir(shared))
    world.barrier()
    for path, dtype, said in [(shared / "a", None, "expected a path where nothing is"),
                              (shared / "gone" / "b", None, "expected one"), (shared / "b", "int8", "dtype 'int8'")]:
        with pytest.raises(InputError, match=said):
            mpitp.save_model(model, path, dtype)
        world.barrier()
        assert sorted(os.listdir(shared)) == before
    fresh = mpitp.Decoder(group, model.config)
    for family, said in [(None, "a model that load_model did not make, expected family, one of gpt2"),
                         ("novel", "found model_type 'novel'"), ("gpt2", "expected"),
                         ("bloom", "as model_type bloom has it"),
                         ("qwen2", "found qkv_bias = False, expected True, as model_type qwen2 has it")]:
        with pytest.raises(InputError, match=said):
            mpitp.save_model(fresh, shared / "b", family=family)


@pytest.mark.parametrize("positions", ["learned", "alibi", "none"])
def test_a_family_with_rotary_positions_refuses_others(group, shared, positions):
    config = mpitp.DecoderConfig(11, 8, 1, 2, position_embedding=positions, max_position_embeddings=16,
                                 sliding_window=4)
    for family in ("gemma3_text", "llama"):
        with pytest.raises(InputError, match=f"as model_type {family} has it"):
            mpitp.save_model(mpitp.Decoder(group, config), shared / "b", family=family)


def test_a_rank_that_cannot_write(group, world, shared, monkeypatch):
    """Every rank raises, and nothing is left."""
    written(world, shared / "a", tiny.load("llama"))
    model = mpitp.load_model(shared / "a", group)
    if world.rank == world.size - 1:
        def full(self, array, offset):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(folders.TensorWriter, "write_all", full)
    with pytest.raises(InputError, match="No space left on device"):
        mpitp.save_model(model, shared / "b")
    world.barrier()
    assert sorted(os.listdir(shared)) == ["a"]


def test_what_an_ended_save_left(group, world, shared):
    written(world, shared / "a", tiny.load("llama"))
    model = mpitp.load_model(shared / "a", group)
    if world.rank == 0:
        (shared / "b.partial").mkdir()
    world.barrier()
    with pytest.raises(InputError, match="b.partial: found File exists.*may be removed"):
        mpitp.save_model(model, shared / "b")
    assert sorted(os.listdir(shared)) == ["a", "b.partial"]
    world.barrier()


@pytest.mark.host
@pytest.mark.parametrize("case", LARGER)
def test_peak_memory(group, world, case, shared):
    if world.rank == 0:
        write_larger(shared / "a", case)
    world.barrier()
    model = mpitp.load_model(shared / "a", group)
    tracemalloc.start()
    mpitp.save_model(model, shared / "b", "bfloat16")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert everywhere(peak < 1_000_000)                 # the embedding alone is 1.5 MB in 16 bits
    a, b = (load_file(shared / folder / "model.safetensors") for folder in "ab")
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    world.barrier()


def test_rounding_to_16_bits():
    """As ml_dtypes does it: every float32 pattern near a tie, infinities, NaNs."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(np.float32)
        found = narrowed(values, "BF16").view(ml_dtypes.bfloat16)
        with np.errstate(invalid="ignore"):
            expected = values.astype(ml_dtypes.bfloat16)
        nan = np.isnan(values)
        assert np.array_equal(found[~nan].view(np.uint16), expected[~nan].view(np.uint16))
        assert np.isnan(found[nan].astype("f")).all()
