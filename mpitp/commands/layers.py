"""Every layer over ranks against the dense one: what `verify --all` computes. Prints nothing.

The tests use the same comparison (tests/check_decoder.py).
"""
import hashlib
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..oracle import feed_forward as dense, decoder as dense_decoder, layers as dense_layers
from ..sharding import rng
from ..config import DecoderConfig, Rotary
from ..layers.decoder import Decoder
from ..layers.block import ParallelBlock
from ..layers.embedding import VocabParallelEmbedding
from ..layers.linear import ColumnParallelLinear, RowParallelLinear
from ..layers.loss import (cross_entropy_collectives, vocab_parallel_cross_entropy_backward,
                           vocab_parallel_cross_entropy_forward)
from ..oracle.magnitude import Magnitude

BATCH, SEQUENCE, HIDDEN, FFN, VOCABULARY = 2, 24, 60, 161, 501        # nothing that ranks divide evenly
SMOOTHING = 0.1
SIZES = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=2, num_attention_heads=5, ffn_hidden_size=FFN)
LLAMA = dict(SIZES, num_query_groups=1, normalization="rmsnorm", activation="silu", gated=True, qkv_bias=False,
             attention_bias=False, mlp_bias=False)
GPT = dict(SIZES, position_embedding="learned", max_position_embeddings=SEQUENCE, tie_word_embeddings=True)
GEMMA = dict(LLAMA, num_attention_heads=6, num_query_groups=2, kv_channels=16, activation="gelu_tanh", qk_norm=True,
             norm_placement="both", zero_centered_gamma=True, embedding_multiplier=HIDDEN ** 0.5,
             sliding_window=(9, None), tie_word_embeddings=True,
             rotary=(Rotary(), Rotary(base=1e6, scaling="linear", factor=8.0)))
NEOX = dict(SIZES, parallel_residual=True, activation="gelu", rotary=Rotary(dim=4))
BLOOM = dict(SIZES, position_embedding="alibi", embedding_norm=True, tie_word_embeddings=True)


@dataclass
class Ratio:
    """An error over eps times the propagated magnitude: of the parallel run, of the dense run in the same dtype.

    parallel_of_norm, dense_of_norm : Euclidean norm of the error over eps times that of the exact result, the dense one
        always in float32. The propagated magnitude is a worst case that grows with every layer: in a whole decoder it
        forgives too much, and this is the sharper one
    """
    name: str
    shape: tuple
    parallel: float
    dense: float
    limit: float
    good: bool
    parallel_of_norm: float = math.nan
    dense_of_norm: float = math.nan

    @property
    def limit_of_norm(self):
        return 32 * max(4.0, self.dense_of_norm)

    @property
    def near(self):
        return self.parallel_of_norm <= self.limit_of_norm


@dataclass
class Layer:
    """One layer checked against dense."""
    title: str
    ratios: list
    collectives: int
    as_closed_form: bool
    sha256: str = ""            # of all results, in reproducible mode

    def most(self, what):
        return max(getattr(ratio, what) for ratio in self.ratios)

    @property
    def good(self):
        return self.as_closed_form and all(ratio.good and ratio.near for ratio in self.ratios)


def compare(found, results, weights, *inputs):
    """A Ratio for each of `found`, from what results(weights, *inputs) -> {name: array} is in three arithmetics.

    exact: float64; magnitude: on Magnitude arrays; dense: float32 and the dtype of what was found. All on the host.
    """
    dtype = next(iter(found.values())).dtype

    def run(kind):
        return results({name: kind(w) for name, w in weights.items()}, *map(kind, inputs))

    true, bound, single = run(np.float64), run(lambda a: Magnitude(a.astype(float))), run(np.float32)
    alike = single if dtype == np.float32 else true
    if true.keys() != found.keys():
        raise ValueError(f"found results {sorted(found)}, expected {sorted(true)}")
    ratios, scale = [], max(float(np.abs(array).max(initial=0)) for array in true.values())
    for name, array in found.items():
        exact, size = np.asarray(true[name]), np.asarray(bound[name].size)
        as_dense = dense.error_ratio(np.asarray(alike[name], dtype), exact, size)
        parallel = dense.error_ratio(np.asarray(array, dtype), exact, size)
        limit = dense.limit(as_dense)
        of_norm = (norm_error(a, exact, eps_of, scale) for a, eps_of in ((array, dtype), (single[name], np.float32)))
        ratios.append(Ratio(name, array.shape, parallel, as_dense, limit, parallel <= limit, *of_norm))
    return ratios


