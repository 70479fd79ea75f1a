"""Legal configs of every family at random: what loading computes equals the dense decoder of the same choices.

Each choice is drawn once and written twice, as config.json has it and as DecoderConfig; weights are stored under the
names, and in the fused layouts, that are written out here. Neither the family tables nor the layers are asked.
"""
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from safetensors.numpy import save_file

import mpitp
from check_decoder import dense_weights
from mpitp import DecoderConfig, Rotary, oracle
from mpitp.sharding.decoder_specs import decoder_specs
from spmd import everywhere

LONGEST = 32
THEIRS = {"silu": ["silu", "swish"], "gelu": ["gelu"], "gelu_tanh": ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"],
          "relu": ["relu"]}
IDS = np.random.default_rng(0).integers(0, 23, (2, 9))

LLAMA = {
    "embedding": "model.embed_tokens", "attention_norm": "model.layers.{}.input_layernorm",
    "attention.query": "model.layers.{}.self_attn.q_proj", "attention.key": "model.layers.{}.self_attn.k_proj",
    "attention.value": "model.layers.{}.self_attn.v_proj", "attention.out": "model.layers.{}.self_attn.o_proj",
    "attention.query_norm": "model.layers.{}.self_attn.q_norm",
    "attention.key_norm": "model.layers.{}.self_attn.k_norm",
    "mlp_norm": "model.layers.{}.post_attention_layernorm", "mlp.gate": "model.layers.{}.mlp.gate_proj",
    "mlp.up": "model.layers.{}.mlp.up_proj", "mlp.down": "model.layers.{}.mlp.down_proj", "final_norm": "model.norm",
    "head": "lm_head"}
GEMMA3 = {**LLAMA, "attention_post_norm": "model.layers.{}.post_attention_layernorm",
          "mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
          "mlp_post_norm": "model.layers.{}.post_feedforward_layernorm"}
GPT2 = {"embedding": "transformer.wte", "position": "transformer.wpe", "attention_norm": "transformer.h.{}.ln_1",
        "attention.qkv": "transformer.h.{}.attn.c_attn", "attention.out": "transformer.h.{}.attn.c_proj",
        "mlp_norm": "transformer.h.{}.ln_2", "mlp.up": "transformer.h.{}.mlp.c_fc",
        "mlp.down": "transformer.h.{}.mlp.c_proj", "final_norm": "transformer.ln_f", "head": "lm_head"}
NEOX = {"embedding": "gpt_neox.embed_in", "attention_norm": "gpt_neox.layers.{}.input_layernorm",
        "attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "attention.out": "gpt_neox.layers.{}.attention.dense",
        "mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
        "mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h", "mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"}
BLOOM = {"embedding": "transformer.word_embeddings", "embedding_norm": "transformer.word_embeddings_layernorm",
         "attention_norm": "transformer.h.{}.input_layernorm",
         "attention.qkv": "transformer.h.{}.self_attention.query_key_value",
         "attention.out": "transformer.h.{}.self_attention.dense",
         "mlp_norm": "transformer.h.{}.post_attention_layernorm", "mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
         "mlp.down": "transformer.h.{}.mlp.dense_4h_to_h", "final_norm": "transformer.ln_f", "head": "lm_head"}


# --- choices -----------------------------------------------------------------------------------------------------

def sizes(draw, grouped=True, any_head=True):
    """(fields of DecoderConfig) that all families have."""
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * share if grouped else groups
    head = 2 * draw(st.integers(1, 4))
    hidden = draw(st.integers(4, 24)) if any_head else heads * head
    return dict(vocab_size=23, hidden_size=hidden, num_layers=draw(st.integers(1, 3)), num_attention_heads=heads,
                num_query_groups=groups if grouped else heads, kv_channels=head,
                ffn_hidden_size=draw(st.integers(1, 30)),
                tie_word_embeddings=draw(st.booleans()), norm_epsilon=draw(st.sampled_from([1e-6, 1e-5, 1e-2])))


