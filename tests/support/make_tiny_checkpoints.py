"""Write data/tiny_*.json: what transformers computes, in float64, from a tiny checkpoint of every family.

    pip install torch==2.13.0 transformers==5.24.0 safetensors && python tests/support/make_tiny_checkpoints.py

A file has config.json as transformers saves it, the names and shapes of the tensors that it saves, token ids, logits,
and greedy tokens with the margin between the best two. The weights are not in it: values() makes them, here and in the
tests, which need no PyTorch; none is where a new model has it (zero biases, norms of one).
"""
import json
import sys
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1] / "data"
TOKENS, GREEDY = 9, 6
SIZES = dict(vocab_size=37, hidden_size=20, num_hidden_layers=2, num_attention_heads=5, intermediate_size=23,
             max_position_embeddings=64, tie_word_embeddings=False)
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=24)
LONGROPE = dict(rope_type="longrope", rope_theta=50.0, short_factor=[1.0, 1.1, 1.3], long_factor=[1.2, 2.0, 4.5])
SLIDING, FULL = "sliding_attention", "full_attention"
OPT = dict(vocab_size=37, hidden_size=20, num_hidden_layers=2, num_attention_heads=5, max_position_embeddings=17,
           word_embed_proj_dim=20)
YARN = dict(rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=16)

