"""Every key of config.json is read, known to be without effect in its family, or refused by name; nothing is left out
silently."""
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import make_tiny_checkpoints as tiny
import mpitp
from mpitp import InputError
from mpitp.checkpoints.families import MODULES, family_named
from mpitp.checkpoints.families.keys import Keys
from mpitp.checkpoints.json_files import read_json
from mpitp.checkpoints.model_folder import CheckpointWarning, open_folder
from ordinary_configs import ORDINARY
from spmd import everywhere, job

@pytest.mark.parametrize("name", ORDINARY)
def test_no_false_alarm(name):
    keys = Keys(ORDINARY[name])
    family_named(ORDINARY[name]["model_type"]).config(keys)
    assert keys.unknown() == []


def test_every_family_has_an_ordinary_folder():
    assert {config["model_type"] for config in ORDINARY.values()} == set(MODULES)


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("case, changes, said", [
    *[(case, dict(is_causal=False), "found is_causal = False, expected True: it changes the results")
      for case in ("stablelm", "nemotron", "gemma3")],
    ("llama", dict(per_layer_config={"0": {"num_attention_heads": 2}}), "found per_layer_config"),
    ("llama", dict(sliding_window=3), "found sliding_window = 3, expected none"),
    ("llama", dict(layer_types=[SLIDING, FULL]), "found layer_types = 'sliding_attention', expected full_attention in"),
    ("llama", dict(rope_interleaved=True), "found rope_interleaved = True"),
    ("mistral", dict(layer_types=[FULL, FULL]), "found layer_types = 'full_attention', expected sliding_attention in"),
    ("mistral", dict(layer_types=[SLIDING, FULL]), "found layer_types = 'full_attention'"),
    ("mistral", dict(layer_types=[SLIDING]), "expected a list of 2 names"),
    ("mistral", dict(layer_types=[SLIDING, SLIDING], sliding_window=None), "found layer_types = 'sliding_attention'"),
    ("qwen2", dict(use_sliding_window=False), "expected full_attention where there is no sliding_window"),
    ("qwen2", dict(use_mrope=True), "found use_mrope = True, expected False"),
    ("gemma3_text", dict(sliding_window=None), "expected full_attention where there is no sliding_window"),
    ("gemma3_text", dict(rope_parameters=dict(rope_type="linear", factor=8.0)), "found 'factor', expected an object"),
    ("gpt_neox", dict(head_dim=4), "found head_dim = 4, expected 8"),
    ("bloom", dict(slow_but_exact=True, pretraining_tp=2), "found pretraining_tp = 2, expected 1"),
    ("falcon_7b", dict(apply_residual_connection_post_layernorm=True), "_connection_post_layernorm = True, expected"),
])
def test_refused_by_name(case, changes, said, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden, config={**golden["config"], **changes})
    with pytest.raises(InputError) as caught:
        open_folder(tmp_path)
    assert said in str(caught.value) and str(caught.value).startswith("config.json: "), caught.value


@pytest.mark.parametrize("case, changes, window", [
    ("mistral", dict(is_causal=False), 4), ("gpt2", dict(is_causal=False), None),
    ("gemma3_text", dict(use_bidirectional_attention=True, sliding_window=7), (4, None, 4)),
    ("gemma3_text", dict(use_bidirectional_attention=True, is_causal=False), (3, None, 3)),
    ("gemma3_text", dict(use_bidirectional_attention=None), None)])
def test_both_directions(case, changes, window, tmp_path):
    """Ours count the query itself: |query - key| <= sliding_window, and in Gemma 3 half of it, in transformers."""
    golden = tiny.load(case)
    keys = Keys({**golden["config"], **changes})
    found = family_named(golden["config"]["model_type"]).config(keys)
    assert found.causal == (changes.get("use_bidirectional_attention", 0) is None)
    assert (found.sliding_window == window or found.causal) and keys.unknown() == []


@pytest.mark.parametrize("case, changes", [
    ("bloom", dict(slow_but_exact=True, pretraining_tp=1)), ("bloom", dict(slow_but_exact=False, pretraining_tp=4)),
    ("llama", dict(is_causal=True, num_experts=0, residual_multiplier=1.0, layer_types=[FULL, FULL])),
    ("mistral", dict(layer_types=[SLIDING, SLIDING])), ("gpt2", dict(temperature=0.7, max_length=50, pruned_heads={})),
])
def test_what_changes_nothing(case, changes, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path / "plain", golden)
    tiny.write(tmp_path / "more", golden, config={**golden["config"], **changes})
    more = open_folder(tmp_path / "more", strict=True)
    assert more.config == open_folder(tmp_path / "plain").config and more.warnings() == []


def test_keys_that_no_family_knows(world, tmp_path):
    """A warning on rank 0, in the name of config.json; an error on every rank with strict."""
    golden = tiny.load("qwen3")
    tiny.write(tmp_path, golden, config={**golden["config"], "a_key_of_tomorrow": 1, "another": [2], "nothing": None})
    with mpitp.TensorParallelGroup(check=True) as group:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mpitp.load_model(tmp_path, group)
        texts = [str(found.message) for found in caught if found.category is CheckpointWarning]
        assert everywhere(len(texts) == (group.rank == 0))
        assert all(text == "found 'a_key_of_tomorrow', 'another', expected keys that model_type qwen3 has: left out"
                   for text in texts)
        with pytest.raises(InputError, match="config.json: found 'a_key_of_tomorrow', 'another', expected"):
            mpitp.load_model(tmp_path, group, strict=True)


