"""Tiny checkpoint folders, written with the format's own library."""
import json

import numpy as np
from safetensors.numpy import save_file

HIDDEN, FFN = 20, 52

FAMILIES = {    # model_type: (config, prefix of layer N, names of up, gate, down, transposed, bias)
    "llama": (dict(hidden_act="silu"), "model.layers.{}.mlp.", ("up_proj", "gate_proj", "down_proj"), False, False),
    "qwen3": (dict(hidden_act="silu"), "model.layers.{}.mlp.", ("up_proj", "gate_proj", "down_proj"), False, False),
    "gemma3_text": (dict(hidden_activation="gelu_pytorch_tanh"), "model.layers.{}.mlp.",
                    ("up_proj", "gate_proj", "down_proj"), False, False),
    "gpt2": (dict(activation_function="gelu_new", n_embd=HIDDEN), "transformer.h.{}.mlp.", ("c_fc", None, "c_proj"),
             True, True),
    "gpt_neox": (dict(hidden_act="gelu"), "gpt_neox.layers.{}.mlp.", ("dense_h_to_4h", None, "dense_4h_to_h"), False, True),
    "falcon": (dict(activation="gelu"), "transformer.h.{}.mlp.", ("dense_h_to_4h", None, "dense_4h_to_h"), False, False),
    "bloom": (dict(), "h.{}.mlp.", ("dense_h_to_4h", None, "dense_4h_to_h"), False, True),
}
EXPECTED_ACTIVATION = {"llama": "silu", "qwen3": "silu", "gemma3_text": "gelu_tanh", "gpt2": "gelu_tanh",
                       "gpt_neox": "gelu", "falcon": "gelu", "bloom": "gelu_tanh"}


def dense_weights(gated, bias, seed):
    draw = np.random.default_rng(seed).standard_normal
    weights = {}
    for part, shape in {"up": (FFN, HIDDEN), "gate": (FFN, HIDDEN), "down": (HIDDEN, FFN)}.items():
        if part == "gate" and not gated:
            continue
        weights[f"{part}.weight"] = draw(shape).astype("f") / 4
        if bias:
            weights[f"{part}.bias"] = draw(shape[0]).astype("f")
    return weights


def write(folder, family, dtype=np.float32, layers=2, shards=1):
    """Write a checkpoint folder; returns [{name of ParallelMLP: dense array}] of its layers, rounded to dtype."""
    more, prefix, names, transposed, bias = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": HIDDEN, **more}))
    tensors, dense = {"other.weight": np.ones((3, 2), dtype)}, []
    for layer in range(layers):
        weights = {name: w.astype(dtype) for name, w in dense_weights(names[1] is not None, bias, layer).items()}
        dense.append({name: w.astype(np.float32) for name, w in weights.items()})
        for part, theirs in zip(("up", "gate", "down"), names):
            for kind in ("weight", "bias"):
                if f"{part}.{kind}" in weights:
                    w = weights[f"{part}.{kind}"]
                    tensors[f"{prefix.format(layer)}{theirs}.{kind}"] = np.ascontiguousarray(w.T if transposed else w)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return dense
    where = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        where.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return dense
