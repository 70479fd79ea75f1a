"""Families: what a table reads it writes; the feed-forward block of all; the text model of a folder with images, too.

Logits and greedy tokens of every family are in test_load_model.py, well-known config.json in test_config_keys.py.
"""
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import make_tiny_checkpoints as tiny
import mpitp
from mpitp import DecoderConfig, InputError, Rotary
from mpitp.checkpoints.families import MODULES, config_json, described, family_named
from mpitp.checkpoints.families.keys import Keys
from mpitp.checkpoints.loading import feed_forward
from mpitp.checkpoints.model_folder import CheckpointWarning, open_folder
from mpitp.checkpoints.safetensors import Checkpoint
from ordinary_configs import ORDINARY
from spmd import everywhere, job

LONGROPE = dict(type="su", short_factor=[1.0, 1.1, 1.3], long_factor=[1.2, 2.0, 4.5])
SLIDING = "sliding_attention"
IMAGES = pytest.mark.filterwarnings("ignore::mpitp.checkpoints.model_folder.CheckpointWarning")


@IMAGES
@pytest.mark.parametrize("case", tiny.CASES)
def test_what_a_family_writes_it_reads(case, tmp_path):
    tiny.write(tmp_path, tiny.load(case))
    folder = open_folder(tmp_path)
    family = family_named(folder.family.saved_as or folder.family.model_type)
    again = Keys(json.loads(json.dumps(config_json(folder.config, family))))
    assert described(family.config(again)) == described(folder.config) and again.unknown() == []


def test_a_family_is_at_most_60_lines():
    """What families share is data of the files beside them."""
    folder = Path(mpitp.__file__).parent / "checkpoints" / "families"
    lengths = {name: len((folder / f"{name}.py").read_text().splitlines()) for name in set(MODULES.values())}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_a_window_that_is_not_used_is_no_unknown_key():
    keys = Keys(dict(ORDINARY["SmolLM3"], sliding_window=5))
    assert family_named("smollm3").config(keys).sliding_window is None and keys.unknown() == []


