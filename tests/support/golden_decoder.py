"""The cases of golden_decoder.json: decoders of every kind, numbers that need no generator, and PyTorch's results.

make_golden_decoder.py wrote the file; it and the tests take configs, weights and ids from here.
"""
import json
from pathlib import Path

import numpy as np

from decoder_cases import KINDS, config
from mpitp import Rotary

FILE = Path(__file__).parents[1] / "data" / "golden_decoder.json"
BATCH, POSITIONS, SMOOTHING, ENTRIES = 2, 7, 0.1, 3
TOLERANCE = 1e-11                           # relative: the file has 13 digits, and 5e-13 is what was found
NOTHING = 1e-14                             # beside it, for what is 0: the gradient of a key's bias is 1e-16 or so
RAMPS = {                                   # with frequencies that are kept, that are slowed, and in between
    "llama3's ramp": Rotary(base=30.0, scaling="llama3", factor=8.0, original_max_positions=64),
    "yarn's ramp": Rotary(base=100.0, scaling="yarn", factor=4.0, original_max_positions=256, beta_fast=8.0),
    "yarn's ramp, not truncated": Rotary(base=100.0, scaling="yarn", factor=4.0, original_max_positions=256,
                                         beta_fast=8.0, truncate=False, attention_factor=0.9),
}
MASKED = ("gemma3", "bloom", "gpt2")
CASES = {**{kind: config(kind) for kind in KINDS}, **{f"{kind}, mask": config(kind) for kind in MASKED},
         **{name: config("llama, one kv head", rotary=rotary) for name, rotary in RAMPS.items()},
         **{f"{kind} in both directions, mask": config(kind, causal=False) for kind in ("gemma3", "bloom")}}


def fractions(size, number):
    """`size` multiples of 2^-16 from -1 to 1, exact on every machine: the high bits of Fibonacci hashing."""
    words = (np.arange(size, dtype=np.uint64) + np.uint64(4096 * number + 1)) * np.uint64(2654435769)
    return (words % np.uint64(2**32) >> np.uint64(15)).astype(np.float64) / 2**16 - 1


def shapes(config):
    """{name: shape} of every parameter, written down by hand: no class of mpitp is used."""
    D, V, K, F = config.hidden_size, config.vocab_size, config.head_dim, config.ffn_size
    queries, keys = config.num_attention_heads * K, config.query_groups * K
    found = {"embedding.weight": (V, D)}

    def norm(name):
        found[f"{name}.weight"] = (D,)
        if config.has_norm_bias:
            found[f"{name}.bias"] = (D,)

    def linear(name, out_features, in_features, bias):
        found[f"{name}.weight"] = (out_features, in_features)
        if bias:
            found[f"{name}.bias"] = (out_features,)

    if config.position_embedding == "learned":
        found["position.weight"] = (config.position_offset + config.max_position_embeddings, D)
    if config.embedding_norm:
        norm("embedding_norm")
    for layer in (f"layers.{i}." for i in range(config.num_layers)):
        for part in ("attention", "mlp"):
            if config.norm_placement in ("before", "both") and not (part == "mlp" and config.shared_norm):
                norm(f"{layer}{part}_norm")
            if config.norm_placement != "before":
                norm(f"{layer}{part}_post_norm")
        for name, rows in (("query", queries), ("key", keys), ("value", keys)):
            linear(f"{layer}attention.{name}", rows, D, config.qkv_bias)
        linear(f"{layer}attention.out", D, queries, config.attention_bias)
        if config.qk_norm:
            for name, features in (("query", queries), ("key", keys)):
                found[f"{layer}attention.{name}_norm.weight"] = (features // K, K) if config.qk_norm_by_head else \
                    (features if config.qk_norm_over_heads else K,)
                if config.qk_norm_bias:
                    found[f"{layer}attention.{name}_norm.bias"] = (K,)
        for name in ("up", "gate") if config.gated else ("up",):
            linear(f"{layer}mlp.{name}", F, D, config.mlp_bias)
        linear(f"{layer}mlp.down", D, F, config.mlp_bias)
    if config.final_norm:
        norm("final_norm")
    if not config.tie_word_embeddings:
        found["head.weight"] = (V, D)
    if config.head_bias:
        found["head.bias"] = (V,)
    return found


def weights_of(config):
    """Every parameter, by its place among the sorted names; the weights of norms about 1."""
    weights = {}
    for number, (name, shape) in enumerate(sorted(shapes(config).items())):
        values = fractions(int(np.prod(shape)), number).reshape(shape) / 2
        weights[name] = values + 1 if len(shape) == 1 and name.endswith("weight") else values
    return weights


def ids_and_targets(config):
    """Both (B, S), two targets ignored."""
    words = (fractions(2 * BATCH * POSITIONS, 99) + 1) / 2 * (config.vocab_size - 1)
    ids, targets = words.astype(int).reshape(2, BATCH, POSITIONS)
    targets[0, 2] = targets[1, 5] = -100
    return ids, targets


def mask_of(kind):
    """(B, S), True = may be attended: one sequence padded on the left, where queries see nothing, one on the right."""
    if not kind.endswith("mask"):
        return None
    mask = np.ones((BATCH, POSITIONS), bool)
    mask[0, :2] = mask[1, -1:] = False
    return mask


def places(size, count=ENTRIES):
    """Which elements of a flat array are written down."""
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def summary(logits, loss, gradients):
    """What the file holds of results, in float64: the loss, a dozen logits; of each gradient sum, norm, entries."""
    flat = np.asarray(logits).reshape(-1)
    numbers = {"loss": [float(loss)], "logits": [float(flat[i]) for i in places(flat.size, 12)]}
    for name, gradient in sorted(gradients.items()):
        flat = np.asarray(gradient).reshape(-1)
        entries = [float(flat[i]) for i in places(flat.size)]
        numbers[name] = [float(flat.sum()), float((flat * flat).sum() ** 0.5), *entries]
    return numbers


def differences(found, expected):
    """Names of what is not within the tolerance, and of what only one of the two has."""
    wrong = sorted(found.keys() ^ expected.keys())
    for name in found.keys() & expected.keys():
        size = np.abs(expected[name]).max()                 # of a gradient: its norm, or its sum
        error = np.abs(np.subtract(found[name], expected[name])).max()
        wrong += [] if error <= TOLERANCE * size + NOTHING else [name]
    return wrong


def golden_cases():
    """Yield (kind, config, weights, ids, targets, mask, expected)."""
    expected = json.loads(FILE.read_text())["cases"]
    for kind, configuration in CASES.items():
        yield (kind, configuration, weights_of(configuration), *ids_and_targets(configuration), mask_of(kind),
               expected[kind])
