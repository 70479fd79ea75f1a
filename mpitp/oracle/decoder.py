"""The decoder on one process, forward and backward: what the parallel one must equal.

As dense_layers.py, on which it stands. Weights are a flat dict by the names of Decoder's parameters.

Dimension key: B sequences, S positions, V vocabulary, H query heads.
"""
import numpy as np

from .layers import (attention_backward, attention_forward, linear_backward, linear_forward, mlp_backward,
                     mlp_forward, norm_backward, norm_forward, one_hot)


def part(w, prefix):
    """The weights behind a prefix, without it."""
    return {name[len(prefix):]: w[name] for name in w if name.startswith(prefix)}


def named(prefix, gradients):
    return {prefix + name: g for name, g in gradients.items()}


# --- block -------------------------------------------------------------------------------------------------------

def no_dropout(name, shape, probability):
    return 1


def block_forward(x, w, config, layer=0, mask=None, dropout=no_dropout, prefix=""):
    """x + attention(norm(x)), then x + mlp(norm(x)), or as config.norm_placement and parallel_residual say.

    dropout : function(name, shape, probability) -> what to multiply by
    """
    B, S, _ = x.shape
    hidden, saved = config.hidden_dropout, {}
    weights_scale = dropout(f"{prefix}attention.weights.dropout", (B, config.num_attention_heads, S, S),
                            config.attention_dropout)
    run = {"attention": lambda h: attention_forward(h, part(w, "attention."), config, layer, mask, weights_scale),
           "mlp": lambda h: mlp_forward(h, part(w, "mlp."), config)}

    def norm(name, z):
        y, saved[name] = norm_forward(z, part(w, f"{name}."), config)
        return y

    if config.parallel_residual:
        h = norm("attention_norm", x)
        a, saved["attention"] = run["attention"](h)
        m, saved["mlp"] = run["mlp"](h if config.shared_norm else norm("mlp_norm", x))
        saved["scale"] = dropout(f"{prefix}dropout", x.shape, hidden)
        return x + (a + m) * saved["scale"], saved
    for name in ("attention", "mlp"):
        h = norm(f"{name}_norm", x) if config.norm_placement in ("before", "both") else x
        y, saved[name] = run[name](h)
        saved[f"{name} scale"] = dropout(f"{prefix}{name}.dropout", x.shape, hidden)
        y = y * saved[f"{name} scale"]
        if config.norm_placement == "after_residual":
            x = norm(f"{name}_post_norm", x + y)
        else:
            x = x + (y if config.norm_placement == "before" else norm(f"{name}_post_norm", y))
    return x, saved


def block_backward(dy, saved, w, config, layer=0):
    gradients = {}

    def back(name, d):
        if name == "attention":
            d, found = attention_backward(d, saved[name], part(w, "attention."), config, layer)
        elif name == "mlp":
            d, found = mlp_backward(d, saved[name], part(w, "mlp."), config)
        else:
            d, found = norm_backward(d, saved[name], part(w, f"{name}."), config)
        gradients.update(named(f"{name}.", found))
        return d

    if config.parallel_residual:
        d = dy * saved["scale"]
        da, dm = back("attention", d), back("mlp", d)
        if config.shared_norm:
            return dy + back("attention_norm", da + dm), gradients
        return dy + back("attention_norm", da) + back("mlp_norm", dm), gradients
    for name in ("mlp", "attention"):
        d = dy if config.norm_placement == "before" else back(f"{name}_post_norm", dy)
        residual = d if config.norm_placement == "after_residual" else dy
        d = back(name, d * saved[f"{name} scale"])
        dy = residual + (back(f"{name}_norm", d) if config.norm_placement in ("before", "both") else d)
    return dy, gradients


# --- decoder -----------------------------------------------------------------------------------------------------

def decoder_forward(config, w, ids, mask=None, dropout=no_dropout):
    """ids (B, S) -> logits (B, S, V), and what decoder_backward needs."""
    x = w["embedding.weight"][ids] * config.embedding_multiplier
    saved = {"ids": ids}
    if config.position_embedding == "learned":
        x = x + w["position.weight"][:ids.shape[1]]
    if config.embedding_norm:
        x, saved["embedding_norm"] = norm_forward(x, part(w, "embedding_norm."), config)
    saved["scale"] = dropout("embedding.dropout", x.shape, config.hidden_dropout)
    x = x * saved["scale"]
    for i in range(config.num_layers):
        x, saved[i] = block_forward(x, part(w, f"layers.{i}."), config, i, mask, dropout, f"layers.{i}.")
    if config.final_norm:
        x, saved["final_norm"] = norm_forward(x, part(w, "final_norm."), config)
    saved["x"] = x
    return linear_forward(x, head(config, w), "head"), saved


def decoder_backward(config, w, d_logits, saved):
    """{name: gradient} of every parameter."""
    dx, gradients = linear_backward(d_logits, saved["x"], head(config, w), "head")
    if config.final_norm:
        dx, found = norm_backward(dx, saved["final_norm"], part(w, "final_norm."), config)
        gradients.update(named("final_norm.", found))
    for i in reversed(range(config.num_layers)):
        dx, found = block_backward(dx, saved[i], part(w, f"layers.{i}."), config, i)
        gradients.update(named(f"layers.{i}.", found))
    dx = dx * saved["scale"]
    if config.embedding_norm:
        dx, found = norm_backward(dx, saved["embedding_norm"], part(w, "embedding_norm."), config)
        gradients.update(named("embedding_norm.", found))
    ids = saved["ids"]
    if config.position_embedding == "learned":
        M = w["position.weight"].shape[0]
        gradients["position.weight"] = one_hot(np.arange(ids.shape[1]), M, dx.dtype).T @ dx.sum(axis=0)
    hot = one_hot(ids, config.vocab_size, dx.dtype).reshape(-1, config.vocab_size)
    d_embedding = hot.T @ (dx * config.embedding_multiplier).reshape(-1, config.hidden_size)
    if config.tie_word_embeddings:
        d_embedding = d_embedding + gradients.pop("head.weight")
    gradients["embedding.weight"] = d_embedding
    return {name: gradients[name] for name in w}


def head(config, w):
    """The head's weights; the embedding's, where they are tied."""
    found = {name: w[name] for name in ("head.weight", "head.bias") if name in w}
    return {**found, "head.weight": w["embedding.weight"]} if config.tie_word_embeddings else found
