"""What a family has where config.json says nothing is what transformers has: a key left out changes nothing.

tests/data/family_defaults.json has transformers' own configs of all families; support/make_family_defaults.py wrote it.
"""
import json

import pytest

from mpitp import InputError
from mpitp.checkpoints.families import MODULES, described, family_named
from mpitp.checkpoints.families.keys import Keys
from spmd import ROOT

CONFIGS = json.loads((ROOT / "tests" / "data" / "family_defaults.json").read_text())["configs"]
SIZES = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "n_embd",
         "n_head", "n_layer", "n_positions", "ffn_dim", "text_config"}      # those that a config.json must have


def test_every_family_is_there():
    assert CONFIGS.keys() == MODULES.keys()


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_key_that_is_left_out_has_transformers_default(model_type):
    family, whole = family_named(model_type), CONFIGS[model_type]
    expected, required = described(family.config(Keys(whole))), set()
    for left_out in whole:
        try:
            found = family.config(Keys({key: value for key, value in whole.items() if key != left_out}))
        except InputError:
            required.add(left_out)
        else:
            assert described(found) == expected, left_out
    assert required <= SIZES
