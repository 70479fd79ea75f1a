"""Dumps that cannot be judged: one line each, nothing guessed. And what the recorder takes."""
import json
import os

import numpy as np
import pytest

from judge_host import BF16, Host
from mpitp.court.dump import read_dump
from mpitp.court.layouts import make_layout
from mpitp.court.verdict import judge
from mpitp.errors import InputError
from mpitp.oracle import Recorder
from mpitp.oracle.recorder import to_numpy


@pytest.fixture
def dump(tmp_path):
    """A right dump of two ranks."""
    Host(tmp_path, 2, "mlp", {"activation": "relu"}).mlp(6, 9)
    return tmp_path


def change(folder, *keys, value):
    """Set one value of run.json, or take it away."""
    path = folder / "run.json"
    run = json.loads(path.read_text())
    inner = run
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(run))


def refused(folder, text):
    with pytest.raises(InputError) as error:
        verdict = judge(read_dump(folder))
        assert not verdict.unreadable, verdict.unreadable
    line = str(error.value)
    assert "\n" not in line and text in line and "found" in line and "expected" in line, line


@pytest.mark.parametrize("keys, value, text", [
    (("schema",), "mpitp.dump/9", "schema 'mpitp.dump/9'"), (("ranks",), 0, "ranks 0"), (("ranks",), "2", "ranks '2'"),
    (("ranks",), 10 ** 9, "ranks 1000000000"), (("grid",), {"tensor": 3}, "grid"), (("kind",), "moe", "kind 'moe'"),
    (("kind",), None, "kind ''"), (("accumulate",), "int8", "accumulate 'int8'"), (("config",), [1], "config"),
    (("config", "activation"), "swish", "activation 'swish'"), (("config", "experts"), 8, "config key 'experts'"),
    (("config", "num_layers"), 10 ** 8, "num_layers"), (("config", "norm_epsilon"), "1e-5", "norm_epsilon"),
    (("config", "rotary"), {"base": -1}, "rotary base"), (("config", "rotary"), {"speed": 1}, "rotary {'speed': 1}"),
    (("config", "hidden_size"), 2 ** 40, "config hidden_size"), (("options", "temperature"), 1, "option 'temperature'"),
    (("options", "label_smoothing"), 2, "label_smoothing 2"), (("options", "loss_scale"), 0, "loss_scale 0"),
    (("tensors",), {}, "no tensors"), (("tensors", "sideways"), {}, "phase 'sideways'"),
    (("tensors", "forward", "y"), {"layout": "shuffled"}, "layout 'shuffled'"),
    (("tensors", "forward", "y"), {"layout": "split", "axis": 7}, "axis 7"),
    (("tensors", "forward", "y"), None, "a tensor 'y' that run.json does not have"),
    (("tensors", "forward", "z"), {"layout": "replicated"}, "no tensor 'z'"),
    (("tensors", "forward", "x"), None, "a tensor 'x' that run.json does not have"),
    (("tensors", "backward", "up.weight", "ranges"), [[0, 5]], "1 ranges"),
    (("tensors", "backward", "up.weight", "ranges"), [[0, 5], [4, 8]], "overlap"),
    (("tensors", "backward", "up.weight", "ranges"), [[0, 5], [6, 10]], "no rank with [5, 6]"),
    (("tensors", "backward", "up.weight", "ranges"), [[0, 5], [5, 10]], "found 4 along its axis on rank 1"),
    (("tensors", "backward", "up.weight", "ranges"), [[0, 5], [9, 5]], "range [9, 5]"),
    (("tensors", "backward", "up.weight", "ranges"), [[0, 5], "all"], "range 'all'"),
    (("tensors", "backward", "up.weight"), {"layout": "replicated"}, "found shape (4, 6) on rank 1"),
    (("tensors", "backward", "up.weight", "axis"), 1, "the same but for axis 1"),
    (("tensors", "forward", "y"), {"layout": "split", "axis": 0}, "found whole shape"),
])
def test_what_run_json_may_not_say(dump, keys, value, text):
    change(dump, *keys, value=value)
    refused(dump, text)


