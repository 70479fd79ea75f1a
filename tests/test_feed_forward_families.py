"""The feed-forward block of one layer out of checkpoints, as `verify --model DIR --layer N` takes it."""
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import make_tiny_checkpoints as tiny
import mpitp
from groups import group_fixture
from check_layers import over_the_limit
from mpitp import InputError
from mpitp.checkpoints.loading import feed_forward
from mpitp.checkpoints.safetensors import Checkpoint
from spmd import draw, job

# Names of (up, gate, down) in layer 1, and whether they are stored [in, out].
STORED = {
    "llama": ("model.layers.1.mlp.{}_proj", ("up", "gate", "down"), False),
    "llama3_biases": ("model.layers.1.mlp.{}_proj", ("up", "gate", "down"), False),
    "gemma3_text": ("model.layers.1.mlp.{}_proj", ("up", "gate", "down"), False),
    "gpt2": ("transformer.h.1.mlp.{}", ("c_fc", None, "c_proj"), True),
    "gpt_neox": ("gpt_neox.layers.1.mlp.{}", ("dense_h_to_4h", None, "dense_4h_to_h"), False),
    "falcon_40b": ("transformer.h.1.mlp.{}", ("dense_h_to_4h", None, "dense_4h_to_h"), False),
    "bloom": ("transformer.h.1.mlp.{}", ("dense_h_to_4h", None, "dense_4h_to_h"), False),
}
ACTIVATIONS = {"llama": "silu", "llama3_biases": "silu", "gemma3_text": "gelu_tanh", "gpt2": "gelu_tanh",
               "gpt_neox": "gelu", "falcon_40b": "gelu", "bloom": "gelu_tanh"}


group = group_fixture("ordinary", scope="module")


def dense_block(case):
    """{name of ParallelMLP: array} of layer 1, by the names above."""
    pattern, names, transposed = STORED[case]
    stored, dense = tiny.tensors(tiny.load(case)), {}
    for part, theirs in zip(("up", "gate", "down"), names):
        for kind in ("weight", "bias"):
            w = stored.get(f"{pattern.format(theirs)}.{kind}")
            if w is not None:
                dense[f"{part}.{kind}"] = np.ascontiguousarray(w.T) if transposed and kind == "weight" else w
    return dense


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("case", STORED)
def test_the_block_equals_dense(group, case, dtype, tmp_path):
    dense = dense_block(case)
    tiny.write(tmp_path, tiny.load(case), dtype, shards=1 if dtype == np.float32 else 3)
    checkpoint = Checkpoint(tmp_path)
    found = feed_forward(checkpoint, 1)
    assert checkpoint.bytes_read == 0
    assert found.activation == ACTIVATIONS[case] and found.weights.keys() == dense.keys()
    assert (found.gated, found.bias) == ("gate.weight" in dense, "up.bias" in dense)
    layer = mpitp.ParallelMLP(group, found.hidden_size, found.ffn_hidden_size, found.activation, found.gated,
                              found.bias, seed=None)
    layer.load_dense(found.weights)
    assert checkpoint.bytes_read == layer.local_bytes() * np.dtype(dtype).itemsize // 4     # its slices, once
    x, dy = draw(1, 5, found.hidden_size, dtype="f"), draw(2, 5, found.hidden_size, dtype="f")
    y, saved = layer.forward(x)
    dx, _ = layer.backward(dy, saved)
    assert over_the_limit({"y": y, "dx": dx}, x, dy, dense, found.activation, found.gated) == []
    gathered = layer.gather()
    assert gathered is None or all(gathered[name].tobytes() == dense[name].tobytes() for name in dense)


@pytest.mark.parametrize("layer", [-1, 2, 10 ** 9])
def test_a_layer_that_does_not_exist(layer, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    with pytest.raises(InputError, match=f"found layer {layer}, expected 0 to 1"):
        feed_forward(Checkpoint(tmp_path), layer)


@pytest.mark.parametrize("changes, said", [
    (dict(hidden_act="softplus"), "found hidden_act = 'softplus', expected one of relu"),
    (dict(hidden_size=21), r"found shape \(37, 20\), expected \(37, 21\) by config.json"),
    (dict(model_type="novel"), "found model_type 'novel', expected one of gpt2"),
    (dict(intermediate_size=24), r"mlp.up_proj.weight: found shape \(23, 20\), expected \(24, 20\)"),
])
def test_what_loading_refuses(changes, said, tmp_path):
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden, config={**golden["config"], **changes})
    with pytest.raises(InputError, match=said):
        feed_forward(Checkpoint(tmp_path), 0)


def test_a_projection_that_is_missing(tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="found no model.layers.1.mlp.down_proj.weight"):
        feed_forward(Checkpoint(tmp_path), 0)


@pytest.mark.launcher
def test_verify_a_checkpoint(tmp_path):
    tiny.write(tmp_path, tiny.load("gemma3_text"), ml_dtypes.bfloat16)
    done = job(3, "-m", "mpitp", "verify", "--model", tmp_path, "--layer", 1, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A feed-forward block: 20 -> 23 -> 20, gated gelu_tanh, 128 tokens, float32\n" \
           "   layer 1 of a gemma3_text checkpoint (BF16 on disk); error" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    slices = [2 * 3 * 20 * n for n in (7, 8, 8)]
    assert report["schema"] == "mpitp.verify/1" and report["good"] and report["block"]["bytes_read_of_ranks"] == slices


@pytest.mark.launcher
@pytest.mark.parametrize("arguments, said", [
    (["--model", "/gone"], "/gone: found no such folder, expected a checkpoint"),
    (["--model", "TRUNCATED"], "where its last tensor ends"),
    (["--model", "GOOD", "--layer", "9"], "found layer 9, expected 0 to 1"),
    (["--model", "GOOD", "--hidden-size", "8"], "found --hidden-size beside --model"),
    (["--layer", "1"], "found --layer without --model"),
    (["--hidden-size", "0"], "hidden_size = 0"), (["--seq-length", "-1"], "seq_length = -1"),
    (["--dtype", "float16"], "float16"), (["--activation", "tanh"], "'tanh'"), (["--ffn-hidden-size", "x"], "'x'"),
    (["--nonsense"], "--nonsense"), (["nonsense"], "found command 'nonsense'"), (["--device", "tpu"], "device 'tpu'"),
    (["--json", "/gone/x.json"], "'/gone/x.json'"), (["--blocks", "0"], "blocks = 0"),
    (["--hidden-size", "9999999"], "GiB of memory"), (["--seed", "1.5"], "1.5"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, said):
    for name in ("good", "cut"):
        tiny.write(tmp_path / name, tiny.load("llama"))
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    names = {"GOOD": str(tmp_path / "good"), "TRUNCATED": str(tmp_path / "cut")}
    for ranks in (1, 2):
        done = job(ranks, "-m", "mpitp", *[names.get(a, a) for a in arguments])
        lines = [line for line in done.stderr.splitlines() if line.startswith("mpitp: ")]
        assert done.returncode == 2 and done.stdout == "" and len(lines) == 1 and said in lines[0], done.stderr
        assert "expected" in lines[0] or "argument" in lines[0] and "Traceback" not in done.stderr