CASES = {       # name: (model_type, what its configuration class is called with)
    "llama": ("llama", dict(SIZES, num_key_value_heads=1, head_dim=6)),
    "llama3_biases": ("llama", dict(SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                                    attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3,
                                    tie_word_embeddings=True)),
    "llama_linear": ("llama", dict(SIZES, num_key_value_heads=5,
                                   rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5))),
    "llama_yarn": ("llama", dict(SIZES, num_key_value_heads=1, head_dim=8, rope_parameters=YARN, hidden_act="gelu")),
    "mistral": ("mistral", dict(SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=6, sliding_window=3)),
    "qwen2": ("qwen2", dict(SIZES, num_attention_heads=10, num_key_value_heads=2, use_sliding_window=True,
                            sliding_window=4, max_window_layers=1, tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=8,
                            attention_bias=True, rope_parameters=dict(YARN, attention_factor=1.3, beta_fast=16.0))),
    "gemma3_text": ("gemma3_text", dict(
        SIZES, num_hidden_layers=3, num_key_value_heads=1, head_dim=6, sliding_window=3, query_pre_attn_scalar=11,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], tie_word_embeddings=True,
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=100.0),
                             full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0)))),
    "gpt2": ("gpt2", dict(vocab_size=37, n_embd=20, n_layer=2, n_head=5, n_inner=23, n_positions=19)),
    "gpt2_unscaled": ("gpt2", dict(vocab_size=37, n_embd=21, n_layer=2, n_head=3, n_positions=19,
                                   scale_attn_weights=False, activation_function="relu", tie_word_embeddings=False)),
    "gpt_neox": ("gpt_neox", dict(SIZES, hidden_size=40)),
    "gpt_neox_in_turn": ("gpt_neox", dict(SIZES, hidden_size=24, num_attention_heads=3, use_parallel_residual=False,
                                          attention_bias=False, rope_parameters=dict(
                                              rope_type="default", rope_theta=70.0, partial_rotary_factor=0.5))),
    "falcon_7b": ("falcon", dict(vocab_size=37, hidden_size=20, num_hidden_layers=2, num_attention_heads=5)),
    "falcon_40b": ("falcon", dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
                                  num_kv_heads=2, new_decoder_architecture=True, ffn_hidden_size=23,
                                  tie_word_embeddings=False)),
    "falcon_11b": ("falcon", dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
                                  num_kv_heads=3, new_decoder_architecture=True, num_ln_in_parallel_attn=1,
                                  bias=True)),
    "falcon_in_turn": ("falcon", dict(vocab_size=37, hidden_size=20, num_hidden_layers=2, num_attention_heads=5,
                                      multi_query=False, parallel_attn=False, bias=True)),
    "bloom": ("bloom", dict(vocab_size=37, hidden_size=20, n_layer=2, n_head=5)),
    "ministral": ("ministral", dict(SIZES, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                    head_dim=6, sliding_window=3, layer_types=[SLIDING, FULL, SLIDING])),
    "seed_oss": ("seed_oss", dict(SIZES, num_key_value_heads=1, head_dim=6, attention_out_bias=True)),
    "seed_oss_biases": ("seed_oss", dict(SIZES, num_attention_heads=4, num_key_value_heads=4, attention_bias=False,
                                         mlp_bias=True, tie_word_embeddings=True, rope_parameters=YARN, head_dim=6)),
    "helium": ("helium", dict(SIZES, num_key_value_heads=5, head_dim=4, attention_bias=True)),
    "gemma": ("gemma", dict(SIZES, num_key_value_heads=1, head_dim=6, hidden_act="gelu", tie_word_embeddings=True)),
    "gemma_biases": ("gemma", dict(SIZES, num_key_value_heads=5, head_dim=6, hidden_act="silu", attention_bias=True)),
    "gemma3": ("gemma3", dict(
        text_config=dict(SIZES, num_key_value_heads=1, head_dim=6, sliding_window=3, query_pre_attn_scalar=11,
                         layer_types=[SLIDING, FULL], tie_word_embeddings=True, rope_parameters=dict(
                             sliding_attention=dict(rope_type="default", rope_theta=100.0),
                             full_attention=dict(rope_type="linear", factor=8.0, rope_theta=5000.0))),
        vision_config=dict(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
                           image_size=8, patch_size=8))),
    "phi": ("phi", dict(SIZES, hidden_size=40, intermediate_size=30)),
    "phi_grouped": ("phi", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=3,
                                hidden_act="gelu", rope_parameters=dict(rope_type="linear", factor=3.0,
                                                                        rope_theta=90.0, partial_rotary_factor=0.5))),
    "phi_norms": ("phi", dict(SIZES, hidden_size=40, intermediate_size=30, num_key_value_heads=1, qk_layernorm=True)),
    "phi3": ("phi3", dict(SIZES, num_attention_heads=4, hidden_size=24, num_key_value_heads=2, pad_token_id=0)),
    "phi3_partial": ("phi3", dict(SIZES, hidden_size=40, num_key_value_heads=1, sliding_window=4, pad_token_id=0,
                                  tie_word_embeddings=True, rope_parameters=dict(
                                      rope_type="default", rope_theta=70.0, partial_rotary_factor=0.75))),
    "gptj": ("gptj", dict(vocab_size=37, n_embd=24, n_layer=2, n_head=3, n_inner=23, n_positions=64, rotary_dim=4)),
    "starcoder2": ("starcoder2", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=2)),
    "starcoder2_window": ("starcoder2", dict(SIZES, num_attention_heads=5, num_key_value_heads=1, use_bias=False,
                                             sliding_window=3, tie_word_embeddings=True)),
    "gpt_bigcode": ("gpt_bigcode", dict(vocab_size=37, n_embd=20, n_layer=2, n_head=5, n_inner=23, n_positions=19)),
    "gpt_bigcode_heads": ("gpt_bigcode", dict(vocab_size=37, n_embd=21, n_layer=2, n_head=3, n_positions=19,
                                              multi_query=False, scale_attn_weights=False)),
    "stablelm": ("stablelm", dict(SIZES, hidden_size=40, num_key_value_heads=1, use_qkv_bias=True)),
    "stablelm_parallel": ("stablelm", dict(SIZES, hidden_size=48, num_attention_heads=6, num_key_value_heads=3,
                                           use_parallel_residual=True, tie_word_embeddings=True)),
    "stablelm_norms": ("stablelm", dict(SIZES, hidden_size=48, num_attention_heads=6, num_key_value_heads=3,
                                        qk_layernorm=True)),
    "stablelm_norms_parallel": ("stablelm", dict(SIZES, hidden_size=40, num_key_value_heads=1, qk_layernorm=True,
                                                 use_parallel_residual=True, use_qkv_bias=True)),
    "glm": ("glm", dict(SIZES, num_key_value_heads=1, head_dim=8, pad_token_id=0)),
    "glm4": ("glm4", dict(SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=False,
                          pad_token_id=0)),
    "opt": ("opt", dict(OPT, ffn_dim=23)),
    "opt_after": ("opt", dict(OPT, do_layer_norm_before=False, ffn_dim=30, enable_bias=False,
                              activation_function="gelu", tie_word_embeddings=False)),
    "gemma2": ("gemma2", dict(SIZES, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                              query_pre_attn_scalar=3, sliding_window=3, attn_logit_softcapping=5.0,
                              final_logit_softcapping=2.0, tie_word_embeddings=True)),
    "gemma2_no_caps": ("gemma2", dict(SIZES, num_key_value_heads=1, head_dim=6, attn_logit_softcapping=None,
                                      final_logit_softcapping=None, layer_types=[FULL, FULL], attention_bias=True)),
    "arcee": ("arcee", dict(SIZES, num_key_value_heads=1, head_dim=6, mlp_bias=True, rope_parameters=YARN)),
    "nemotron": ("nemotron", dict(SIZES, num_key_value_heads=1, head_dim=8)),
    "nemotron_biases": ("nemotron", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=3,
                                         attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "granite": ("granite", dict(SIZES, hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
                                embedding_multiplier=3.0, residual_multiplier=0.22, logits_scaling=1.5,
                                attention_multiplier=0.3, tie_word_embeddings=True)),
    "cohere": ("cohere", dict(SIZES, num_attention_heads=2, num_key_value_heads=1, logit_scale=0.5,
                              tie_word_embeddings=True)),
    "cohere_norms": ("cohere", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=2,
                                    use_qk_norm=True, attention_bias=True)),
    "cohere2": ("cohere2", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=2, sliding_window=3,
                                layer_types=[SLIDING, FULL], logit_scale=0.25, attention_bias=True)),
    "exaone4": ("exaone4", dict(SIZES, num_attention_heads=5, num_key_value_heads=1, hidden_size=30, sliding_window=3,
                                layer_types=[SLIDING, FULL])),
    "exaone4_full": ("exaone4", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=2,
                                     sliding_window=None, layer_types=[FULL, FULL], tie_word_embeddings=True,
                                     rope_parameters=LLAMA3)),
    "smollm3": ("smollm3", dict(SIZES, num_hidden_layers=3, hidden_size=24, num_attention_heads=4,
                                num_key_value_heads=2, no_rope_layers=[1, 0, 1], pad_token_id=0)),
    "smollm3_window": ("smollm3", dict(SIZES, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                                       no_rope_layer_interval=2, use_sliding_window=True, sliding_window=3,
                                       attention_bias=True, mlp_bias=True, tie_word_embeddings=True, pad_token_id=0)),
    "hunyuan": ("hunyuan_v1_dense", dict(SIZES, num_key_value_heads=1, head_dim=6, tie_word_embeddings=True)),
    "hunyuan_alpha": ("hunyuan_v1_dense", dict(SIZES, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
                                               attention_bias=True, rope_parameters=dict(
                                                   rope_type="dynamic", alpha=50.0, factor=1.0, rope_theta=20.0))),
    "olmo2": ("olmo2", dict(SIZES, num_key_value_heads=1, head_dim=6)),
    "olmo2_biases": ("olmo2", dict(SIZES, hidden_size=24, num_attention_heads=6, num_key_value_heads=3,
                                   attention_bias=True, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "olmo3": ("olmo3", dict(SIZES, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, sliding_window=3,
                            layer_types=[SLIDING, FULL], rope_parameters=dict(
                                sliding_attention=dict(rope_type="default", rope_theta=5e5),
                                full_attention=dict(YARN, rope_theta=5e5)))),
    "phi3_longrope": ("phi3", dict(SIZES, num_key_value_heads=1, hidden_size=30, original_max_position_embeddings=24,
                                   pad_token_id=0, rope_parameters=LONGROPE)),
    "phi3_longer": ("phi3", dict(SIZES, num_key_value_heads=1, hidden_size=40, original_max_position_embeddings=6,
                                 pad_token_id=0, rope_parameters=dict(LONGROPE, partial_rotary_factor=0.75))),
    "llama_longrope": ("llama", dict(SIZES, num_key_value_heads=1, head_dim=6, rope_parameters=dict(
        LONGROPE, factor=5.0, original_max_position_embeddings=6))),
    "llama_dynamic": ("llama", dict(SIZES, num_key_value_heads=1, head_dim=6, max_position_embeddings=7,
                                    rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=3.0))),
    "llama_both": ("llama", dict(SIZES, num_key_value_heads=1, head_dim=6, is_causal=False)),
    "ministral_both": ("ministral", dict(SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                                         is_causal=False, sliding_window=2, layer_types=[SLIDING, FULL])),
    "bloom_both": ("bloom", dict(vocab_size=37, hidden_size=20, n_layer=2, n_head=5, is_causal=False)),
    "gemma3_both": ("gemma3_text", dict(
        SIZES, num_key_value_heads=1, head_dim=6, sliding_window=5, query_pre_attn_scalar=11, tie_word_embeddings=True,
        layer_types=[SLIDING, FULL], use_bidirectional_attention=True)),
    "gemma3_softcap": ("gemma3_text", dict(SIZES, num_key_value_heads=5, head_dim=4, final_logit_softcapping=2.0,
                                           layer_types=[FULL, SLIDING])),
    "opt_no_last_norm": ("opt", dict(OPT, ffn_dim=23, _remove_final_layer_norm=True)),
}
ZERO_CENTERED = ("gemma", "gemma2", "gemma3_text", "gemma3", "nemotron")
ROPE_SCALING = dict(type="linear", factor=2.0)

