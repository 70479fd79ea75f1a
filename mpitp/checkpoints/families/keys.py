"""The keys of a config.json, each looked at once, by kind, and refused by name where it is not what it should be."""
from math import isfinite

from ...errors import InputError, is_integer
from .activations import ACTIVATIONS

REQUIRED = object()
MOST = 1 << 40                  # no model has as many of anything

# Keys of any family that change the results and that no family here has, and the value that changes nothing.
REFUSED = {
    "quantization_config": None, "is_encoder_decoder": False, "pruned_heads": None, "add_cross_attention": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_multiplier": None,
    "residual_multiplier": 1, "embedding_multiplier": 1, "logits_scaling": 1, "logit_scale": 1, "clip_qkv": None,
    "num_experts": None, "num_local_experts": None, "n_routed_experts": None,
}

# Keys that change nothing here: how to train, to sample, to lay out memory, and what saved the file.
HARMLESS = {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_model_name_or_path",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "tokenizer_class", "task_specific_params", "problem_type", "id2label", "label2id", "return_dict",
    "output_attentions", "output_hidden_states", "use_cache", "chunk_size_feed_forward", "is_decoder", "prefix",
    "max_position_embeddings", "pretraining_tp", "slow_but_exact", "reorder_and_upcast_attn", "classifier_dropout",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "_sliding_window_pattern", "cache_implementation", "n_ctx", "gradient_checkpointing", "model_type",
}


class Keys:
    """The keys of a config.json.

    values : the JSON object
    most_layers, most_features : more than the files can hold, so that a hostile number costs nothing
    """

    def __init__(self, values, where="config.json", most_layers=MOST, most_features=MOST):
        self.values, self.where, self.most_layers, self.most_features = values, where, most_layers, most_features
        self.looked_at = set()

    def get(self, *names, default=REQUIRED):
        """The value under the first of these names that is there and not null, else the default."""
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        self.looked_at.update(names)
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

    def fail(self, names, value, expected):
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        raise InputError(f"{self.where}: found {name} = {short(value)}, expected {expected}")

    def count(self, *names, default=REQUIRED, most=MOST):
        """A positive integer."""
        value = self.get(*names, default=default)
        if value is not default and not (is_integer(value) and 0 < value <= most):
            self.fail(names, value, f"a positive integer, at most {most}")
        return value

    def size(self, *names, default=REQUIRED):
        """A positive integer: the size, or a divisor of the size, of an axis of a tensor."""
        return self.count(*names, default=default, most=self.most_features)

    def layers(self, *names):
        return self.count(*names, most=self.most_layers)

    def number(self, *names, default=REQUIRED, above=None):
        value = self.get(*names, default=default)
        if value is not default:
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
            if not (good and isfinite(value) and (above is None or value > above)):
                self.fail(names, value, "a number" if above is None else f"a number above {above}")
            value = float(value)
        return value

    def flag(self, *names, default=REQUIRED):
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            self.fail(names, value, "true or false")
        return value

    def activation(self, name, default):
        """DecoderConfig's activation by the family's name for it."""
        value = self.get(name, default=default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            self.fail([name], value, f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[value]

    def refuse(self, **neutral):
        """Raise InputError for a key whose value is not this one (nor null): it would change the results."""
        for name, value in neutral.items():
            found = self.get(name, default=None)
            if found not in (None, value, [], {}):
                expected = "none" if value is None else repr(value)
                raise InputError(f"{self.where}: found {name} = {short(found)}, expected {expected}: it changes the "
                                 f"results and is not supported")

    def inner(self, *names):
        """The keys of an object inside, None where there is none."""
        value = self.get(*names, default=None)
        if value is not None and not isinstance(value, dict):
            self.fail(names, value, "an object")
        return None if value is None else Keys(value, f"{self.where}: {names[0]}")

    def others(self):
        """Keys that nothing has looked at and that are not known to change nothing."""
        return sorted(key for key in set(self.values) - self.looked_at - HARMLESS if self.values[key] is not None)

    def of_layers(self, name, layers):
        """A list of one text a layer, None where there is none."""
        value = self.get(name, default=None)
        if value is not None and not (isinstance(value, list) and len(value) == layers
                                      and all(isinstance(kind, str) for kind in value)):
            self.fail([name], value, f"a list of {layers} names, one a layer")
        return value


def short(value, most=80):
    text = repr(value)
    return text if len(text) <= most else text[:most] + "..."
