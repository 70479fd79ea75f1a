"""Checkpoints of every family against what transformers computes from them, in float64 (data/; no PyTorch here)."""
import json
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import decoder_cases
import make_tiny_checkpoints as tiny
import mpitp
from mpitp import InputError
from mpitp.checkpoints import loading
from mpitp.sharding.decoder_specs import decoder_specs
from mpitp.checkpoints.families import MODULES, family_named
from mpitp.checkpoints.families.keys import REFUSED, Keys
from mpitp.checkpoints.families.layout import Fused, Layout
from mpitp.checkpoints.model_folder import open_folder
from spmd import everywhere

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def ordinary():
    with mpitp.TensorParallelGroup(check=True) as group:
        yield group


def logits_of(model, ids):
    local, _ = model.forward(np.array([ids]), save=False)
    return model.gather_logits(local)[0]


def greedy(model, ids, count):
    """By generate, or by whole passes where what was computed changes with the length."""
    longest = [rotary.longest for rotary in model.config.rotaries if rotary]
    if model.config.causal and all(length is None or length >= len(ids) + count for length in longest):
        return [int(tokens[0]) for tokens in mpitp.generate(model, [ids], max_new_tokens=count)]
    found = []
    for _ in range(count):
        found.append(int(logits_of(model, ids + found)[-1].argmax()))
    return found


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in tiny.CASES.values()} == set(MODULES)


@pytest.mark.filterwarnings("ignore::mpitp.checkpoints.model_folder.CheckpointWarning")
@pytest.mark.parametrize("case", [*tiny.CASES, *tiny.CONTRADICTIONS])
def test_logits_and_greedy_tokens(group, case, tmp_path):
    golden = tiny.load(case)
    exact = np.array(golden["logits"])
    tiny.write(tmp_path, golden)
    of_float64 = 1e-8 if case.startswith("bloom") else 1e-11    # its GELU has 0.79788456
    for dtype, limit in (("float32", 1e-5), ("float64", of_float64)):
        if group.size > 1 and group.reproducible != (dtype == "float64"):
            continue                                        # on several ranks a dtype for each mode
        model = mpitp.load_model(tmp_path, group, dtype)
        logits = logits_of(model, golden["ids"])
        assert logits.dtype == dtype and np.abs(logits - exact).max() <= limit * np.abs(exact).max()
        assert np.linalg.norm(logits - exact) <= limit * np.linalg.norm(exact)
        if dtype == "float32":
            assert min(golden["margins"]) > 2 * limit * np.abs(exact).max()
            assert greedy(model, golden["ids"], len(golden["greedy"])) == golden["greedy"]


@pytest.mark.parametrize("dtype, shards", [("F16", 3), ("BF16", 1), ("BF16", 7)])
@pytest.mark.parametrize("case", ["llama3_biases", "gpt2", "falcon_40b", "gemma3_text"])
def test_stored_dtypes_and_shards(group, case, dtype, shards, tmp_path):
    """The values are ones that 16 bits hold."""
    golden = tiny.load(case)
    tiny.write(tmp_path / "a", golden)
    tiny.write(tmp_path / "b", golden, DTYPES[dtype], shards)
    for computed in ("float32", "float64"):
        whole, stored = (mpitp.load_model(tmp_path / folder, group, computed) for folder in "ab")
        assert all(whole.weights[name].tobytes() == stored.weights[name].tobytes() for name in whole.weights)


@pytest.mark.filterwarnings("ignore::mpitp.checkpoints.model_folder.CheckpointWarning")
@pytest.mark.parametrize("case", tiny.CASES)
def test_each_rank_reads_its_slices_only(group, case, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden, ml_dtypes.bfloat16)
    model = mpitp.load_model(tmp_path, group)
    assert model.bytes_read == model.local_bytes() // 2
    assert model.specs == decoder_specs(model.config)