@pytest.mark.parametrize("case, changes, said", [
    ("opt", dict(word_embed_proj_dim=10), "found word_embed_proj_dim = 10, expected 20"),
    ("opt", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine = False, expected True"),
    ("phi3", dict(lm_head_bias=True), "lm_head_bias = True, expected False"),
    ("stablelm", dict(head_dim=10), "found head_dim = 10, expected none"),
    ("gemma", dict(hidden_activation="silu"), "found hidden_activation = 'silu'"),
    ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention = True, expected False"),
    ("ministral", dict(sliding_window=None), "expected full_attention where there is no sliding_window"),
    ("glm", dict(sliding_window=3), "found sliding_window = 3, expected none"),
    ("hunyuan", dict(use_cla=True), "use_cla = True, expected False"),
    ("hunyuan", dict(use_qk_norm=False), "use_qk_norm = False, expected True"),
    ("smollm3", dict(no_rope_layers=[1, 2, 0]), "expected a list of 3 times 0 or 1"),
    ("smollm3", dict(layer_types=[SLIDING] * 3), "expected full_attention where there is no sliding_window"),
    ("granite", dict(logits_scaling=0), "logits_scaling = 0, expected a number above 0"),
    ("gemma2", dict(attn_logit_softcapping=-1.0), "attn_logit_softcapping = -1.0, expected a number above 0"),
    ("phi3", dict(rope_scaling=dict(type="linear", factor=2.0)), "found type = 'linear', expected default"),
    ("phi3_longrope", dict(rope_scaling=dict(LONGROPE, short_factor=[1.0])), "found 1 short_factors, expected 3"),
    ("phi3_longrope", dict(rope_scaling=dict(LONGROPE, long_factor=[1.0, 0, 2])), "found long_factor = [1.0, 0, 2]"),
    ("llama_dynamic", dict(max_position_embeddings=None), "found no max_position_embeddings, expected it there"),
    ("gemma3_text", dict(rope_scaling=dict(type="llama3", factor=2.0)), "rope_scaling: found type = 'llama3'"),
    ("olmo3", dict(rope_parameters=dict(full_attention=dict(tiny.YARN, truncate=False))), "found truncate = False"),
    ("gptj", dict(rotary_dim=7), "found rotary dim 7, expected a positive even number"),
    ("gemma3", dict(text_config=dict(final_logit_softcapping=9.0)), "found final_logit_softcapping = 9.0, expected no"),
    ("gemma3", dict(text_config=None), "found no text_config, expected it there"),
    ("gemma3", dict(text_config=dict(model_type="gemma2")), "text_config: found model_type = 'gemma2', expected"),
])
def test_refused_by_name(case, changes, said, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden, config={**golden["config"], **changes})
    with pytest.raises(InputError) as caught:
        open_folder(tmp_path)
    assert said in str(caught.value) and str(caught.value).startswith("config.json: "), caught.value


PAIRED = Rotary(interleaved=True)


def test_other_choices_of_a_config():
    """What a config.json does not say is what transformers has without it."""
    sizes = dict(vocab_size=37, hidden_size=48, num_hidden_layers=3, num_attention_heads=8, intermediate_size=9)
    for model_type, keys, expected in [
        ("ministral", {}, dict(sliding_window=4096, num_query_groups=8)),
        ("ministral", dict(sliding_window=None), dict(sliding_window=None)),
        ("phi3", {}, dict(sliding_window=None, norm_epsilon=1e-5)),
        ("phi3", dict(sliding_window=5, partial_rotary_factor=2 / 3), dict(sliding_window=5, rotary=Rotary(dim=4))),
        ("helium", dict(head_dim=6, num_key_value_heads=1),
         dict(norm_epsilon=1e-8, rotary=Rotary(base=1e5, interleaved=True), qkv_bias=False)),
        ("gemma", dict(num_key_value_heads=None), dict(kv_channels=256, num_query_groups=None, activation="gelu_tanh")),
        ("seed_oss", {}, dict(num_query_groups=8, kv_channels=128, qkv_bias=True, attention_bias=False,
                              attention_dropout=0.1)),
        ("gemma2", {}, dict(attention_softcap=50.0, logits_softcap=30.0, sliding_window=(4096, None, 4096))),
        ("gemma2", dict(attn_logit_softcapping=None, sliding_window=5, layer_types=[SLIDING] * 3),
         dict(attention_softcap=None, sliding_window=5)),
        ("cohere2", dict(sliding_window_pattern=2), dict(rotary=(PAIRED, None, PAIRED), norm_bias=False)),
        ("exaone4", dict(num_key_value_heads=8, sliding_window=None, layer_types=["full_attention"] * 3),
         dict(rotary=Rotary(), sliding_window=None)),
        ("exaone4", dict(num_key_value_heads=8, sliding_window=9, layer_types=["full_attention"] * 3),
         dict(rotary=(None, None, None))),
        ("smollm3", dict(no_rope_layer_interval=2, use_sliding_window=True, sliding_window=7),
         dict(rotary=(Rotary(base=2e6), None, Rotary(base=2e6)), sliding_window=(None, 7, None))),
        ("starcoder2", {}, dict(num_query_groups=2, mlp_bias=True, tie_word_embeddings=True)),
    ]:
        found = family_named(model_type).config(Keys({"model_type": model_type, **sizes, **keys}))
        assert {name: getattr(found, name) for name in expected} == expected, model_type


def test_a_choice_that_a_family_does_not_have():
    config = DecoderConfig(vocab_size=37, hidden_size=24, num_layers=2, num_attention_heads=4, position_offset=1,
                           position_embedding="learned", max_position_embeddings=9, activation="relu")
    with pytest.raises(InputError, match="found position_offset = 1, expected 2, as model_type opt has it"):
        config_json(config, family_named("opt"))


def test_layers_without_rotary_positions():
    turns = Rotary(base=100.0)
    config = DecoderConfig(vocab_size=37, hidden_size=24, num_layers=2, num_attention_heads=4, rotary=(turns, None))
    assert config.rotaries == (turns, None) and config.attention(1).rotary is None


def test_opt_without_its_first_name(group, tmp_path):
    """The first OPTs were saved as bare models: "decoder.embed_tokens.weight"."""
    golden = tiny.load("opt")
    tiny.write(tmp_path, golden)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): w for name, w in tensors.items()}, tmp_path / "model.safetensors")
    model = mpitp.load_model(tmp_path, group)
    logits = model.gather_logits(model.forward(np.array([golden["ids"]]), save=False)[0])[0]
    assert everywhere(np.abs(logits - golden["logits"]).max() < 1e-4)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_folder_with_images(world, prefix, tmp_path):
    """Loaded alone, with a warning, whatever its prefix is; and saved as a folder of the text model."""
    shared, golden = Path(world.bcast(str(tmp_path))), tiny.load("gemma3")
    if world.rank == 0:
        tiny.write(shared / "a", golden)
        (shared / "a" / "tokenizer.json").write_text("{}")
        tensors = load_file(shared / "a" / "model.safetensors")
        save_file({name.replace("language_model.model.", prefix): w for name, w in tensors.items()},
                  shared / "a" / "model.safetensors")
    world.barrier()
    with mpitp.TensorParallelGroup(check=True) as group:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = mpitp.load_model(shared / "a", group)
        texts = [str(found.message) for found in caught if found.category is CheckpointWarning]
        assert everywhere(texts == (["found 34 tensors of multi_modal_projector, vision_tower, expected those of the "
                                     "text model: left out"] if group.rank == 0 else []))
        mpitp.save_model(model, shared / "b")
        again = mpitp.load_model(shared / "b", group, strict=True)
        assert again.folder.family.model_type == "gemma3_text" and again.config == model.config
        assert everywhere(all(w.tobytes() == again.weights[name].tobytes() for name, w in model.weights.items()))
        assert (shared / "b" / "tokenizer.json").read_text() == "{}"
        world.barrier()