def test_files_that_are_not_there(dump, tmp_path):
    refused(tmp_path / "nowhere", "no such folder")
    os.rename(dump / "forward-1.safetensors", dump / "kept")
    refused(dump, "found no forward-1.safetensors, expected one of each of 2 ranks")
    os.mkfifo(dump / "forward-1.safetensors")
    refused(dump, "found no forward-1.safetensors")
    os.remove(dump / "run.json")
    refused(dump, "run.json")


def test_files_that_are_damaged(dump):
    path = dump / "backward-0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    refused(dump, "backward-0.safetensors: found")
    path.write_bytes(b"\x80\x04pickle" + whole)
    refused(dump, "backward-0.safetensors: found a header of")
    path.write_bytes(whole)
    (dump / "run.json").write_text("{" * 100000)
    refused(dump, "not a JSON object")


def recorded(folder, forward=(), backward=(), reference=None, kind="column_linear", **more):
    recorder = Recorder(folder, 0, 1, kind, **more)
    for name, array in [("weight", np.ones((4, 3)))] if reference is None else reference:
        recorder.reference(name, array)
    for name, array in forward:
        recorder.forward(name, array)
    for name, array in backward:
        recorder.backward(name, array)
    recorder.save()
    return folder


X, Y = ("x", np.ones((2, 3))), ("y", np.full((2, 4), 3.0))


@pytest.mark.parametrize("made, text", [
    (dict(forward=[Y]), "no x in the forward phase"), (dict(forward=[X]), "no results"),
    (dict(forward=[X, Y], reference=[]), "no weight weight"),
    (dict(forward=[X, Y], reference=[("weight", np.ones((4, 5)))]), "found whole shape (4, 5), expected (4, 3)"),
    (dict(forward=[X, Y], reference=[("weight", np.ones((4, 3))), ("scale", np.ones(4))]), "a weight scale"),
    (dict(forward=[X, ("y", np.ones((2, 5)))]), "found whole shape (2, 5)"),
    (dict(forward=[X, Y, ("hidden", np.ones(3))]), "a tensor that a column_linear does not have"),
    (dict(forward=[X, Y], backward=[("weight", np.ones((4, 3)))]), "gradients but no y"),
    (dict(forward=[X, ("y", np.ones((2, 4), int))]), "found dtype I64, expected one of F64, F32, F16, BF16"),
    (dict(forward=[("x", np.array([[1, np.nan, 2], [1, 2, 3]])), Y]), "found nan at [0, 1] and 1 such number in all"),
    (dict(forward=[X, Y], reference=[("weight", np.full((4, 3), np.inf))]), "reference weight, rank 0: found inf at"),
    (dict(kind="embedding", forward=[("ids", np.array([4])), Y]), "ids: found 4, expected ids from 0 to 3"),
    (dict(kind="embedding", forward=[("ids", np.ones(2)), Y]), "found dtype F64, expected integers"),
    (dict(kind="loss", reference=[], forward=[("logits", np.ones((2, 4))), ("targets", np.array([1, 9])),
                                              ("loss", np.ones(()))]), "targets: found 9, expected ids from 0"),
    (dict(kind="loss", reference=[], forward=[("logits", np.ones((2, 4))), ("targets", np.array([1])),
                                              ("loss", np.ones(()))]), "targets (1,) for logits"),
    (dict(kind="attention", forward=[X, Y]), "no num_attention_heads"),
    (dict(kind="attention", forward=[X, Y], config={"num_attention_heads": 2, "num_query_groups": 3}),
     "num_query_groups"),
    (dict(kind="attention", forward=[("x", np.ones((1, 2, 4))), Y], reference=[],
          config={"num_attention_heads": 2, "hidden_size": 8}), "x of 4 features"),
    (dict(kind="norm", forward=[("x", np.ones((2, 0))), Y]), "features"),
])
def test_tensors_that_do_not_fit(tmp_path, made, text):
    refused(recorded(tmp_path, **made), text)


