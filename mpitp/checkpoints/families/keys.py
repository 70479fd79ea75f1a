"""The keys of a config.json: each is read by its family, known to be without effect in it, or refused by name."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, NoReturn

from ...errors import InputError, is_integer
from .activations import ACTIVATIONS

REQUIRED = object()
MOST = 1 << 40                  # no model has as many of anything

# Keys that change the results in some family and that no family here has: the values that change nothing. null, [] and
# {} change nothing anywhere.
REFUSED = {
    "quantization_config": (), "is_encoder_decoder": (False,), "pruned_heads": (), "add_cross_attention": (False,),
    "per_layer_config": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "attention_multiplier": (), "residual_multiplier": (1,), "embedding_multiplier": (1,), "logits_scaling": (1,),
    "logit_scale": (1,), "clip_qkv": (), "num_experts": (0,), "num_local_experts": (0,), "n_routed_experts": (0,),
}

# Keys that change nothing in any family here: what saved the file, how to train, to sample, to classify, to lay out
# memory; and notes of other programs.
WITHOUT_EFFECT = frozenset("""
    _attn_implementation _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path _num_labels
    architectures attn_implementation auto_map bos_token_id cache_implementation chunk_size_feed_forward
    classifier_dropout custom_pipelines decoder_start_token_id dtype eos_token_id finetuning_task gradient_checkpointing
    id2label is_decoder label2id language max_position_embeddings max_sequence_length model_type n_ctx name_or_path
    num_labels output_attentions output_hidden_states output_past pad_token_id prefix problem_type return_dict
    sep_token_id seq_length task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16
    use_cache
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
""".split())


class Keys:
    """Keys are those of a config.json, or of an object in it; each that is asked for counts as known.

    values : the JSON object
    where : its name in messages
    most_layers, most_features : more than the files can hold, so that a hostile number costs nothing
    """

    def __init__(self, values: dict, where: str = "config.json", most_layers: int = MOST, most_features: int = MOST):
        self.values, self.where, self.most_layers, self.most_features = values, where, most_layers, most_features
        self.known: set[str] = set()
        self.inside: list[Keys] = []

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """Return the value under the first of these names that exists and is not null, else the default."""
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        self.known.update(names)
        if not found:
            if default is REQUIRED:
                raise InputError(f"{self.where}: found no {' or '.join(names)}, expected it there")
            return default
        first = next(iter(found))
        for name, value in found.items():
            if value != found[first]:
                raise InputError(f"{self.where}: found {first} = {short(found[first])} and {name} = {short(value)}, "
                                 f"expected one value")
        return found[first]

    def fail(self, names: Iterable[str], value: object, expected: str) -> NoReturn:
        """Raise InputError for the value under the first of these names that exists."""
        names = list(names)
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        raise InputError(f"{self.where}: found {name} = {short(value)}, expected {expected}")

    def count(self, *names: str, default: Any = REQUIRED, most: int = MOST) -> Any:
        """Return the positive integer under the key, or the default, which may be None."""
        value = self.get(*names, default=default)
        if value is not default and not (is_integer(value) and 0 < value <= most):
            self.fail(names, value, f"a positive integer, at most {most}")
        return value

    def size(self, *names: str, default: Any = REQUIRED) -> Any:
        """Return a positive integer that is the size of a tensor's axis, or divides it."""
        return self.count(*names, default=default, most=self.most_features)

    def layers(self, *names: str) -> int:
        """Return the number of layers."""
        return self.count(*names, most=self.most_layers)

    def number(self, *names: str, default: Any = REQUIRED, above: float | None = None) -> Any:
        """Return the finite number under the key, or the default, which may be None."""
        value = self.get(*names, default=default)
        if value is not default:
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
            if not (good and isfinite(value) and (above is None or value > above)):
                self.fail(names, value, "a number" if above is None else f"a number above {above}")
            value = float(value)
        return value

    def flag(self, *names: str, default: Any = REQUIRED) -> bool:
        """Return the true or false under the key, or the default."""
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            self.fail(names, value, "true or false")
        return value

    def activation(self, name: str, default: str) -> str:
        """DecoderConfig's activation, by the family's key and the name that config.json has for it."""
        value = self.get(name, default=default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.fail([name], value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def inner(self, *names: str) -> Keys | None:
        """Return the keys of an object inside, None where there is none."""
        value = self.get(*names, default=None)
        if value is not None and not isinstance(value, dict):
            self.fail(names, value, "an object")
        return None if value is None else Keys(value, f"{self.where}: {names[0]}")

    def part(self, name: str, defaults: Mapping[str, Any], outer: Mapping[str, Any]) -> Keys:
        """Return the keys of the config.json of a part of the model, which is an object inside this one.

        defaults : what it has where it says nothing; outer : what the whole model decides, whatever it says

        Raises InputError where there is none.
        """
        found = self.inner(name)
        if found is None:
            raise InputError(f"{self.where}: found no {name}, expected it there")
        self.inside.append(Keys({**defaults, **found.values, **outer}, found.where, self.most_layers,
                                self.most_features))
        return self.inside[-1]

    def layer_types(self, layers: int) -> list[str] | None:
        """Return layer_types, "sliding_attention" or "full_attention" of each layer; None where there is none."""
        kinds = self.get("layer_types", default=None)
        if kinds is None:
            return None
        if not (isinstance(kinds, list) and len(kinds) == layers and all(isinstance(kind, str) for kind in kinds)):
            self.fail(["layer_types"], kinds, f"a list of {layers} names, one a layer")
        for kind in kinds:
            if kind not in ("sliding_attention", "full_attention"):
                self.fail(["layer_types"], kind, "sliding_attention or full_attention")
        return kinds

    def ignore(self, names: Iterable[str]) -> None:
        """Note keys that change nothing in this family."""
        self.known.update(names)

    def refuse(self, neutral: Mapping[str, tuple]) -> None:
        """Raise InputError for a key whose value is none of these, nor empty: it would change the results.

        neutral : {key: the values that change nothing}
        """
        for name, harmless in neutral.items():
            found = self.get(name, default=None)
            if found not in (None, [], {}) and found not in harmless:
                expected = repr(harmless[-1]) if harmless else "none"
                raise InputError(f"{self.where}: found {name} = {short(found)}, expected {expected}: it changes the "
                                 f"results and is not supported")

    def unknown(self) -> list[str]:
        """Return the keys that are neither read nor known to change nothing; null says nothing."""
        found = sorted(key for key in set(self.values) - self.known if self.values[key] is not None)
        return found + [key for part in self.inside for key in part.unknown()]


def short(value: object, most: int = 80) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