def activation(draw, among=("silu", "gelu", "gelu_tanh", "relu")):
    """(ours, theirs)."""
    ours = draw(st.sampled_from(among))
    return ours, draw(st.sampled_from(THEIRS[ours]))


def scaled(draw, kinds=("default", "linear", "llama3", "yarn")):
    """(fields of Rotary, an object of rope_parameters), without the base."""
    kind, factor = draw(st.sampled_from(kinds)), draw(st.sampled_from([1.0, 2.0, 8.0]))
    original = draw(st.sampled_from([4, 16]))
    if kind == "default":
        return {}, {"rope_type": kind}
    if kind == "linear":
        return dict(scaling=kind, factor=factor), {"rope_type": kind, "factor": factor}
    more = dict(low_freq_factor=1.0, high_freq_factor=draw(st.sampled_from([2.0, 4.0]))) if kind == "llama3" else \
        draw(st.sampled_from([{}, dict(beta_fast=8.0, beta_slow=2.0), dict(attention_factor=1.3, truncate=False)]))
    return dict(scaling=kind, factor=factor, original_max_positions=original, **more), \
        {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original, **more}


def rope(draw, base_key="rope_theta", part=None, dim=None):
    """(Rotary, keys of config.json): in either style, or in both, where the old one counts."""
    fields, found = scaled(draw)
    base = draw(st.sampled_from([50.0, 10000.0]))
    rotary = Rotary(dim=dim, base=base, **fields)
    part_key, partial = ("rotary_pct", {} if part is None else {"partial_rotary_factor": part})
    style = draw(st.sampled_from(["new", "old", "both"]))
    if style == "new":
        return rotary, {"rope_parameters": {**found, **partial, "rope_theta": base}}
    if "type" in draw(st.sampled_from(["rope_type", "type"])).split("_")[:1]:
        found["type"] = found.pop("rope_type")
    keys = {base_key: base, "rope_scaling": found, **({} if part is None else {part_key: part})}
    if style == "both":
        keys["rope_parameters"] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 7.0}
    return rotary, keys


def windows(draw, layers):
    """(window of each layer, window)."""
    window = draw(st.integers(1, 6))
    return tuple(draw(st.sampled_from([None, window])) for _ in range(layers)), window


def types(found):
    return ["full_attention" if window is None else "sliding_attention" for window in found]


def of_llama(draw, family):
    """(config.json, DecoderConfig, names, how it is fused, whether it is stored [in, out])."""
    found, (ours, theirs), (rotary, keys) = sizes(draw), activation(draw), rope(draw)
    layers = found["num_layers"]
    more = dict(activation=ours, gated=True, normalization="rmsnorm", rotary=rotary, mlp_bias=False, qkv_bias=False,
                attention_bias=False)
    keys.update(hidden_act=theirs)
    if family == "llama":
        bias, mlp_bias = draw(st.booleans()), draw(st.booleans())
        more.update(qkv_bias=bias, attention_bias=bias, mlp_bias=mlp_bias)
        keys.update(attention_bias=bias, mlp_bias=mlp_bias)
    elif family == "mistral":
        more["sliding_window"] = keys["sliding_window"] = draw(st.sampled_from([None, 1, 3]))
    else:
        of_layers, window = windows(draw, layers)
        first = draw(st.integers(0, layers + 1))
        use, typed = draw(st.booleans()), draw(st.booleans())
        if not typed:
            of_layers = tuple(window if i >= first else None for i in range(layers))
        keys.update(use_sliding_window=use, sliding_window=window, max_window_layers=first,
                    layer_types=(types(of_layers) if use else ["full_attention"] * layers) if typed else None)
        more.update(sliding_window=of_layers if use else None, qkv_bias=True)
        if family == "qwen3":
            bias = draw(st.booleans())
            more.update(qk_norm=True, qkv_bias=bias, attention_bias=bias)
            keys.update(attention_bias=bias)
    return {**llama_keys(found), **keys}, DecoderConfig(**found, **more), LLAMA, None, False


