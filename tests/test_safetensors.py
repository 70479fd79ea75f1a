"""The reader against the format's own library, and against hostile files."""
import json
import os
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mpitp.errors import InputError
from mpitp.checkpoints.safetensors import Checkpoint, SafetensorsFile

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@settings(derandomize=True, deadline=None, database=None, max_examples=25,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_equal_those_of_the_library(dtype, data, tmp_path):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
    values = np.asarray(np.random.default_rng(0).standard_normal(shape) * 50).astype(dtype)
    save_file({"a": np.ones((2, 3), "f"), "w": values, "z": np.zeros(0, "f")}, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    tensor = file["w"]
    window = []
    for n in shape:
        a = data.draw(st.integers(0, n))
        window.append(slice(a, data.draw(st.integers(a, n))))
    found = tensor[tuple(window)]
    wide = np.float32 if dtype in (np.float16, ml_dtypes.bfloat16) else dtype
    expected = values[tuple(window)].astype(wide)
    assert tensor.shape == shape and found.dtype == np.dtype(wide) and found.tobytes() == expected.tobytes()
    assert found.flags.c_contiguous and found.flags.writeable
    assert file.bytes_read == expected.size * np.dtype(dtype).itemsize


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=["F16", "BF16", "F32"])
def test_reading_makes_no_second_copy(dtype, tmp_path):
    values = np.random.default_rng(0).standard_normal((700, 1024), "f").astype(dtype)
    save_file({"w": values}, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    for window in [(slice(100, 600),), (slice(0, 700), slice(1, 800)), (slice(0, 1),), (3,), (3, 4), ()]:
        tracemalloc.start()
        found = file["w"][window]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        expected = np.asarray(values[window]).astype("f")
        assert found.shape == expected.shape and found.tobytes() == expected.tobytes()
        assert peak < found.nbytes + 200_000            # the 16-bit copy of the largest would be 1.1 MB


def test_every_bit_pattern_of_16_bits(tmp_path):
    patterns = np.arange(1 << 16, dtype=np.uint16)
    save_file({"f": patterns.view(np.float16), "b": patterns.view(ml_dtypes.bfloat16)}, tmp_path / "t.safetensors")
    file = SafetensorsFile(tmp_path / "t.safetensors")
    assert np.array_equal(file["b"][:].view(np.uint32), patterns.astype(np.uint32) << 16)       # every NaN its own bits
    assert np.array_equal(file["f"][:], patterns.view(np.float16).astype("f"), equal_nan=True)


def test_tensors_at_odd_offsets(tmp_path):
    values = np.arange(3, dtype="<f4")
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13], "a key of tomorrow": 1}}
    (tmp_path / "m").write_bytes(raw(header, b"\7" + values.tobytes()))
    assert list(SafetensorsFile(tmp_path / "m")["b"][1:]) == [1, 2]


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}