@pytest.mark.launcher
def test_the_commands_warn(tmp_path):
    golden = tiny.load("llama")
    tiny.write(tmp_path, golden, config={**golden["config"], "a_key_of_tomorrow": 1})
    (tmp_path / "ids").write_text("1 2 3")
    folder = str(tmp_path)
    for command in (["generate", "--model", folder, "--ids", "1", "--max-new-tokens", "2"],
                    ["score", "--model", folder, "--ids-file", str(tmp_path / "ids")], ["inspect", folder]):
        done = job(2, "-m", "mpitp", *command)
        assert done.returncode == 0 and done.stderr.count("a_key_of_tomorrow") == 1, done.stderr
        assert done.stderr.count("\n") == 1
        done = job(2, "-m", "mpitp", *command, "--strict")
        assert done.returncode == 2 and not done.stdout and done.stderr.count("mpitp: ") == 1, done.stderr
        assert "found 'a_key_of_tomorrow', expected keys that model_type llama has" in done.stderr
    done = job(2, "-m", "mpitp", "verify", "--model", folder)
    assert done.returncode == 0 and done.stderr.count("a_key_of_tomorrow") == 1, done.stderr


# --- tensors -----------------------------------------------------------------------------------------------------

def add(folder, **tensors):
    """Store more tensors; None removes one."""
    stored = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({name: w for name, w in stored.items() if w is not None}, folder / "model.safetensors",
              metadata={"format": "pt"})


def test_a_head_of_its_own_is_used_and_saved(world, tmp_path):
    """transformers does not tie it either; test_load_model has its logits."""
    golden = tiny.load("gpt2_own_head")
    tiny.write(tmp_path / "a", golden)
    with mpitp.TensorParallelGroup(check=True) as group:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = mpitp.load_model(tmp_path / "a", group)
        assert not model.config.tie_word_embeddings and "head.weight" in model.weights
        texts = [str(found.message) for found in caught if found.category is CheckpointWarning]
        assert everywhere(texts == (["found tie_word_embeddings = True, but lm_head.weight differs from the embedding: "
                                     "the head is used as it is stored"] if group.rank == 0 else []))
        shared = world.bcast(str(tmp_path))
        mpitp.save_model(model, f"{shared}/b")
        stored, config = load_file(f"{shared}/b/model.safetensors"), read_json(f"{shared}/b/config.json")
        assert np.array_equal(stored["lm_head.weight"], tiny.tensors(golden)["lm_head.weight"])
        assert config == {**golden["config"], "tie_word_embeddings": False}
        world.barrier()


@pytest.mark.parametrize("case, embedding", [("gpt2", "transformer.wte.weight"),
                                             ("qwen2", "model.embed_tokens.weight")])
def test_a_head_that_equals_the_embedding_is_tied(world, case, embedding, tmp_path):
    golden = tiny.load(case)
    tiny.write(tmp_path, golden)
    w = tiny.tensors(golden)[embedding]
    add(tmp_path, **{"lm_head.weight": w})
    folder = open_folder(tmp_path)
    assert folder.config.tie_word_embeddings and folder.warnings() == []
    changed = w.copy()
    changed[-1, -1] += 1
    add(tmp_path, **{"lm_head.weight": changed})
    assert open_folder(tmp_path).own_head
    add(tmp_path, **{"lm_head.weight": np.ones((38, 20), "f")})
    with pytest.raises(InputError, match=r"lm_head.weight: found shape \(38, 20\), expected \(37, 20\)"):
        open_folder(tmp_path)
    add(tmp_path, **{"lm_head.weight": w, embedding: None})            # tied, under the other name
    with mpitp.TensorParallelGroup(check=True) as group:
        model = mpitp.load_model(tmp_path, group)
        logits = model.gather_logits(model.forward(np.array([golden["ids"]]), save=False)[0])[0]
    assert everywhere(np.abs(logits - golden["logits"]).max() < 1e-4)


TRI = np.tri(19, dtype="f")[None, None]


@pytest.mark.parametrize("case, name, right, wrong", [
    ("gpt2", "transformer.h.0.attn.bias", TRI, np.ones_like(TRI)),
    ("gpt2", "transformer.h.1.attn.masked_bias", np.array(-1e4, "f"), np.ones(3, "f")),
    ("gpt_neox", "gpt_neox.layers.0.attention.bias", TRI.astype(bool), TRI[0]),
    ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", np.ones(1, "f"), np.full(1, 2, "f")),
    ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", 1e4 ** -(np.arange(3, dtype="f") / 3),
     5e5 ** -(np.arange(3, dtype="f") / 3)),
])
def test_stored_buffers_are_what_the_model_computes_or_named(case, name, right, wrong, tmp_path):
    tiny.write(tmp_path, tiny.load(case))
    add(tmp_path, **{name: right.astype(right.dtype)})
    assert open_folder(tmp_path).warnings() == []
    add(tmp_path, **{name: wrong})
    (text,) = open_folder(tmp_path).warnings()
    assert text == f"found {name} with values of its own, expected those that the model computes: left out"


def test_another_prefix_is_named(tmp_path):
    golden = tiny.load("gemma3_text")
    tiny.write(tmp_path, golden)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({f"language_model.{name}": w for name, w in stored.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="found 'language_model.model.embed_tokens.weight', expected "
                                         "'model.embed_tokens.weight' or 'embed_tokens.weight'"):
        open_folder(tmp_path)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("scalar", [0, -1, 0.0, float("inf"), "256"])
def test_a_query_pre_attn_scalar_of_0(case, scalar, tmp_path):
    """Its inverse square root is the factor of the scores."""
    golden = tiny.load(case)
    tiny.write(tmp_path, golden, config={**golden["config"], "query_pre_attn_scalar": scalar})
    with pytest.raises(InputError, match="found query_pre_attn_scalar = "):
        open_folder(tmp_path)
