"""The feed-forward weights of one layer of a Hugging Face checkpoint, under the names of ParallelMLP."""
import re
from dataclasses import dataclass

from ...errors import InputError

# Names of (up, gate, down) behind the layer's prefix. gate None: not gated.
NAMES = (
    ("up_proj", "gate_proj", "down_proj"),          # llama, mistral, qwen2, qwen3, gemma
    ("dense_h_to_4h", None, "dense_4h_to_h"),       # gpt_neox, falcon, bloom
    ("c_fc", None, "c_proj"),                       # gpt2 (transposed), gpt_bigcode, starcoder2
)
FLOATS = ("F32", "F16", "BF16", "F64")
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}     # store [in, out]
ACTIVATIONS = {
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "linear": "identity",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
}
THEIR_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh",
                     "identity": "linear"}
FIXED_ACTIVATIONS = {"bloom": "gelu_tanh"}             # whatever the config says
# Where the config does not say it.
DEFAULT_ACTIVATIONS = {"falcon": "gelu", "gpt2": "gelu_tanh", "gpt_neox": "gelu", "llama": "silu", "mistral": "silu",
                       "qwen2": "silu", "qwen3": "silu", "gemma": "gelu_tanh",
                       "gemma2": "gelu_tanh", "gemma3_text": "gelu_tanh",
                       "gpt_bigcode": "gelu_tanh", "starcoder2": "gelu_tanh"}


@dataclass
class FeedForward:
    """One block, its weights [out, in] and sliceable, read when sliced."""
    hidden_size: int
    ffn_hidden_size: int
    activation: str
    gated: bool
    bias: bool
    weights: dict


class Transposed:
    """A stored [in, out] matrix as [out, in]; slicing reads only the part."""

    def __init__(self, tensor):
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape[::-1]

    def __getitem__(self, window):
        rows, columns = window
        return self.tensor[columns, rows].T.copy()


def text_config(config):
    """The part of a config that describes the text model."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def activation_of(config):
    family = config.get("model_type")
    if family in FIXED_ACTIVATIONS:
        return FIXED_ACTIVATIONS[family]
    for key in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        name = config.get(key)
        if name is not None:
            if not isinstance(name, str) or name not in ACTIVATIONS:
                raise InputError(f"config.json: found {key} = {name!r}, expected one of {', '.join(ACTIVATIONS)}")
            if family == "gemma" and name == "gelu":        # the first release said so and meant the other one
                return "gelu_tanh"
            return ACTIVATIONS[name]
    if family in DEFAULT_ACTIVATIONS:
        return DEFAULT_ACTIVATIONS[family]
    raise InputError(f"config.json: found no activation for model_type {family!r}, expected hidden_act or its like")


def find_prefix(checkpoint, layer):
    """The prefix of the layer's feed-forward tensors, and their (up, gate, down)."""
    layers = set()
    for up, gate, down in NAMES:
        pattern = re.compile(rf"(?:.*\.)?(?:layers|h)\.(\d{{1,9}})\.mlp\.(?={up}\.weight$)")
        found = []
        for name in checkpoint.names():
            match = pattern.match(name)
            if match:
                layers.add(int(match.group(1)))
                if int(match.group(1)) == layer:
                    found.append(match.group(0))
        if len(found) > 1:
            raise InputError(f"{checkpoint.folder}: found layer {layer} in {' and '.join(found)}, expected one model")
        if found:
            return found[0], (up, gate, down)
    if layers:
        raise InputError(f"{checkpoint.folder}: found layers {min(layers)} to {max(layers)}, expected layer {layer}")
    expected = " or ".join("/".join(name for name in names if name) for names in NAMES)
    raise InputError(f"{checkpoint.folder}: found no feed-forward weights, expected mlp.{expected}")


def feed_forward(checkpoint, layer):
    """The feed-forward block of a layer: a FeedForward. Reads nothing but headers.

    Raises InputError for a layer that is not there, weights that do not fit each other or the config, a projection
    or a bias that is missing, and an activation that is not known.
    """
    config = text_config(checkpoint.config)
    family = config.get("model_type")
    if not isinstance(family, (str, type(None))):
        raise InputError(f"config.json: found model_type = {family!r}, expected a name")
    prefix, (up, gate, down) = find_prefix(checkpoint, layer)
    stored = {"up": up, "gate": gate, "down": down}
    weights = {}
    for mine, theirs in stored.items():
        if theirs is None:
            continue
        weight = checkpoint[f"{prefix}{theirs}.weight"]
        if weight.dtype not in FLOATS:
            raise InputError(f"{prefix}{theirs}.weight: found {weight.dtype}, expected {', '.join(FLOATS)} (quantised "
                             f"weights are out of scope)")
        if len(weight.shape) != 2:
            raise InputError(f"{prefix}{theirs}.weight: found shape {weight.shape}, expected two axes")
        weights[f"{mine}.weight"] = Transposed(weight) if family in CONV1D else weight
        if f"{prefix}{theirs}.bias" in checkpoint.where:
            weights[f"{mine}.bias"] = checkpoint[f"{prefix}{theirs}.bias"]
    ffn, hidden = weights["up.weight"].shape
    said = config.get("hidden_size", config.get("n_embd", hidden))
    if hidden != said:
        raise InputError(f"{prefix}{up}.weight: found {hidden} in features, expected hidden_size = {said} of "
                         f"config.json")
    biases = [name for name in weights if name.endswith("bias")]
    if biases and len(biases) != len(weights) // 2:
        raise InputError(f"{prefix}: found only {', '.join(biases)}, expected a bias in every projection or in none")
    shapes = {"up.weight": (ffn, hidden), "gate.weight": (ffn, hidden), "down.weight": (hidden, ffn),
              "up.bias": (ffn,), "gate.bias": (ffn,), "down.bias": (hidden,)}
    for name, weight in weights.items():
        if tuple(weight.shape) != shapes[name]:
            theirs = prefix + stored[name.split(".")[0]]
            raise InputError(f"{theirs}: found shape {tuple(weight.shape)}, expected {shapes[name]}")
    return FeedForward(hidden, ffn, activation_of(config), gate is not None, bool(biases), weights)
