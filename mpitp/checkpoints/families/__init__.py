"""Families of checkpoints, one small table each: config keys, tensor names, fused layouts."""
from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from math import isclose

from ...config import DecoderConfig
from ...errors import InputError
from .directions import causal_form
from .family import Family
from .keys import Keys, short

MODULES = {     # model_type: the file of its table
    "gpt2": "gpt2", "llama": "llama", "mistral": "llama", "ministral": "llama", "qwen2": "llama", "qwen3": "llama",
    "seed_oss": "llama", "helium": "llama", "gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma3",
    "gemma3": "gemma3", "phi": "phi", "phi3": "phi3", "glm": "glm", "glm4": "glm", "stablelm": "stablelm",
    "starcoder2": "starcoder2",
    "gpt_neox": "gpt_neox", "gptj": "gptj", "gpt_bigcode": "gpt_bigcode", "opt": "opt", "falcon": "falcon",
    "bloom": "bloom", "arcee": "arcee", "nemotron": "nemotron", "granite": "granite", "cohere": "cohere",
    "cohere2": "cohere", "exaone4": "exaone4", "smollm3": "smollm3", "hunyuan_v1_dense": "hunyuan", "olmo2": "olmo",
    "olmo3": "olmo",
}
OF_TRAINING = ("hidden_dropout", "attention_dropout", "init_method_std")        # no part of what a checkpoint computes


def family_named(model_type: object) -> Family:
    """Return the Family of a config.json's model_type. Raises InputError for one that is not known."""
    if not isinstance(model_type, str) or model_type not in MODULES:
        raise InputError(f"config.json: found model_type {str(model_type)[:80]!r}, expected one of "
                         f"{', '.join(MODULES)}")
    module = import_module(f".{MODULES[model_type]}", __name__)
    return next(family for family in module.FAMILIES if family.model_type == model_type)


def config_json(config: DecoderConfig, family: Family) -> dict:
    """Return the config.json of a DecoderConfig as a Family has it.

    Raises InputError naming the first choice that the family cannot express: what is written is read again.
    """
    in_one_direction, direction = causal_form(config)
    # A family's own padding token may be outside of this vocabulary, which transformers refuses.
    keys = {"architectures": [family.architecture], "model_type": family.model_type, "pad_token_id": None,
            **family.write(in_one_direction), **direction}
    positions = "n_positions" if "n_positions" in keys else "max_position_embeddings"
    if keys.get(positions) is None:
        keys[positions] = config.max_position_embeddings or 2048
    written, wanted = described(family.config(Keys(keys))), described(config)
    for name, value in wanted.items():
        if written[name] != value and not (isinstance(value, float) and isclose(written[name], value, rel_tol=1e-12)):
            raise InputError(f"found {name} = {short(value)}, expected {short(written[name])}, as model_type "
                             f"{family.model_type} has it")
    return keys


def described(config: DecoderConfig) -> dict:
    """Return the fields of a config with every default filled in, so that two that mean the same are equal."""
    found = {name: value for name, value in vars(config).items() if name not in OF_TRAINING}
    found.update(num_query_groups=config.query_groups, kv_channels=config.head_dim, ffn_hidden_size=config.ffn_size,
                 attention_scale=config.scale, norm_bias=config.has_norm_bias,
                 sliding_window=config.windows,
                 rotary=[dict(asdict(turns), dim=turns.dim or config.head_dim) if turns else None
                         for turns in config.rotaries])
    if config.position_embedding != "learned":
        found.pop("max_position_embeddings")
    return found