@IMAGES
@pytest.mark.parametrize("outer, inner, stored, is_tied", [
    (False, True, "language_model.lm_head", False), (False, None, "lm_head", False), (None, False, None, True),
    (True, False, None, True), (True, None, "language_model.lm_head", False)])
def test_the_head_of_a_folder_with_images(outer, inner, stored, is_tied, tmp_path):
    """Its config.json decides whether the head is tied, not the text_config inside it, as in transformers."""
    golden = tiny.load("gemma3")
    tiny.write(tmp_path, golden)
    config, tensors = golden["config"], tiny.tensors(golden)
    config.pop("tie_word_embeddings", None)
    config["text_config"].pop("tie_word_embeddings", None)
    config.update({} if outer is None else dict(tie_word_embeddings=outer))
    config["text_config"].update({} if inner is None else dict(tie_word_embeddings=inner))
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = 2 * tensors["language_model.model.embed_tokens.weight"]
    save_file({**tensors, **({} if stored is None else {f"{stored}.weight": head})}, tmp_path / "model.safetensors")
    folder = open_folder(tmp_path)
    assert folder.config.tie_word_embeddings == is_tied
    assert is_tied or np.array_equal(folder.views["head.weight"][:, :], head)
    said = f"found tie_word_embeddings = True, but {stored}.weight differs from the embedding"
    assert any(said in line for line in folder.warnings()) == (bool(outer) and not is_tied)


@IMAGES
@pytest.mark.parametrize("case", ["gemma", "gemma2", "opt", "gemma3", "gpt_bigcode", "phi3"])
def test_the_feed_forward_block_of_a_layer(case, tmp_path):
    """What `verify --model` checks: out of its tensors, or its rows of a fused one."""
    golden = tiny.load(case)
    tiny.write(tmp_path, golden)
    block, tensors = feed_forward(Checkpoint(tmp_path), 1), tiny.tensors(golden)
    up, down = (next(w for name, w in tensors.items() if re.search(rf"\.1\.(mlp\.)?({names})\.weight", name))
                for names in ("up_proj|fc1|c_fc|gate_up_proj", "down_proj|fc2|c_proj"))
    assert np.array_equal(block.weights["up.weight"][:, :], up[-block.ffn_hidden_size:])
    assert np.array_equal(block.weights["down.weight"][:, :], down) and block.hidden_size == len(down)


@pytest.mark.launcher
def test_verify_checks_it(tmp_path):
    tiny.write(tmp_path, tiny.load("gemma3"))
    done = job(2, "-m", "mpitp", "verify", "--model", str(tmp_path), "--layer", "1", "--seq-length", "9")
    assert done.returncode == 0 and "every check holds" in done.stdout, done.stdout + done.stderr