@pytest.mark.parametrize("kind", decoder_cases.KINDS)
def test_parameters_without_a_decoder(group, kind):
    config = decoder_cases.config(kind)
    assert list(decoder_specs(config).items()) == list(mpitp.Decoder(group, config, seed=None).specs.items())


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(data=st.data())
def test_fused_layouts(data):
    """Every window of every part, transposed or not, against plain indexing."""
    outer, parts, inner, columns = (data.draw(st.integers(1, most)) for most in (4, 5, 3, 3))
    first = data.draw(st.integers(0, parts - 1))
    fused = Fused(outer, parts, inner, first, data.draw(st.integers(first + 1, parts)))
    stored = np.arange(fused.stored_rows * columns, dtype="f").reshape(-1, columns)
    whole = stored.reshape(outer, parts, inner, columns)[:, first:fused.last].reshape(-1, columns)
    window = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in whole.shape)
    transposed, expected, copy = data.draw(st.booleans()), whole[window], np.full_like(stored, -1)
    layout = Layout("w", whole.shape, transposed, fused)
    assert layout.stored_shape == (stored.T if transposed else stored).shape
    for mine, theirs in layout.runs(window):
        part = (stored.T if transposed else stored)[theirs]
        assert np.array_equal(part.T if transposed else part, expected[mine])
        (copy.T if transposed else copy)[theirs] = part         # and back: nothing else is touched
    assert np.array_equal(copy.reshape(outer, parts, inner, columns)[:, first:fused.last].reshape(-1, columns)[window],
                          expected) and (copy != -1).sum() == expected.size


# --- memory ----------------------------------------------------------------------------------------------------

LARGER = {"llama": dict(hidden_size=256, intermediate_size=700, num_attention_heads=8, num_key_value_heads=2,
                        head_dim=32, vocab_size=3000),
          "gpt2": dict(n_embd=256, n_inner=700, n_head=8, vocab_size=3000, n_positions=64),
          "gpt_neox": dict(hidden_size=256, intermediate_size=700, num_attention_heads=8, vocab_size=3000),
          "falcon_40b": dict(hidden_size=256, ffn_hidden_size=700, num_attention_heads=8, num_kv_heads=4,
                             vocab_size=3000)}


def write_larger(folder, case, dtype=ml_dtypes.bfloat16):
    """The checkpoint with another config's sizes; shapes come from the layouts that the family has for them."""
    golden = tiny.load(case)
    config = {**golden["config"], **LARGER[case]}
    of = family_named(config["model_type"])
    read = of.config(Keys(config))
    layouts = of.layouts(read, decoder_specs(read), of.prefix)
    golden["tensors"] = {layout.name: layout.stored_shape for layout in layouts.values()}
    tiny.write(folder, golden, dtype, config=config)


@pytest.mark.host
@pytest.mark.parametrize("case", LARGER)
def test_peak_memory(group, case, tmp_path):
    """Its slices, one slice, and 10%: no rank has a whole tensor, a 16-bit copy, or both orders of a transposed one."""
    write_larger(tmp_path, case)
    mpitp.load_model(tmp_path, group)                           # imports and what is made once
    tracemalloc.start()
    model = mpitp.load_model(tmp_path, group)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(w.nbytes for w in model.weights.values())
    slices = model.local_bytes()
    assert everywhere(peak <= 1.1 * (slices + largest)), (peak, slices, largest)


# --- config.json -----------------------------------------------------------------------------------------------