def llama_keys(found):
    return dict(vocab_size=23, hidden_size=found["hidden_size"], num_hidden_layers=found["num_layers"],
                num_attention_heads=found["num_attention_heads"], num_key_value_heads=found["num_query_groups"],
                head_dim=found["kv_channels"], intermediate_size=found["ffn_hidden_size"],
                tie_word_embeddings=found["tie_word_embeddings"], rms_norm_eps=found["norm_epsilon"],
                max_position_embeddings=LONGEST)


def of_gemma3(draw, family):
    found, (ours, theirs) = sizes(draw), activation(draw)
    of_layers, window = windows(draw, found["num_layers"])
    bias, scalar = draw(st.booleans()), draw(st.integers(1, 300))
    fields, full = scaled(draw, ("default", "linear"))
    bases = draw(st.sampled_from([50.0, 1e6])), draw(st.sampled_from([30.0, 1e4]))
    keys = dict(hidden_activation=theirs, sliding_window=window, layer_types=types(of_layers), attention_bias=bias,
                query_pre_attn_scalar=scalar)
    if draw(st.booleans()):
        keys["rope_parameters"] = {"full_attention": {**full, "rope_theta": bases[0]},
                                   "sliding_attention": {"rope_type": "default", "rope_theta": bases[1]}}
    else:
        keys.update(rope_theta=bases[0], rope_local_base_freq=bases[1], rope_scaling=full)
    turns = {True: Rotary(base=bases[0], **fields), False: Rotary(base=bases[1])}
    config = DecoderConfig(
        **found, activation=ours, gated=True, normalization="rmsnorm", mlp_bias=False, qkv_bias=bias,
        attention_bias=bias, qk_norm=True, norm_placement="both", zero_centered_gamma=True, sliding_window=of_layers,
        embedding_multiplier=found["hidden_size"] ** 0.5, attention_scale=scalar ** -0.5,
        rotary=tuple(turns[window is None] for window in of_layers))
    return {**llama_keys(found), **keys}, config, GEMMA3, None, False


def of_gpt2(draw, family):
    found, (ours, theirs), scale = sizes(draw, False, False), activation(draw), draw(st.booleans())
    keys = dict(n_embd=found["hidden_size"], n_layer=found["num_layers"], n_head=found["num_attention_heads"],
                n_inner=found["ffn_hidden_size"], n_positions=LONGEST, activation_function=theirs, vocab_size=23,
                scale_attn_weights=scale, layer_norm_epsilon=found["norm_epsilon"],
                tie_word_embeddings=found["tie_word_embeddings"])
    return keys, DecoderConfig(**found, activation=ours, position_embedding="learned", max_position_embeddings=LONGEST,
                               attention_scale=None if scale else 1.0), GPT2, "in turn", True


def of_gpt_neox(draw, family):
    found, (ours, theirs) = sizes(draw, False, False), activation(draw)
    part, bias, parallel = draw(st.sampled_from([0.5, 1.0])), draw(st.booleans()), draw(st.booleans())
    if int(found["kv_channels"] * part) % 2:
        part = 1.0
    rotary, keys = rope(draw, "rotary_emb_base", part, int(found["kv_channels"] * part))
    keys.update(vocab_size=23, hidden_size=found["hidden_size"], num_hidden_layers=found["num_layers"],
                num_attention_heads=found["num_attention_heads"], intermediate_size=found["ffn_hidden_size"],
                hidden_act=theirs, layer_norm_eps=found["norm_epsilon"], use_parallel_residual=parallel,
                attention_bias=bias, tie_word_embeddings=found["tie_word_embeddings"], max_position_embeddings=LONGEST)
    return keys, DecoderConfig(**found, activation=ours, rotary=rotary, parallel_residual=parallel, qkv_bias=bias,
                               attention_bias=bias), NEOX, "by head", False


