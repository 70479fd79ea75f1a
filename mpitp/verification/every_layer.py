"""Every layer over the ranks against the dense one, forward and backward, small: what `verify --all` computes."""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import oracle
from ..arrays import Array, on_host
from ..comm.group import TensorParallelGroup
from ..attention_config import Rotary
from ..config import DecoderConfig
from ..layers.block import ParallelBlock
from ..layers.decoder import Decoder
from ..layers.embedding import VocabParallelEmbedding
from ..layers.linear import ColumnParallelLinear, RowParallelLinear
from ..layers.loss import (cross_entropy_collectives, vocab_parallel_cross_entropy_backward,
                           vocab_parallel_cross_entropy_forward)
from ..oracle import Comparison
from ..oracle.linear import named, part
from . import Step, grid
from .numbers import standard_normals, token_ids

BATCH, SEQUENCE, HIDDEN, FFN, VOCABULARY = 2, 24, 60, 161, 501        # nothing that ranks divide evenly
SMOOTHING, MULTIPLIER = 0.1, 3.0
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_layers=2, num_attention_heads=5,
                             ffn_hidden_size=FFN)
LLAMA = dict(SIZES, num_query_groups=1, normalization="rmsnorm", activation="silu", gated=True, qkv_bias=False,
             attention_bias=False, mlp_bias=False)
GPT = dict(SIZES, position_embedding="learned", max_position_embeddings=SEQUENCE, tie_word_embeddings=True)
GEMMA = dict(LLAMA, num_attention_heads=6, num_query_groups=2, kv_channels=16, activation="gelu_tanh", qk_norm=True,
             norm_placement="both", zero_centered_gamma=True, embedding_multiplier=HIDDEN ** 0.5,
             sliding_window=(9, None), tie_word_embeddings=True,
             rotary=(Rotary(), Rotary(base=1e6, scaling="linear", factor=8.0)))
NEOX = dict(SIZES, parallel_residual=True, activation="gelu", rotary=Rotary(dim=4))
BLOOM = dict(SIZES, position_embedding="alibi", embedding_norm=True, tie_word_embeddings=True)

PARTS_OF_BLOCK = (              # title, part of a block (None: the whole), kind
    ("feed-forward", "mlp", GPT), ("feed-forward, gated", "mlp", LLAMA),
    ("layer norm", "attention_norm", GPT), ("RMS norm, 1 + w", "attention_norm", GEMMA),
    ("attention, 5 heads", "attention", GPT), ("attention, ALiBi", "attention", BLOOM),
    ("attention, 5 heads on 1 kv head", "attention", LLAMA),
    ("attention, 6 on 2, q/k norm, window", "attention", GEMMA),
    ("block", None, GPT), ("block, parallel residual", None, NEOX), ("block, norms before and after", None, GEMMA))
DECODERS = (("decoder, GPT-2's kind", GPT), ("decoder, Llama's kind", LLAMA), ("decoder, Gemma 3's kind", GEMMA),
            ("decoder, GPT-NeoX's kind", NEOX), ("decoder, BLOOM's kind", BLOOM))
OF_ROWS: tuple[tuple[str, dict, dict[str, bool | str]], ...] = (          # title, kind, options of Decoder
    ("decoder, sequence parallel", GEMMA, dict(sequence_parallel=True)),
    ("decoder, rows again, recomputed", NEOX, dict(sequence_parallel=True, gather_again=True,
                                                            recompute="block")),
    ("decoder, attention recomputed", GEMMA, dict(recompute="attention")))

Results = dict[str, Any]        # by name: outputs, and gradients by the names of their weights


@dataclass
class LayerResult:
    """What came out of one layer.

    Parameters
    ----------
    title : str
    comparisons : list of Comparison
        One of every output and gradient.
    collectives : int
        How many there were, forward and backward.
    as_closed_form : bool
        Whether the layer's closed form says the same.
    sha256 : str
        Of all results, in reproducible mode.
    """
    title: str
    comparisons: list[Comparison]
    collectives: int
    as_closed_form: bool
    sha256: str = ""

    @property
    def good(self) -> bool:
        """Whether all results are within their limits, and the collectives are those of the closed form."""
        return self.as_closed_form and all(comparison.good and comparison.near for comparison in self.comparisons)