def old_style(config):
    """As transformers 4 saved it: rope_theta, rope_scaling with "type" or "rope_type", torch_dtype."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    found = config.pop("rope_parameters", None)
    if found is None:
        return config
    type_key = "rope_type" if "full_attention" in found else "type"
    if "full_attention" in found:
        config["rope_local_base_freq"] = found["sliding_attention"]["rope_theta"]
        found = found["full_attention"]
    found = dict(found)
    of_neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if of_neox else "rope_theta"] = found.pop("rope_theta")
    part = found.pop("partial_rotary_factor", None)
    if part is not None:
        config["rotary_pct" if of_neox else "partial_rotary_factor"] = part
    kind = found.pop("rope_type")
    if kind != "default":
        config["rope_scaling"] = {type_key: kind, **found}
    return config


@pytest.mark.parametrize("case", tiny.CASES)
def test_both_styles_of_config(case, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path / "new", golden)
    tiny.write(tmp_path / "old", golden, config=old_style(golden["config"]))
    assert open_folder(tmp_path / "new").config == open_folder(tmp_path / "old").config


def test_what_config_json_leaves_out(tmp_path):
    """The first GPT-2's config.json says little; a null is as good as nothing."""
    golden = tiny.load("gpt2_unscaled")
    little = {key: golden["config"][key] for key in ("model_type", "vocab_size", "n_embd", "n_layer", "n_head",
                                                     "n_positions", "tie_word_embeddings")}
    tiny.write(tmp_path, golden, config={**little, "n_inner": None, "activation_function": None})
    config = open_folder(tmp_path).config
    assert (config.activation, config.scale, config.ffn_size, config.norm_epsilon) == ("gelu_tanh", 7 ** -0.5, 84, 1e-5)


def test_qwen2_before_layer_types(tmp_path):
    """The layers from max_window_layers on slide, where use_sliding_window says so and there is a window."""
    golden = tiny.load("qwen2")
    assert golden["config"]["max_window_layers"] == 1
    for changes, windows in [({}, (None, 4)), ({"use_sliding_window": False}, None), ({"sliding_window": None}, None),
                             ({"max_window_layers": 0}, 4)]:
        tiny.write(tmp_path, golden, config={**golden["config"], "layer_types": None, **changes})
        assert open_folder(tmp_path).config.sliding_window == windows


@pytest.mark.parametrize("changes, window", [({}, 3), ({"sliding_window": None}, None), ({"sliding_window": 5}, 5)])
def test_mistral_windows(changes, window, tmp_path):
    golden = tiny.load("mistral")
    tiny.write(tmp_path, golden, config={**golden["config"], **changes})
    assert open_folder(tmp_path).config.sliding_window == window


def test_what_mistral_has_where_nothing_is_said(tmp_path):
    golden = tiny.load("mistral")
    golden["config"].pop("sliding_window")
    tiny.write(tmp_path, golden)
    assert open_folder(tmp_path).config.sliding_window == 4096


def test_gemma3_pattern(tmp_path):
    """Before layer_types: every sliding_window_pattern-th layer is a full one."""
    golden = tiny.load("gemma3_text")
    config = {**golden["config"], "layer_types": None, "sliding_window_pattern": 2}
    tiny.write(tmp_path, golden, config=config)
    found = open_folder(tmp_path).config
    assert found.sliding_window == (3, None, 3) and [r.base for r in found.rotary] == [100, 5000, 100]


ROPE = dict(rope_theta=1e4, rope_type="yarn", factor=2.0, original_max_position_embeddings=16)