def test_not_a_number_in_a_result_is_named_and_what_is_before_it_judged(tmp_path):
    folder = recorded(tmp_path, [X, Y], [("dy", np.ones((2, 4))), ("weight", np.full((4, 3), np.nan)),
                                         ("dx", np.ones((2, 3)))])
    verdict = judge(read_dump(folder))
    assert "backward weight, rank 0: found nan at [0, 0] and 12 such numbers" in verdict.unreadable
    assert "\n" not in verdict.unreadable
    assert [(row.title, row.verdict) for row in verdict.rows] == [("x", "right"), ("dy", "right"), ("y", "right")]


def test_sizes_without_bytes_are_refused(tmp_path):
    """A tensor of 0 numbers may claim any other axis; no index of it is made."""
    text = json.dumps({"x": {"dtype": "F64", "shape": [0, 2 ** 50], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "forward-0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    layout = {"layout": "split", "axis": 1, "ranges": [[0, 2 ** 50]]}
    (tmp_path / "run.json").write_text(json.dumps({"schema": "mpitp.dump/1", "ranks": 1, "kind": "norm",
                                                   "tensors": {"forward": {"x": layout}}}))
    refused(tmp_path, "along an axis")


def test_ranges_of_shared_heads_may_overlap():
    """Two ranks hold the heads that their query heads use; of anything else, that is a mistake in the dump."""
    entry = {"layout": "split", "axis": 0, "ranges": [[0, 2], [0, 4]]}
    layout = make_layout("backward attention.key.weight", entry, [(2, 3), (4, 3)])
    assert layout.shape == (4, 3) and [part.tolist() for part in layout.parts] == [[0, 1], [0, 1, 2, 3]]
    with pytest.raises(InputError, match="overlap"):
        make_layout("backward attention.query.weight", entry, [(2, 3), (4, 3)])


# --- the recorder ------------------------------------------------------------------------------------------------

class Foreign:
    """An array of another framework: only __dlpack__."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Bfloat16:
    """An array as a framework has it whose BF16 NumPy does not know: it can be widened."""
    dtype = "framework.bfloat16"

    def __init__(self, array):
        self.array = array

    def float(self):
        return self.array


def test_arrays_of_other_frameworks():
    array = np.arange(6.0).reshape(2, 3)
    for given in (array, Foreign(array), array.tolist(), np.asfortranarray(array)):
        dtype, copy = to_numpy(given)
        assert dtype == "F64" and np.array_equal(copy, array) and copy.flags.c_contiguous
    dtype, copy = to_numpy(array)
    array[0, 0] = 7
    assert copy[0, 0] == 0                                      # a copy: what is changed later is not recorded
    dtype, copy = to_numpy(Bfloat16(np.float32([1.5, -2.0])))
    assert dtype == "BF16" and copy.dtype == np.uint16 and copy.tolist() == [0x3fc0, 0xc000]
    if BF16 is not None:
        dtype, copy = to_numpy(np.array([1.5, -2.0], BF16))
        assert dtype == "BF16" and copy.tolist() == [0x3fc0, 0xc000]


def test_what_the_recorder_refuses(tmp_path):
    with pytest.raises(ValueError, match="rank 2"):
        Recorder(tmp_path, 2, 2, "mlp")
    recorder = Recorder(tmp_path, 0, 2, "mlp")
    recorder.forward("x", np.ones(3))
    for call, text in ((lambda: recorder.forward("x", np.ones(3)), "'x' twice"),
                       (lambda: recorder.record("sideways", "x", np.ones(3)), "phase 'sideways'"),
                       (lambda: recorder.forward("y", np.ones(3), axis=0, partial=True), "partial and split"),
                       (lambda: recorder.forward("y", np.ones(3, complex)), "dtype complex128")):
        with pytest.raises(ValueError, match=text):
            call()


def test_the_recorder_needs_numpy_alone():
    """It is one file to copy: nothing of mpitp, and no package but NumPy, is imported in it."""
    import ast
    from mpitp.oracle import recorder
    with open(recorder.__file__) as file:
        tree = ast.parse(file.read())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "collections.abc", "dataclasses", "json", "numpy", "os", "typing"}


def test_its_files_are_safetensors(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    recorded(tmp_path, [X, Y])
    found = numpy_files.load_file(tmp_path / "forward-0.safetensors")
    assert found.keys() == {"x", "y"} and np.array_equal(found["x"], X[1])
