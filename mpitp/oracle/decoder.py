"""The decoder on one process: embedding, blocks, final norm, head.

Dimension key: B sequences, S positions, D hidden, V vocabulary, M learned positions.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from . import attention, block, embedding, linear
from .block import Dropout, no_dropout
from .linear import Weights, named, part

if TYPE_CHECKING:
    from ..config import DecoderConfig


def forward(ids_BS: Array, w: Weights, config: DecoderConfig, mask: Array | None = None,
            dropout: Dropout = no_dropout) -> tuple[Array, Any]:
    """logits = head(norm(blocks(embedding(ids))))

    Parameters
    ----------
    ids_BS : (B, S) array of int
    w : dict
        By the names of the parameters of `mpitp.Decoder`.
    config : DecoderConfig
    mask : array of bool, optional
        As that of `attention.forward`.
    dropout : function of (name, shape, probability)
        Returns what to multiply by, 0 or 1 / (1 - p).

    Returns
    -------
    logits : (B, S, V) array or Magnitude
    saved : object
        What `backward` needs.
    """
    saved: dict[str, Any] = {"w": w, "config": config}
    x_BSD, saved["embedding"] = embedding.forward(ids_BS, part(w, "embedding"), config.embedding_multiplier)
    if config.position_embedding == "learned":
        positions_S = config.position_offset + np.arange(ids_BS.shape[1])
        added_SD, saved["position"] = embedding.forward(positions_S, part(w, "position"))
        x_BSD = x_BSD + added_SD
    if config.embedding_norm:
        x_BSD = block.norm_forward("embedding_norm", x_BSD, w, config, saved)
    saved["dropout"] = dropout("embedding.dropout", x_BSD.shape, config.hidden_dropout)
    x_BSD = x_BSD * saved["dropout"]
    for i in range(config.num_layers):
        name = f"layers.{i}"
        x_BSD, saved[name] = block.forward(x_BSD, part(w, name), config, i, mask, dropout, f"{name}.")
    if config.final_norm:
        x_BSD = block.norm_forward("final_norm", x_BSD, w, config, saved)
    head = part(w, "head")
    if config.tie_word_embeddings:
        head["weight"] = w["embedding.weight"]
    logits, saved["head"] = linear.forward(x_BSD, head)
    if config.logits_multiplier != 1:
        logits = logits * config.logits_multiplier
    if config.logits_softcap is not None:
        logits, saved["slope"] = attention.softcap_forward(logits, config.logits_softcap)
    return logits, saved


def backward(d_logits: Array, saved: Any) -> dict[str, Array]:
    """Compute the gradient of every weight.

    Parameters
    ----------
    d_logits : (B, S, V) array or Magnitude
    saved : object
        From `forward`.

    Returns
    -------
    gradients : dict
        By the names of the weights. An embedding that is the head's weight, too, has the sum of both gradients.
    """
    config, gradients = saved["config"], {}
    if config.logits_softcap is not None:
        d_logits = d_logits * saved["slope"]
    if config.logits_multiplier != 1:
        d_logits = d_logits * config.logits_multiplier
    d_BSD, d_head = linear.backward(d_logits, saved["head"])
    gradients.update(named("head", d_head))
    if config.final_norm:
        d_BSD = block.part_backward("final_norm", d_BSD, saved, gradients)
    for i in reversed(range(config.num_layers)):
        d_BSD, d_block = block.backward(d_BSD, saved[f"layers.{i}"])
        gradients.update(named(f"layers.{i}", d_block))
    d_BSD = d_BSD * saved["dropout"]
    if config.embedding_norm:
        d_BSD = block.part_backward("embedding_norm", d_BSD, saved, gradients)
    if config.position_embedding == "learned":
        gradients.update(named("position", embedding.backward(d_BSD.sum(axis=0), saved["position"])))
    d_embedding = embedding.backward(d_BSD, saved["embedding"])["weight"]
    if config.tie_word_embeddings:
        d_embedding = d_embedding + gradients.pop("head.weight")
    gradients["embedding.weight"] = d_embedding
    return {name: gradients[name] for name in saved["w"]}