@pytest.mark.parametrize("case, changes, said", [
    ("llama", dict(model_type="mamba"), "found model_type 'mamba', expected one of gpt2, llama"),
    ("llama", dict(model_type=None), "found model_type 'None'"), ("llama", dict(model_type=[]), "model_type '[]'"),
    *[(case, {key: 3.5}, f"found {key} = 3.5, expected {repr(neutral[-1]) if neutral else 'none'}: it changes the "
                         f"results and is not supported")
      for key, neutral in REFUSED.items() for case in ("llama", "gpt2")],
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True, expected False"),
    ("gpt2", dict(embd_pdrop=0.0), "embd_pdrop = 0.0 and resid_pdrop = 0.1"),
    ("gpt2", dict(hidden_size=21), "n_embd = 20 and hidden_size = 21, expected one value"),
    ("gemma3_text", dict(final_logit_softcapping=-1.0), "final_logit_softcapping = -1.0"),
    ("stablelm", dict(is_causal=False), "is_causal = False, expected True"),
    ("gemma3", dict(is_causal=False), "is_causal = False, expected True"),
    ("gemma3_text", dict(layer_types=["full_attention"]), "expected a list of 3 names"),
    ("gemma3_text", dict(layer_types=["full_attention", "chunked_attention", "full_attention"]), "'chunked_attention'"),
    ("bloom", dict(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm = True"),
    ("bloom", dict(hidden_dropout=0.1), "hidden_dropout = 0.1"), ("falcon_7b", dict(alibi=True), "alibi = True"),
    ("falcon_7b", dict(num_ln_in_parallel_attn=2), "num_ln_in_parallel_attn = 2"),
    ("falcon_40b", dict(parallel_attn=False), "parallel_attn = False"),
    ("gpt_neox", dict(hidden_dropout=0.1), "hidden_dropout = 0.1"),
    ("gpt_neox", dict(rope_parameters=None, rotary_pct=0.2), "found 0.2 of 8 features that are rotated"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
    ("llama", dict(rope_parameters=dict(ROPE, rope_type="ntk")), "rope_type 'ntk', expected one of default"),
    ("llama", dict(rope_parameters=dict(ROPE, rope_type="longrope")), "found no short_factor, expected it there"),
    ("llama", dict(rope_parameters=dict(ROPE, novel=1)), "rope_parameters: found 'novel', expected no such key"),
    ("llama", dict(rope_parameters=dict(ROPE, factor=0)), "factor = 0, expected a number above 0"),
    ("llama", dict(rope_parameters=dict(ROPE, beta_fast="fast")), "beta_fast = 'fast'"),
    ("llama", dict(rope_parameters=dict(ROPE, truncate=1)), "truncate = 1, expected true or false"),
    ("llama", dict(rope_parameters=dict(ROPE, rope_type="llama3", low_freq_factor=4, high_freq_factor=1)), "low_freq"),
    ("llama", dict(rope_parameters=dict(ROPE, rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_fac"),
    ("falcon_7b", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
    ("qwen2", dict(rope_parameters=dict(full_attention=dict(ROPE, rope_type="linear"))), "found 'full_attention'"),
    ("llama", dict(rope_parameters=[]), "rope_parameters = [], expected an object"),
    ("llama", dict(hidden_act="quick_gelu"), "hidden_act = 'quick_gelu'"),
    ("llama", dict(vocab_size=-1), "vocab_size = -1, expected a positive integer"),
    ("llama", dict(vocab_size=1 << 50), "vocab_size"), ("llama", dict(num_hidden_layers=10 ** 12), "num_hidden_layers"),
    ("llama", dict(num_attention_heads=10 ** 12, num_key_value_heads=1), "num_attention_heads = 10"),
    ("llama", dict(num_attention_heads=1000), r"q_proj.weight: found shape \(30, 20\), expected \(6000, 20\)"),
    ("llama", dict(hidden_size=20.0), "hidden_size = 20.0"), ("llama", dict(vocab_size=None), "found no vocab_size"),
    ("llama", dict(num_key_value_heads=2), "num_key_value_heads|num_query_groups"),
    ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    ("llama", dict(rms_norm_eps=10 ** 400), "rms_norm_eps"),
    ("llama", dict(tie_word_embeddings="yes"), "tie_word_embeddings = 'yes'"),
    ("llama", dict(vocab_size=38), r"embed_tokens.weight: found shape \(37, 20\), expected \(38, 20\) by config.json"),
    ("llama", dict(mlp_bias=True), r"found no model.layers.\*.mlp.down_proj.bias \(2\), model.layers.\*.mlp.gate_"
                                   r"proj.bias \(2\), .*, expected the 27 tensors that config.json describes"),
    ("llama", dict(num_hidden_layers=1), r"found the unexpected model.layers.1.input_layernorm.weight, .* and 3 more"),
    ("llama", dict(num_hidden_layers=3), r"found no model.layers.2.input_layernorm.weight"),
])
def test_refused(ordinary, case, changes, said, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden, config={**golden["config"], **changes})
    with pytest.raises(InputError) as caught:
        mpitp.load_model(tmp_path, ordinary)
    text = str(caught.value)
    assert (said in text or re.search(said, text)) and "expected" in text and "\n" not in text and len(text) < 1000


# --- tensors -----------------------------------------------------------------------------------------------------

def rename(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: w for name, w in change(tensors).items()}, folder / "model.safetensors")


@pytest.mark.parametrize("case", ["gpt2", "bloom", "falcon_7b", "gemma3_text", "qwen2"])
def test_the_bare_model(group, case, tmp_path):
    """Saved without its head, as the first GPT-2 and BLOOM: names without the prefix."""
    golden = tiny.load(case)
    prefix = family_named(golden["config"]["model_type"]).prefix
    tiny.write(tmp_path, golden)
    rename(tmp_path, lambda tensors: {name.removeprefix(prefix): w for name, w in tensors.items()})
    model = mpitp.load_model(tmp_path, group)
    assert np.abs(logits_of(model, golden["ids"]) - golden["logits"]).max() < 1e-4


@pytest.mark.parametrize("case, more", [
    ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 4, 4), "transformer.h.1.attn.masked_bias": (1,),
              "lm_head.weight": (37, 20)}),
    ("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (3,)}), ("qwen2", {"lm_head.weight": (37, 20)}),
    ("gpt_neox", {"gpt_neox.layers.0.attention.bias": (1, 1, 4, 4), "gpt_neox.layers.1.attention.masked_bias": (1,),
                  "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (1,)}),
])
def test_stored_buffers(case, more, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden)
    rename(tmp_path, lambda tensors: {**tensors, **{name: np.ones(shape, "f") for name, shape in more.items()}})
    open_folder(tmp_path)


@pytest.mark.parametrize("change, said", [
    (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": np.ones(30, "f")},
     "the unexpected model.layers.0.self_attn.q_proj.bias, expected the 21 tensors"),
    (lambda t: {n: w for n, w in t.items() if n != "model.norm.weight"},
     "found no model.norm.weight, expected the 21 tensors"),
    (lambda t: {n.replace("lm_head", "head"): w for n, w in t.items()},
     "no lm_head.weight and the unexpected head.weight"),
    (lambda t: {**t, "lm_head.weight": np.ones((37, 20), np.int8)}, "lm_head.weight: found I8, expected F32"),
    (lambda t: {**t, "lm_head.weight": np.ones(740, "f")},
     r"lm_head.weight: found shape \(740,\), expected \(37, 20\)"),
])
def test_tensors_that_do_not_fit(ordinary, change, said, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"))
    rename(tmp_path, change)
    with pytest.raises(InputError, match=said):
        mpitp.load_model(tmp_path, ordinary)


def test_pickled_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="found pickled weights"):
        open_folder(tmp_path)


@pytest.mark.host
@pytest.mark.parametrize("case", ["gpt2", "falcon_40b"])
def test_pieces_for_a_device(group, case, tmp_path, monkeypatch):
    """Rows go to a device a few at a time; here the device is host memory."""
    tiny.write(tmp_path, tiny.load(case), ml_dtypes.bfloat16)
    whole = mpitp.load_model(tmp_path, group)
    folder, copies = open_folder(tmp_path), []

    class Device:
        def asarray(self, array):
            copies.append(array.size)
            return array

    monkeypatch.setattr(loading, "PIECE", 50)
    for name, spec in whole.specs.items():
        out = np.zeros_like(whole.weights[name])
        loading.read_slice(folder.views[name], spec.window(group.place), out, Device())
        assert out.tobytes() == whole.weights[name].tobytes()
    assert max(copies) <= 60                                    # one row where a row has more than 50


def test_rank_0_looks_first(world, tmp_path):
    """Where its folder is damaged no other rank opens its own."""
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden, config=None if world.rank else json.loads("{}"))
    with mpitp.TensorParallelGroup(check=True) as group:
        with pytest.raises(InputError, match="found model_type 'None'"):
            mpitp.load_model(tmp_path, group)
