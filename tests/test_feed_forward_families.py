"""The feed-forward block out of checkpoints: names, orientation, activation; each rank reads only its slices."""
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
import mpitp
from check_layers import over_the_limit
from mpitp import InputError
from mpitp.checkpoints.families.feed_forward import activation_of, feed_forward, text_config
from mpitp.checkpoints.safetensors import Checkpoint
from spmd import draw, job


@pytest.fixture(scope="module")
def group():
    with mpitp.TensorParallelGroup(check=True) as group:
        yield group


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_the_block_equals_dense(group, family, dtype, tmp_path):
    dense = checkpoints.write(tmp_path, family, dtype, shards=1 if dtype == np.float32 else 3)[1]
    checkpoint = Checkpoint(tmp_path)
    found = feed_forward(checkpoint, 1)
    assert checkpoint.bytes_read == 0
    assert found.activation == checkpoints.EXPECTED_ACTIVATION[family]
    layer = mpitp.ParallelMLP(group, found.hidden_size, found.ffn_hidden_size, found.activation, found.gated, found.bias,
                              seed=None)
    layer.load_dense(found.weights)
    assert checkpoint.bytes_read == layer.local_bytes() * np.dtype(dtype).itemsize // 4     # its slices, once
    x, dy = draw(1, 5, checkpoints.HIDDEN, dtype="f"), draw(2, 5, checkpoints.HIDDEN, dtype="f")
    y, saved = layer.forward(x)
    dx, _ = layer.backward(dy, saved)
    assert over_the_limit({"y": y, "dx": dx}, x, dy, dense, found.activation) == []
    gathered = layer.gather()
    assert gathered is None or all(gathered[name].tobytes() == dense[name].tobytes() for name in dense)