# Folders that contradict themselves: name: (case, keys that are added to its config.json, tensors that are).
CONTRADICTIONS = {
    "gpt2_own_head": ("gpt2", {}, {"lm_head.weight": [37, 20]}),
    "gemma3_own_head": ("gemma3_text", {}, {"lm_head.weight": [37, 20]}),
    "llama_rope_scaling": ("llama_yarn", dict(rope_scaling=ROPE_SCALING, rope_theta=77.0), {}),
    "gemma3_rope_scaling": ("gemma3_text", dict(rope_scaling=dict(ROPE_SCALING, rope_type="linear")), {}),
    "olmo3_trained": ("olmo3", dict(original_max_position_embeddings=5), {}),
    "gpt_neox_rope_scaling": ("gpt_neox_in_turn", dict(rope_scaling=ROPE_SCALING, rotary_pct=0.25), {}),
    "llama_other_keys": ("llama", dict(hidden_activation="gelu", scale_attn_weights=False), {}),
}


def values(name, shape, norm_of_one):
    """A tensor of a checkpoint: numbers that F32, F16 and BF16 hold exactly, the same on every machine."""
    index = np.arange(np.prod(shape), dtype=np.uint64)
    mixed = (index * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))) & np.uint64(0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    whole = (mixed >> np.uint64(20)).astype(np.int64) % 256 - 128
    if len(shape) == 1 and name.endswith("weight"):             # a norm's
        return (float(norm_of_one) + whole // 8 / 64).astype(np.float32).reshape(shape)
    return (whole / 256).astype(np.float32).reshape(shape)


def load(case):
    return json.loads((DATA / f"tiny_{case}.json").read_text())


def tensors(golden):
    """{name: array} of a checkpoint. Some families' norms multiply by 1 + w."""
    of_one = golden["config"]["model_type"] not in ZERO_CENTERED
    return {name: values(name, tuple(shape), of_one) for name, shape in golden["tensors"].items()}


def write(folder, golden, dtype=np.float32, shards=1, config=None):
    """Write a checkpoint folder; config: another config.json than the golden one's."""
    from safetensors.numpy import save_file
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden["config"] if config is None else config))
    stored = {name: w.astype(dtype) for name, w in tensors(golden).items()}
    if shards == 1:
        return save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    where = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(stored.items())[shard::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


# --- with transformers -------------------------------------------------------------------------------------

def in_float64(function):
    """Call it while torch.float32 means float64: transformers rounds norms, softmax and angles to float32."""
    import torch
    kept = torch.float32, torch.float, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        return function()
    finally:
        torch.set_default_dtype(kept[0])
        torch.float32, torch.float, torch.Tensor.float = kept


def widen_buffers(model):
    """Frequencies and the multiplier of embeddings, made in float32, in float64."""
    import torch
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
        names = [name for name, _ in module.named_buffers(recurse=False)
                 if name.endswith("inv_freq") or name == "embed_positions"]
        if names:
            again = type(module)(getattr(module, "config", model.config))
            for name in names:
                setattr(module, name, getattr(again, name))


def golden_of(model_type, options, folder, keys=(), more=()):
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(model_type, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    said = json.loads((folder / "config.json").read_text())
    said.pop("transformers_version")
    said.update(keys)
    golden = dict(config=said, tensors=dict(shapes, **dict(more)))
    write(folder, golden)                                       # with our values; transformers loads it

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()

    def compute():
        widen_buffers(model)
        vocab_size = said.get("text_config", said)["vocab_size"]
        ids = [int(i) for i in np.arange(1, TOKENS + 1) * 17 % vocab_size]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
            greedy, margins = [], []
            for _ in range(GREEDY):
                best = model(torch.tensor([ids + greedy])).logits[0, -1].topk(2)
                greedy.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
        return dict(golden, ids=ids, logits=[[float(f"{x:.12g}") for x in row] for row in logits.tolist()],
                    greedy=greedy, margins=[float(f"{x:.4g}") for x in margins])
    return in_float64(compute)


def main(names):
    import tempfile

    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    DATA.mkdir(exist_ok=True)
    for name in names or (*CASES, *CONTRADICTIONS):
        case, keys, more = CONTRADICTIONS.get(name, (name, {}, {}))
        with tempfile.TemporaryDirectory() as folder:
            golden = golden_of(*CASES[case], Path(folder), keys, more)
        made = {"torch": torch.__version__, "transformers": transformers.__version__}
        lines = [f'"{key}": {json.dumps(value)}' for key, value in {**made, **golden}.items()]
        (DATA / f"tiny_{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(name, golden["greedy"], "margins", golden["margins"])


if __name__ == "__main__":
    main(sys.argv[1:])