def of_falcon(draw, family):
    found, (ours, theirs), (rotary, keys) = sizes(draw, True, False), activation(draw), rope(draw)
    new, bias, parallel, norms = (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()),
                                  draw(st.sampled_from([None, 1, 2])))
    heads = found["num_attention_heads"]
    if new:
        keys.update(num_kv_heads=found["num_query_groups"], num_ln_in_parallel_attn=norms, multi_query=True)
        parallel, shared = True, norms == 1
    else:
        multi = draw(st.booleans())
        found["num_query_groups"], shared = 1 if multi else heads, parallel
        keys.update(multi_query=multi, num_kv_heads=heads)
    names = {**BLOOM, **({"attention_norm": "transformer.h.{}.ln_attn", "mlp_norm": "transformer.h.{}.ln_mlp"}
                         if parallel and not shared else {})}
    keys.update(new_decoder_architecture=new, parallel_attn=parallel, bias=bias, vocab_size=23, alibi=False,
                hidden_size=found["hidden_size"], num_hidden_layers=found["num_layers"], num_attention_heads=heads,
                ffn_hidden_size=found["ffn_hidden_size"], activation=theirs, layer_norm_epsilon=found["norm_epsilon"],
                tie_word_embeddings=found["tie_word_embeddings"], max_position_embeddings=LONGEST)
    return keys, DecoderConfig(**found, activation=ours, rotary=rotary, parallel_residual=parallel, shared_norm=shared,
                               qkv_bias=bias, attention_bias=bias, mlp_bias=bias), names, "by group", False


def of_bloom(draw, family):
    found = sizes(draw, False, False)
    found["ffn_hidden_size"] = 4 * found["hidden_size"]
    keys = dict(n_embed=found["hidden_size"], n_layer=found["num_layers"], n_head=found["num_attention_heads"],
                layer_norm_epsilon=found["norm_epsilon"], tie_word_embeddings=found["tie_word_embeddings"],
                vocab_size=23, hidden_dropout=0.0)
    return keys, DecoderConfig(**found, activation="gelu_tanh", position_embedding="alibi",
                               embedding_norm=True), BLOOM, "by head", False


FAMILIES = {"llama": of_llama, "mistral": of_llama, "qwen2": of_llama, "qwen3": of_llama, "gemma3_text": of_gemma3,
            "gpt2": of_gpt2, "gpt_neox": of_gpt_neox, "falcon": of_falcon, "bloom": of_bloom}


# --- the folder ----------------------------------------------------------------------------------------------------

def stored(config, w, names, fused, transposed):
    """{name: array} of the checkpoint."""
    tensors = {}
    for name, array in w.items():
        head, _, kind = name.rpartition(".")
        layer, module = (head.split(".", 2)[1:] if head.startswith("layers.") else (None, head))
        part = module.removeprefix("attention.")
        if fused and part in ("query", "key", "value"):
            if part == "query":
                qkv = [w[f"layers.{layer}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
                array, module = fuse(fused, config, qkv), "attention.qkv"
            else:
                continue
        linear = kind == "weight" and (module.startswith("mlp.") or module.startswith("attention."))
        array = array.T if transposed and linear else array
        tensors[f"{names[module].format(layer)}.{kind}"] = np.ascontiguousarray(array, "f")
    return tensors


def fuse(how, config, qkv):
    """q, k and v in one array, their rows in the family's order."""
    if how == "in turn":
        return np.concatenate(qkv)
    groups = config.query_groups
    rows = [a.reshape(groups, -1, config.head_dim, *a.shape[1:]) for a in qkv]      # group, head of it, feature
    whole = np.concatenate(rows, axis=1)
    return whole.reshape(-1, *whole.shape[3:])


@pytest.mark.parametrize("family", FAMILIES)
@settings(derandomize=True, deadline=None, database=None, max_examples=30 if MPI.COMM_WORLD.size == 1 else 12,
          suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_logits_equal_those_of_the_dense_decoder(group, family, data, tmp_path):
    keys, config, names, fused, transposed = FAMILIES[family](data.draw, family)
    w = dense_weights(decoder_specs(config))
    save_file(stored(config, w, names, fused, transposed), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **keys}))
    exact = oracle.decoder.forward(IDS, w, config)[0]
    model = mpitp.load_model(tmp_path, group, "float64", strict=True)
    logits = model.gather_logits(model.forward(IDS, save=False)[0])
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert everywhere(error < 1e-10), (error, keys)