class EveryLayerCheck:
    """An EveryLayerCheck runs every kind of layer of one group, in one dtype, against the dense ones.

    Parameters
    ----------
    group : TensorParallelGroup
    dtype : str
        "float32" or "float64".
    seed : int
        Of weights and inputs.
    """

    def __init__(self, group: TensorParallelGroup, dtype: str, seed: int) -> None:
        self.group, self.dtype, self.seed = group, dtype, seed

    def steps(self) -> list[Step]:
        """Return a step for each layer; it returns the LayerResult, None but on rank 0."""
        steps = [("column-parallel linear", self.column_parallel), ("row-parallel linear", self.row_parallel)]
        steps += [(title, partial(self.part_of_block, title, name, options)) for title, name, options in PARTS_OF_BLOCK]
        steps += [("embedding", self.embedding), ("cross entropy, label smoothing", self.cross_entropy)]
        steps += [(title, partial(self.decoder, title, options)) for title, options in DECODERS]
        steps += [(title, partial(self.decoder, title, options, **more)) for title, options, more in OF_ROWS]
        return steps + [(title, partial(grid.check, self, title, data, LLAMA))
                        for title, data in grid.grids(self.group)]

    # --- layers with forward(x) and backward(dy) --------------------------------------------------------------

    def column_parallel(self) -> LayerResult | None:
        """Check ColumnParallelLinear."""
        layer = ColumnParallelLinear(self.group, HIDDEN, FFN, gather_output=True, dtype=self.dtype, name="l")
        return self.forward_backward("column-parallel linear", layer, HIDDEN, FFN, dense_linear)

    def row_parallel(self) -> LayerResult | None:
        """Check RowParallelLinear."""
        layer = RowParallelLinear(self.group, FFN, HIDDEN, input_is_parallel=False, dtype=self.dtype, name="l")
        return self.forward_backward("row-parallel linear", layer, FFN, HIDDEN, dense_linear)

    def part_of_block(self, title: str, name: str | None, options: dict[str, Any]) -> LayerResult | None:
        """Check the attention, the feed-forward block or a norm of a block, or the whole of it."""
        config = DecoderConfig(**options)
        block = ParallelBlock(self.group, config, dtype=self.dtype)
        layer = block if name is None else block.norms[name] if name in block.norms else getattr(block, name)
        return self.forward_backward(title, layer, HIDDEN, HIDDEN, partial(dense_part, name, config))

    def forward_backward(self, title: str, layer: Any, in_features: int, out_features: int,
                         dense: Callable[..., Results]) -> LayerResult | None:
        """Run a layer with random weights forward and backward, and judge all results."""
        weights = self.load(layer)
        x, dy = self.draw("x", BATCH, SEQUENCE, in_features), self.draw("dy", BATCH, SEQUENCE, out_features)
        self.group.ledger.clear()
        y, saved = layer.forward(self.on_device(x))
        dx, gradients = layer.backward(self.on_device(dy), saved)
        counts = self.group.ledger.counts()
        found = {"y": y, "dx": dx, **(layer.gather(gradients) or {})}
        return self.judge(title, counts, layer.collectives(BATCH * SEQUENCE), found, dense, weights, x, dy)

    # --- what takes tokens ------------------------------------------------------------------------------------

    def embedding(self) -> LayerResult | None:
        """Check VocabParallelEmbedding."""
        layer = VocabParallelEmbedding(self.group, VOCABULARY, HIDDEN, MULTIPLIER, dtype=self.dtype, name="embedding")
        weights, ids, dy = self.load(layer), self.ids("ids"), self.draw("dy", BATCH, SEQUENCE, HIDDEN)
        self.group.ledger.clear()
        y, saved = layer.forward(self.on_device(ids))
        _, gradients = layer.backward(self.on_device(dy), saved)
        counts = self.group.ledger.counts()
        found = {"y": y, **(layer.gather(gradients) or {})}
        dense = partial(dense_embedding, ids)
        return self.judge("embedding", counts, layer.collectives(ids.size), found, dense, weights, dy)

    def cross_entropy(self) -> LayerResult | None:
        """Check the cross entropy over a split vocabulary, one token not counted."""
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
        return self.judge("cross entropy, label smoothing", counts, [expected], found, partial(dense_loss, targets), {},
                          logits)

    def decoder(self, title: str, options: dict[str, Any], **more: Any) -> LayerResult | None:
        """Check a whole decoder with its loss; more: options of Decoder."""
        config = DecoderConfig(**options)
        model = Decoder(self.group, config, dtype=self.dtype, **more)
        weights, ids, targets = self.load(model), self.ids("ids"), self.ids("targets")
        self.group.ledger.clear()
        logits, saved = model.forward(self.on_device(ids))
        loss, saved_loss = model.loss(logits, self.on_device(targets), label_smoothing=SMOOTHING)
        gradients = model.backward(model.loss_backward(saved_loss), saved)
        counts = self.group.ledger.counts()
        found = {"logits": model.gather_logits(logits), "loss": np.asarray(loss, self.dtype),
                 **(model.gather(gradients) or {})}
        expected = [*model.collectives(ids.size), cross_entropy_collectives(ids.size, SMOOTHING, self.dtype)]
        return self.judge(title, counts, expected, found, partial(dense_decoder, ids, targets, config), weights)

    # --- what they share --------------------------------------------------------------------------------------

    def judge(self, title: str, counts: Counter, expected: Any, found: Results, dense: Callable[..., Results],
              weights: dict[str, Array], *inputs: Array) -> LayerResult | None:
        """Compare with the dense results, and count collectives against the closed form, on rank 0."""
        if self.group.rank != 0:
            return None
        found = {name: np.asarray(on_host(array)) for name, array in found.items()}
        digest = hashlib.sha256()
        for name in sorted(found):
            digest.update(np.ascontiguousarray(found[name]).tobytes())
        return LayerResult(title, oracle.compare_all(found, dense, weights, *inputs), sum(counts.values()),
                           counts == sum(expected, Counter()), digest.hexdigest() if self.group.reproducible else "")

    def load(self, layer: Any) -> dict[str, Array]:
        """Return random dense weights, biases and norms away from where they start, after the layer took its slices."""
        weights = {}
        for name, spec in layer.specs.items():
            w = self.draw(name, *spec.shape) * (spec.shape[-1] ** -0.5 if len(spec.shape) == 2 else 0.3)
            weights[name] = (w + (len(spec.shape) == 1 and name.endswith("weight"))).astype(self.dtype)
        layer.load_dense(weights)
        return weights

    def draw(self, name: str, *shape: int) -> Array:
        """Return standard normals on the host, the same on every rank."""
        return standard_normals(self.seed, f"verify.{name}", shape, self.dtype)

    def ids(self, name: str, sequences: int = BATCH, length: int = SEQUENCE) -> Array:
        """Return token ids on the host, the same on every rank."""
        return token_ids(self.seed, f"verify.{name}", (sequences, length), VOCABULARY)

    def on_device(self, array: Array) -> Array:
        """Return the array where the group computes."""
        return self.group.xp.asarray(array)