def raw(header, data=b"\0" * 12, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def changed(name, **values):
    return {**GOOD, name: {**GOOD[name], **values}}


HOSTILE = {
    "empty": (b"", "a file of 0 bytes"),
    "short": (b"\1\2\3", "a file of 3 bytes"),
    "header longer than the file": (raw(GOOD, length=1 << 20), "a header of 1048576 bytes"),
    "header beyond the limit": (raw(GOOD, length=1 << 62), "a header of"),
    "not json": (raw(b"{nonsense"), "not JSON"),
    "not unicode": (raw(b'{"\xff": 1}'), "not JSON"),
    "utf-16": (raw(json.dumps(GOOD).encode("utf-16")), "not JSON"),
    "a number of 5000 digits": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "metadata that is a number": (raw({**GOOD, "__metadata__": 3}), "__metadata__"),
    "metadata that nests": (raw({**GOOD, "__metadata__": {"a": {}}}), "__metadata__"),
    "a list": (raw([1]), "JSON list"),
    "deep": (raw(b"[" * 100_000), "not JSON"),
    "a key twice": (raw(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "a": {}}'), "'a' twice"),
    "a shape twice": (raw(b'{"a": {"dtype": "F32", "shape": [9], "shape": [3], "data_offsets": [0, 12]}}'),
                      "'shape' twice"),
    "an entry that is none": (raw({"a": 3}), "'a': 3"),
    "an unknown dtype": (raw(changed("a", dtype="F8_E4M3")), "dtype 'F8_E4M3' of 'a'"),
    "a dtype that is a list": (raw(changed("a", dtype=["F32"])), "dtype"),
    "a negative size": (raw(changed("a", shape=[-2])), "shape [-2] of 'a'"),
    "a size that is a fraction": (raw(changed("a", shape=[2.0])), "shape [2.0]"),
    "a size that is a truth": (raw(changed("a", shape=[True, 2])), "shape"),
    "a product that would overflow": (raw(changed("a", shape=[1 << 40, 1 << 40])), "product below 2**60"),
    "a product that would take hours": (raw(changed("a", shape=[1 << 62] * 100_000)), "product below 2**60"),
    "nothing, of a shape that NumPy cannot hold":
        (raw(changed("a", shape=[0, 1 << 40, 1 << 40])), "product below 2**60"),
    "more axes than NumPy has": (raw(changed("a", shape=[2] + [1] * 70)), "at most 32 sizes"),
    "a name of a megabyte": (raw({"n" * 1_000_000: {**GOOD["a"], "shape": [-1]}}), "nnn"),
    "offsets that are swapped": (raw(changed("a", data_offsets=[8, 0])), "data_offsets [8, 0]"),
    "three offsets": (raw(changed("a", data_offsets=[0, 8, 9])), "data_offsets"),
    "a gap": (raw(changed("b", data_offsets=[9, 13]), b"\0" * 13), "'b' at offset 9, expected 8"),
    "an overlap": (raw(changed("b", data_offsets=[4, 8])), "'b' at offset 4, expected 8"),
    "a size that does not fit": (raw(changed("b", shape=[2])), "4 bytes of 'b', expected 8"),
    "truncated": (raw(GOOD, b"\0" * 11), "where its last tensor ends"),
    "too long": (raw(GOOD, b"\0" * 13), "where its last tensor ends"),
}


STRICTER = {"more axes than NumPy has"}        # what the format's own library takes


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_files(fault, tmp_path):
    content, said = HOSTILE[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and said in text and "expected" in text and "\n" not in text and len(text) < 600
    if fault not in STRICTER:
        with pytest.raises(SafetensorError):            # the format's own library refuses it too
            safe_open(path, "np")


def test_the_good_one(tmp_path):
    (tmp_path / "m").write_bytes(raw({"__metadata__": {"format": "pt"}, **GOOD}, np.arange(3, dtype="<f4").tobytes()))
    file = SafetensorsFile(tmp_path / "m")
    assert list(file["a"][:]) == [0, 1] and list(file["b"][:]) == [2]
    with pytest.raises(InputError, match="no tensor 'c'"):
        file["c"]
    with pytest.raises(InputError, match="No such file"):
        SafetensorsFile(tmp_path / "missing")


@pytest.mark.parametrize("index, said", [
    ("{", "not a JSON object"), ("[1]", "not a JSON object"), ("{}", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": {"a": 3}}', "no weight_map"), ('{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors'"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "/etc/passwd"), ('{"weight_map": {"a": ".."}}', "'..'"),
    ('{"weight_map": {"a": "s.safetensors\\u0000"}}', "expected a file of the same folder"),
    ('{"weight_map": {"a": "\\ud800"}}', "expected a file of the same folder"),
    ('{"weight_map": {"a": "a\\nb"}}', "expected a file of the same folder"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "No such file"),
    ('{"weight_map": {"b": "s.safetensors"}}', "no 'b' in s"),
])
def test_hostile_indexes(index, said, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.ones(2, "f")}, tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert said in str(caught.value) and "expected" in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Checkpoint(tmp_path / "gone")
    with pytest.raises(InputError, match="config.json: found No such file"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model.safetensors: found No such file"):
        Checkpoint(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 134517304\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_git_lfs_pointers(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.ones(2, "f")}, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=f"{name}: found a Git LFS pointer in place of the file, .*: git lfs pull"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content, said", [
    (b'\xef\xbb\xbf{"a": 1}', None), ('{"a": 1}'.encode("utf-16"), "found UTF-16, by its byte order mark"),
    (b'{"a": "\xff"}', "found bytes that are not UTF-8 at 7"), (b"\xef\xbb\xbf[1]", "not a JSON object"),
])
def test_byte_order_marks(content, said, tmp_path):
    save_file({"a": np.ones(2, "f")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    if said is None:
        assert Checkpoint(tmp_path).config == {"a": 1}
    else:
        with pytest.raises(InputError, match=said):
            Checkpoint(tmp_path)


def sharded(folder, count):
    """A checkpoint of as many shards, one tensor in each."""
    (folder / "config.json").write_text("{}")
    where = {f"t{i}": f"s{i}.safetensors" for i in range(count)}
    for i, (tensor, name) in enumerate(where.items()):
        save_file({tensor: np.full(3, i, "f")}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("room", [50, 12])
def test_more_shards_than_open_files(room, tmp_path):
    """Few are open at a time, fewer where the process may have no more; and none once nobody needs them."""
    sharded(tmp_path, 90)
    before = set(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + room, limits[1]))
    try:
        checkpoint = Checkpoint(tmp_path)
        for i in [*range(90), *range(0, 90, 7), *reversed(range(90))]:
            assert checkpoint[f"t{i}"][:].tolist() == [i] * 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 40
    del checkpoint
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1


def test_a_file_that_is_replaced_meanwhile(tmp_path):
    sharded(tmp_path, 2)
    checkpoint = Checkpoint(tmp_path)
    os.rename(tmp_path / "s1.safetensors", tmp_path / "s0.safetensors")
    with pytest.raises(InputError, match="s0.safetensors: found another file than the one that was checked"):
        checkpoint["t0"][:]


def test_an_error_of_the_disk_while_slices_are_read(tmp_path, monkeypatch):
    """It is one line; the array that was to be filled must not be computed with."""
    sharded(tmp_path, 1)
    checkpoint = Checkpoint(tmp_path)

    def broken(descriptor, buffers, offset):
        raise OSError(5, os.strerror(5))
    monkeypatch.setattr(os, "preadv", broken)
    for read in (lambda: checkpoint["t0"][:], lambda: checkpoint["t0"].read(slice(1, 3), np.empty(2, "f8"))):
        with pytest.raises(InputError, match="s0.safetensors: found Input/output error, expected to read it"):
            read()