def norm_error(found, exact, dtype, scale):
    """|found - exact| / (eps |exact|), Euclidean norms: what two runs that add up in another order may differ by.

    A result that is 0 but for rounding, beside others of size `scale`, is measured by those: softmax does not see a
    bias of the keys, for one.
    """
    if np.size(exact) == 0:
        return 0.0
    size = np.linalg.norm(exact) if np.abs(exact).max() > 1e-12 * scale else scale
    error = np.linalg.norm(np.asarray(found, np.float64) - exact)
    return float(error / (np.finfo(dtype).eps * size)) if error else 0.0


class Checks:
    """The checks of one group in one dtype."""

    def __init__(self, group, dtype, seed):
        self.group, self.dtype, self.seed = group, np.dtype(dtype), seed

    def all(self):
        """Yield a Layer for each; on rank 0, elsewhere None. Collective."""
        yield self.linear("column-parallel linear", ColumnParallelLinear(self.group, HIDDEN, FFN, gather_output=True,
                                                                         dtype=self.dtype, name="l"))
        yield self.linear("row-parallel linear", RowParallelLinear(self.group, FFN, HIDDEN, input_is_parallel=False,
                                                                   dtype=self.dtype, name="l"))
        for part, title, options in (
                ("mlp", "feed-forward", GPT), ("mlp", "feed-forward, gated", LLAMA),
                ("attention_norm", "layer norm", GPT), ("attention_norm", "RMS norm, 1 + w", GEMMA),
                ("attention", "attention, 5 heads", GPT), ("attention", "attention, ALiBi", BLOOM),
                ("attention", "attention, 5 heads on 1 kv head", LLAMA),
                ("attention", "attention, 6 on 2, q/k norm, window", GEMMA),
                (None, "block", GPT), (None, "block, parallel residual", NEOX),
                (None, "block, norms before and after", GEMMA)):
            yield self.part_of_block(part, title, DecoderConfig(**options))
        yield self.embedding()
        yield self.cross_entropy()
        for title, options in (("decoder, GPT-2's kind", GPT), ("decoder, Llama's kind", LLAMA),
                               ("decoder, Gemma 3's kind", GEMMA), ("decoder, GPT-NeoX's kind", NEOX),
                               ("decoder, BLOOM's kind", BLOOM)):
            yield self.decoder(title, DecoderConfig(**options))

    # --- each kind ------------------------------------------------------------------------------------------

    def linear(self, title, layer):
        weights = self.load(layer)
        x, dy = self.draw("x", BATCH, SEQUENCE, layer.in_features), self.draw("dy", BATCH, SEQUENCE, layer.out_features)

        def results(w, x, dy):
            dx, gradients = dense_layers.linear_backward(dy, x, w, "l")
            return {"y": dense_layers.linear_forward(x, w, "l"), "dx": dx, **gradients}
        return self.forward_backward(title, layer, weights, x, dy, results)

    def part_of_block(self, part, title, config):
        block = ParallelBlock(self.group, config, dtype=self.dtype)
        layer = block.norms.get(part) or getattr(block, part) if part else block
        weights = self.load(layer)
        x, dy = (self.draw(name, BATCH, SEQUENCE, HIDDEN) for name in ("x", "dy"))

        def results(w, x, dy):
            inner = dense_decoder.part(w, f"{part}.") if part else w
            if part == "mlp":
                y, saved = dense_layers.mlp_forward(x, inner, config)
                dx, gradients = dense_layers.mlp_backward(dy, saved, inner, config)
            elif part == "attention":
                y, saved = dense_layers.attention_forward(x, inner, config)
                dx, gradients = dense_layers.attention_backward(dy, saved, inner, config)
            elif part:
                y, saved = dense_layers.norm_forward(x, inner, config)
                dx, gradients = dense_layers.norm_backward(dy, saved, inner, config)
            else:
                y, saved = dense_decoder.block_forward(x, inner, config)
                dx, gradients = dense_decoder.block_backward(dy, saved, inner, config)
            return {"y": y, "dx": dx, **dense_decoder.named(f"{part}." if part else "", gradients)}
        return self.forward_backward(title, layer, weights, x, dy, results)

    def embedding(self):
        layer = VocabParallelEmbedding(self.group, VOCABULARY, HIDDEN, 3.0, dtype=self.dtype, name="embedding")
        weights, ids = self.load(layer), self.ids("ids")
        dy = self.draw("dy", BATCH, SEQUENCE, HIDDEN)
        self.group.ledger.clear()
        y, saved = layer.forward(self.on_device(ids))
        _, gradients = layer.backward(self.on_device(dy), saved)

        def results(w, dy):
            hot = dense_layers.one_hot(ids, VOCABULARY, dy.dtype).reshape(-1, VOCABULARY)
            return {"y": w["embedding.weight"][ids] * 3.0, "embedding.weight": hot.T @ (dy * 3.0).reshape(-1, HIDDEN)}
        return self.judge("embedding", layer, layer.collectives(ids.size), {"y": y}, gradients, results, weights, dy)

    def cross_entropy(self):
        partition, targets = self.group.partition(VOCABULARY), self.ids("targets")
        targets[0, 3] = -100
        logits = self.draw("logits", BATCH, SEQUENCE, VOCABULARY)
        mine = self.on_device(np.ascontiguousarray(logits[..., partition.range(self.group.rank)]))
        self.group.ledger.clear()
        loss, saved = vocab_parallel_cross_entropy_forward(mine, self.on_device(targets), self.group, partition,
                                                           label_smoothing=SMOOTHING)
        d_mine = vocab_parallel_cross_entropy_backward(saved)
        counts = self.group.ledger.counts()
        found = {"loss": np.asarray(loss, self.dtype), "d_logits": self.group.all_gather(d_mine, partition)}
        expected = cross_entropy_collectives(BATCH * SEQUENCE, SMOOTHING, self.dtype)

        def results(w, logits):
            return dict(zip(("loss", "d_logits"), dense_layers.cross_entropy(logits, targets, SMOOTHING)))
        return self.finish("cross entropy, label smoothing", counts, expected, found, results, {}, logits)

    def decoder(self, title, config):
        model = Decoder(self.group, config, dtype=self.dtype)
        weights, ids, targets = self.load(model), self.ids("ids"), self.ids("targets")
        self.group.ledger.clear()
        logits, saved = model.forward(self.on_device(ids))
        loss, saved_loss = model.loss(logits, self.on_device(targets), label_smoothing=SMOOTHING)
        gradients = model.backward(model.loss_backward(saved_loss), saved)
        counts = self.group.ledger.counts()
        found = {"logits": model.gather_logits(logits), "loss": np.asarray(loss, self.dtype),
                 **(model.gather(gradients) or {})}
        forward, backward = model.collectives(ids.size)
        expected = forward + backward + cross_entropy_collectives(ids.size, SMOOTHING, self.dtype)

        def results(w):
            logits, saved = dense_decoder.decoder_forward(config, w, ids)
            loss, d_logits = dense_layers.cross_entropy(logits, targets, SMOOTHING)
            return {"logits": logits, "loss": loss, **dense_decoder.decoder_backward(config, w, d_logits, saved)}
        return self.finish(title, counts, expected, found, results, weights)

    # --- what they share ------------------------------------------------------------------------------------

    def forward_backward(self, title, layer, weights, x, dy, results):
        self.group.ledger.clear()
        y, saved = layer.forward(self.on_device(x))
        dx, gradients = layer.backward(self.on_device(dy), saved)
        expected = layer.collectives(BATCH * SEQUENCE)
        return self.judge(title, layer, expected, {"y": y, "dx": dx}, gradients, results, weights, x, dy)

    def judge(self, title, layer, expected, found, gradients, results, weights, *inputs):
        counts = self.group.ledger.counts()
        found = {**found, **(layer.gather(gradients) or {})}
        return self.finish(title, counts, sum(expected, Counter()), found, results, weights, *inputs)

    def finish(self, title, counts, expected, found, results, weights, *inputs):
        """The Layer, on rank 0."""
        if self.group.rank != 0:
            return None
        found = {name: on_host(array) for name, array in found.items()}
        digest = hashlib.sha256()
        for name in sorted(found):
            digest.update(np.ascontiguousarray(found[name]).tobytes())
        return Layer(title, compare(found, results, weights, *inputs), sum(counts.values()), counts == expected,
                     digest.hexdigest() if self.group.reproducible else "")

    def load(self, layer):
        """Random dense weights, biases and norms away from where they start; the layer takes its slices."""
        weights = {}
        for name, spec in layer.specs.items():
            w = self.draw(name, *spec.shape) * (spec.shape[-1] ** -0.5 if len(spec.shape) == 2 else 0.3)
            weights[name] = (w + (len(spec.shape) == 1 and name.endswith("weight"))).astype(self.dtype)
        layer.load_dense(weights)
        return weights

    def draw(self, name, *shape):
        """Standard normals on the host, the same on every rank."""
        normals = rng.normals(rng.key(self.seed, f"verify.{name}"), 0, int(np.prod(shape)))
        return normals.reshape(shape).astype(self.dtype)

    def ids(self, name):
        words = rng.words(rng.key(self.seed, f"verify.{name}"), 0, BATCH * SEQUENCE)
        return (words % np.uint64(VOCABULARY)).astype(np.int64).reshape(BATCH, SEQUENCE)

    def on_device(self, array):
        return self.group.xp.asarray(array)


def on_host(x):
    return x.get() if hasattr(x, "get") else np.asarray(x)
