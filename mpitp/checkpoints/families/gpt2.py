"""GPT-2 (Radford et al., 2019): learned positions; weights stored [in, out]; q, k and v in one tensor."""
from __future__ import annotations

from functools import partial
from operator import ne

from ...config import DecoderConfig
from ...errors import InputError
from .fused import one_after_another
from .keys import Keys
from .tables import FLAG, NUMBER, OF_GPT, SIZE, Key, Kind, Table

TENSORS = {
    "embedding": "wte",
    "position": "wpe",
    "attention_norm": "h.{}.ln_1",
    **{f"attention.{part}": "h.{}.attn.c_attn" for part in ("query", "key", "value")},
    "attention.out": "h.{}.attn.c_proj",
    "mlp_norm": "h.{}.ln_2",
    "mlp.up": "h.{}.mlp.c_fc",
    "mlp.down": "h.{}.mlp.c_proj",
    "final_norm": "ln_f",
    "head": "lm_head",
}
CONV1D = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")
OF_CLASSIFICATION = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
                     "summary_first_dropout", "summary_last_dropout")


def dropout(keys: Keys, of_embedding: str, of_branches: str, default: float) -> float:
    """Return the probability that both keys have. Raises InputError where they differ."""
    first, second = (keys.number(name, default=default) for name in (of_embedding, of_branches))
    if first != second:
        raise InputError(f"{keys.where}: found {of_embedding} = {first} and {of_branches} = {second} ({default} where "
                         f"config.json has none), expected one value: two are not supported")
    return first


def unscaled(keys: Keys, name: str, default: bool) -> float | None:
    """Return the factor of the scores, None for the usual one."""
    return None if keys.flag(name, default=default) else 1.0


def of_branches(config: DecoderConfig) -> dict:
    """Return the second key of the dropout."""
    return {"resid_pdrop": config.hidden_dropout}


KEYS = {**OF_GPT, "attention_dropout": Key(NUMBER, "attn_pdrop", 0.1),
        "attention_scale": Key(Kind(unscaled, partial(ne, 1.0)), "scale_attn_weights", True),
        "tie_word_embeddings": Key(FLAG, "tie_word_embeddings", True)}
TABLE = Table({**KEYS, "max_position_embeddings": Key(SIZE, "n_positions max_position_embeddings"),
               "hidden_dropout": Key(Kind(dropout), "embd_pdrop resid_pdrop", 0.1)},
              dict(position_embedding="learned"), rope=None, more=of_branches)

FAMILIES = [TABLE.family("gpt2", "GPT2LMHeadModel", TENSORS, "transformer.", fused=one_after_another, transposed=CONV1D,
                         buffers=r".*\.attn\.(bias|masked_bias)",
                         without_effect=("reorder_and_upcast_attn", *OF_CLASSIFICATION),
                         refused=(("scale_attn_by_inverse_layer_idx", (False,)),))]