def spoil(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return Checkpoint(folder)


def test_refusals(tmp_path):
    checkpoints.write(tmp_path / "a", "llama")
    with pytest.raises(InputError, match="found layers 0 to 1, expected layer 2"):
        feed_forward(Checkpoint(tmp_path / "a"), 2)
    with pytest.raises(InputError, match="found hidden_act = 'softplus', expected one of relu"):
        feed_forward(spoil(tmp_path / "a", hidden_act="softplus"), 0)
    with pytest.raises(InputError, match="found 20 in features, expected hidden_size = 21"):
        feed_forward(spoil(tmp_path / "a", hidden_act="silu", hidden_size=21), 0)
    with pytest.raises(InputError, match="no activation for model_type 'novel'"):
        feed_forward(spoil(tmp_path / "a", hidden_act=None, hidden_size=20, model_type="novel"), 0)
    tensors = load_file(tmp_path / "a" / "model.safetensors")

    def with_tensors(changes):
        left = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
        save_file(left, tmp_path / "a" / "model.safetensors")
        return spoil(tmp_path / "a", hidden_act="silu", model_type="llama")

    prefix = "model.layers.0.mlp."
    for changes, said in [
        ({f"{prefix}down_proj.weight": None}, f"no tensor '{prefix}down_proj.weight'"),
        ({f"{prefix}down_proj.weight": np.ones((20, 51), "f")}, r"down_proj: found shape \(20, 51\), expected \(20, 52\)"),
        ({f"{prefix}up_proj.weight": np.ones(52, "f")}, r"up_proj.weight: found shape \(52,\), expected two axes"),
        ({f"{prefix}up_proj.weight": np.ones((52, 20), np.int8)}, r"up_proj.weight: found I8, expected F32, F16, BF16, F64"),
        ({f"{prefix}up_proj.bias": np.ones(52, "f")}, "found only up.bias"),
        ({name: None for name in tensors if "mlp" in name}, "no feed-forward weights, expected mlp.up_proj/gate_proj"),
        ({f"other.layers.0.mlp.up_proj.weight": np.ones((52, 20), "f")}, "found layer 0 in .* and .*, expected one model"),
    ]:
        with pytest.raises(InputError, match=said):
            feed_forward(with_tensors(changes), 0)


@pytest.mark.parametrize("family, config, expected", [
    ("gemma", {"hidden_act": "gelu"}, "gelu_tanh"),             # its first release meant the other one
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, "gelu_tanh"),
    ("gemma", {"hidden_act": "silu"}, "silu"),
    ("gemma2", {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_tanh"),
    ("llama", {"hidden_act": "gelu"}, "gelu"), ("llama", {"hidden_act": "swish"}, "silu"),
    ("opt", {"activation_function": "relu"}, "relu"), ("bloom", {"hidden_act": "relu"}, "gelu_tanh"),
    ("falcon", {}, "gelu"), ("gemma3", {"text_config": {"model_type": "gemma3_text"}}, "gelu_tanh"),
])
def test_activations(family, config, expected):
    assert activation_of(text_config({"model_type": family, **config})) == expected


@pytest.mark.parametrize("config, said", [
    ({"hidden_act": ["silu"]}, "found hidden_act"), ({"hidden_act": "quick_gelu"}, "'quick_gelu'"),
    ({"model_type": ["llama"]}, "found model_type"), ({"model_type": {}}, "found model_type"),
])
def test_configs_of_another_kind(config, said, tmp_path):
    checkpoints.write(tmp_path, "llama")
    with pytest.raises(InputError, match=said):
        feed_forward(spoil(tmp_path, **config), 0)


def test_the_vision_tower_is_not_the_model(tmp_path):
    """Qwen2.5-VL's visual.blocks.N.mlp have the names of the text model's."""
    checkpoints.write(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tower = {name.replace("model.layers", "visual.blocks"): w + 1 for name, w in tensors.items() if "mlp" in name}
    save_file({**tensors, **tower}, tmp_path / "model.safetensors")
    found = feed_forward(Checkpoint(tmp_path), 1).weights["up.weight"][:, :]
    assert np.array_equal(found, tensors["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.launcher
def test_verify_a_checkpoint(tmp_path):
    checkpoints.write(tmp_path, "gemma3_text", ml_dtypes.bfloat16)
    done = job(3, "-m", "mpitp", "verify", "--model", tmp_path, "--layer", 1, "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A feed-forward block: 20 -> 52 -> 20, gated gelu_tanh, 128 tokens, float32\n" \
           "   layer 1 of a gemma3_text checkpoint (BF16 on disk); error" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    slices = [2 * 3 * 20 * n for n in (17, 17, 18)]
    assert report["schema"] == "mpitp.verify/1" and report["good"] and report["block"]["bytes_read_of_ranks"] == slices


@pytest.mark.launcher
@pytest.mark.parametrize("arguments, said", [
    (["--model", "/gone"], "/gone: found no such folder, expected a checkpoint"),
    (["--model", "TRUNCATED"], "where its last tensor ends"),
    (["--model", "GOOD", "--layer", "9"], "found layers 0 to 1, expected layer 9"),
    (["--model", "GOOD", "--hidden-size", "8"], "found --hidden-size beside --model"),
    (["--layer", "1"], "found --layer without --model"),
    (["--hidden-size", "0"], "hidden_size = 0"), (["--seq-length", "-1"], "seq_length = -1"),
    (["--dtype", "float16"], "float16"), (["--activation", "tanh"], "'tanh'"), (["--ffn-hidden-size", "x"], "'x'"),
    (["--nonsense"], "--nonsense"), (["nonsense"], "found command 'nonsense'"), (["--device", "tpu"], "device 'tpu'"),
    (["--json", "/gone/x.json"], "'/gone/x.json'"), (["--blocks", "0"], "blocks = 0"),
    (["--hidden-size", "9999999"], "GiB of memory"), (["--seed", "1.5"], "1.5"),
])
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, said):
    checkpoints.write(tmp_path / "good", "llama")
    checkpoints.write(tmp_path / "cut", "llama")
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    names = {"GOOD": str(tmp_path / "good"), "TRUNCATED": str(tmp_path / "cut")}
    for ranks in (1, 2):
        done = job(ranks, "-m", "mpitp", *[names.get(a, a) for a in arguments])
        lines = [line for line in done.stderr.splitlines() if line.startswith("mpitp: ")]
        assert done.returncode == 2 and done.stdout == "" and len(lines) == 1 and said in lines[0], done.stderr
        assert "expected" in lines[0] or "argument" in lines[0] and "Traceback" not in done.stderr