# --- the same by the dense functions; weights by the names of the parallel layers' parameters -----------------------

def dense_linear(w: Results, x: Array, dy: Array) -> Results:
    """Run a linear layer named "l"."""
    y, saved = oracle.linear.forward(x, part(w, "l"))
    dx, gradients = oracle.linear.backward(dy, saved)
    return {"y": y, "dx": dx, **named("l", gradients)}


def dense_part(name: str | None, config: DecoderConfig, w: Results, x: Array, dy: Array) -> Results:
    """Run a part of a block, or the whole."""
    if name is None:
        y, saved = oracle.block.forward(x, w, config)
        dx, gradients = oracle.block.backward(dy, saved)
        return {"y": y, "dx": dx, **gradients}
    inner = part(w, name)
    if name == "mlp":
        y, saved = oracle.feed_forward.forward(x, inner, config.activation)
        dx, gradients = oracle.feed_forward.backward(dy, saved)
    elif name == "attention":
        y, saved = oracle.attention.forward(x, inner, config)
        dx, gradients = oracle.attention.backward(dy, saved)
    else:
        y, saved = oracle.norm.forward(x, inner, **oracle.norm.options(config))
        dx, gradients = oracle.norm.backward(dy, saved)
    return {"y": y, "dx": dx, **named(name, gradients)}


def dense_embedding(ids: Array, w: Results, dy: Array) -> Results:
    """Run an embedding named "embedding"."""
    y, saved = oracle.embedding.forward(ids, part(w, "embedding"), MULTIPLIER)
    return {"y": y, **named("embedding", oracle.embedding.backward(dy, saved))}


def dense_loss(targets: Array, w: Results, logits: Array) -> Results:
    """Run the cross entropy; it has no weights."""
    loss, saved = oracle.cross_entropy.forward(logits, targets, SMOOTHING)
    return {"loss": loss, "d_logits": oracle.cross_entropy.backward(saved)}


def dense_decoder(ids: Array, targets: Array, config: DecoderConfig, w: Results) -> Results:
    """Run a decoder with its loss."""
    logits, saved = oracle.decoder.forward(ids, w, config)
    loss, saved_loss = oracle.cross_entropy.forward(logits, targets, SMOOTHING)
    return {"logits": logits, "loss": loss, **oracle.decoder.backward(oracle.cross_entropy.backward(saved_loss), saved)}
