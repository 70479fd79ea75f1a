"""Blocks and decoders on ranks in lockstep.

The tensors between have the names of the parts: "attention_norm" is what that norm returns, "attention.y" what the
attention does, "residual" what the first branch leaves.
"""
from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from ...oracle import embedding
from ..case import Case, part_of
from ..ranks import Local, Ranks
from . import attention, feed_forward
from .linear import column_linear_backward, column_linear_forward, joined
from .norm import norm_backward, norm_forward
from .vocabulary import embedding_forward, embedding_gradient, loss_backward, loss_forward

BRANCHES = ("attention", "mlp")


def branch_forward(ranks: Ranks, case: Case, prefix: str, branch: str, x: Local, layer: int) -> tuple[Local, Any]:
    """Run the attention or the feed-forward block; returns what it leaves, after its dropout."""
    name = joined(prefix, branch)
    saved = attention.forward(ranks, case, name, x, layer) if branch == "attention" else \
        feed_forward.mlp_forward(ranks, case, name, x)
    drop = case.inputs.get(f"{name}.dropout")
    y = ranks.kept["forward", f"{name}.y"].values
    return ([y_r * drop for y_r in y] if drop is not None else y), (saved, drop)


def branch_backward(ranks: Ranks, case: Case, prefix: str, branch: str, d: Local, saved: Any, x_name: str) -> Local:
    """Go back through a branch; the gradient of its input is kept under x_name."""
    inner, drop = saved
    name = joined(prefix, branch)
    if drop is not None:
        d = [d_r * drop for d_r in d]
    module: ModuleType = attention if branch == "attention" else feed_forward
    run = module.backward if branch == "attention" else module.mlp_backward
    return run(ranks, case, name, d, inner, x_name)


def block_forward(ranks: Ranks, case: Case, prefix: str, x: Local, layer: int) -> tuple[Local, dict[str, Any]]:
    """y = x + attention(norm(x)), then y + mlp(norm(y)), or as norm_placement and parallel_residual have it."""
    config, saved = case.config, {}         # type: Any, dict[str, Any]
    if config.parallel_residual:
        h, saved["attention_norm"] = norm_forward(ranks, case, joined(prefix, "attention_norm"), x,
                                                  joined(prefix, "attention_norm"))
        h_mlp = h
        if not config.shared_norm:
            h_mlp, saved["mlp_norm"] = norm_forward(ranks, case, joined(prefix, "mlp_norm"), x,
                                                    joined(prefix, "mlp_norm"))
        a, saved["attention"] = branch_forward(ranks, case, prefix, "attention", h, layer)
        m, saved["mlp"] = branch_forward(ranks, case, prefix, "mlp", h_mlp, layer)
        y = [x_r + (a_r + m_r) for x_r, a_r, m_r in zip(ranks.changed(x, "residual_x"), a, m)]
        return ranks.keep("forward", joined(prefix, "y"), y, None, "block_y"), saved
    for branch, out in zip(BRANCHES, ("residual", "y")):
        h = x
        if config.norm_placement in ("before", "both"):
            name = joined(prefix, f"{branch}_norm")
            h, saved[f"{branch}_norm"] = norm_forward(ranks, case, name, x, name)
        h, saved[branch] = branch_forward(ranks, case, prefix, branch, h, layer)
        post = joined(prefix, f"{branch}_post_norm")
        if config.norm_placement in ("after", "both"):
            h, saved[f"{branch}_post_norm"] = norm_forward(ranks, case, post, h, post)
        x = [x_r + h_r for x_r, h_r in zip(ranks.changed(x, "residual_x"), h)]
        if config.norm_placement == "after_residual":
            x, saved[f"{branch}_post_norm"] = norm_forward(ranks, case, post, x, post)
        x = ranks.keep("forward", joined(prefix, out), x, None, f"block_{out}")
    return x, saved


def block_backward(ranks: Ranks, case: Case, prefix: str, dy: Local, saved: dict[str, Any], x_name: str) -> Local:
    """Compute the gradient of x, under the name of x, and of every weight."""
    config = case.config
    if config.parallel_residual:
        return parallel_backward(ranks, case, prefix, dy, saved, x_name)
    for branch, before in (("mlp", joined(prefix, "residual")), ("attention", x_name)):
        d, d_residual = dy, dy
        after = joined(prefix, f"{branch}.y")
        if config.norm_placement != "before":
            d = norm_backward(ranks, case, joined(prefix, f"{branch}_post_norm"), dy, saved[f"{branch}_post_norm"],
                              after)
            if config.norm_placement == "after_residual":
                d_residual = d
        normed = config.norm_placement in ("before", "both")
        into = joined(prefix, f"{branch}_norm") if normed else before
        d = branch_backward(ranks, case, prefix, branch, d, saved[branch], into)
        if normed:
            d = norm_backward(ranks, case, into, d, saved[f"{branch}_norm"], before)
        d_residual = ranks.changed(d_residual, "residual_dx")
        dy = ranks.keep("backward", before, [a + b for a, b in zip(d_residual, d)], None, "block_dx")
    return dy


def parallel_backward(ranks: Ranks, case: Case, prefix: str, dy: Local, saved: dict[str, Any], x_name: str) -> Local:
    """Go back through a block whose branches stand side by side."""
    norms = ["attention_norm", "attention_norm" if case.config.shared_norm else "mlp_norm"]
    d = [branch_backward(ranks, case, prefix, branch, dy, saved[branch], joined(prefix, name))
         for branch, name in zip(BRANCHES, norms)]
    if case.config.shared_norm:
        d = [ranks.keep("backward", joined(prefix, norms[0]), [a + b for a, b in zip(*d)])]
    dx = ranks.changed(dy, "residual_dx")
    for d_branch, name in zip(d, norms):
        d_x = norm_backward(ranks, case, joined(prefix, name), d_branch, saved[name], x_name)
        dx = [a + b for a, b in zip(dx, d_x)]
    return ranks.keep("backward", x_name, dx, None, "block_dx")


def block(ranks: Ranks, case: Case) -> None:
    """Run a block alone."""
    x = ranks.changed([case.inputs["x"]] * ranks.count, "input_x")
    _, saved = block_forward(ranks, case, "", x, case.options["layer"])
    dy = ranks.keep("backward", "y", [case.inputs["dy"]] * ranks.count)
    block_backward(ranks, case, "", dy, saved, "x")


def decoder(ranks: Ranks, case: Case) -> None:
    """Run a decoder with its loss: embedding, blocks, final norm, head, cross entropy."""
    config, ids = case.config, case.inputs["ids"]
    learned = config.position_embedding == "learned"
    x = embedding_forward(ranks, case, "embedding", ids, "embedding")
    if learned:
        added = [w["position.weight"][np.arange(ids.shape[1])] for w in case.weights]
        added = ranks.changed(added, "position_y")
        x = ranks.keep("forward", "position", [x_r + a for x_r, a in zip(x, added)])
    saved: dict[str, Any] = {}
    if config.embedding_norm:
        x, saved["embedding_norm"] = norm_forward(ranks, case, "embedding_norm", x, "embedding_norm")
    drop = case.inputs.get("embedding.dropout")
    if drop is not None:
        x = [x_r * drop for x_r in x]
    names = ["embedding_norm" if config.embedding_norm else "position" if learned else "embedding"]
    for i in range(config.num_layers):
        x, saved[f"layers.{i}"] = block_forward(ranks, case, f"layers.{i}", x, i)
        names.append(f"layers.{i}.y")
    if config.final_norm:
        x, saved["final_norm"] = norm_forward(ranks, case, "final_norm", x, "final_norm")
    head_name = "embedding" if config.tie_word_embeddings else "head"
    logits, place, saved_head = column_linear_forward(ranks, case, head_name, x, "logits",
                                                      part_of(case.weights, "head"))
    _, saved_loss = loss_forward(ranks, case, logits, place, case.inputs["targets"])
    d = ranks.keep("backward", "logits", loss_backward(ranks, case, saved_loss), place, "d_logits")
    into = "final_norm" if config.final_norm else names[-1]
    d, d_head = column_linear_backward(ranks, case, d, saved_head, place, into)
    if not config.tie_word_embeddings:
        for key, gradient in d_head.items():
            ranks.keep("backward", f"head.{key}", gradient, case.places[f"head.{key}"], "weight_grad")
    if config.final_norm:
        d = norm_backward(ranks, case, "final_norm", d, saved["final_norm"], names[-1])
    for i in reversed(range(config.num_layers)):
        d = block_backward(ranks, case, f"layers.{i}", d, saved[f"layers.{i}"], names[i])
    if drop is not None:
        d = [d_r * drop for d_r in d]
    if config.embedding_norm:
        d = norm_backward(ranks, case, "embedding_norm", d, saved["embedding_norm"],
                          "position" if learned else "embedding")
    if learned:
        gradients = [embedding.backward(d_r.sum(axis=0), (np.arange(ids.shape[1]), w["position.weight"].shape, 1.0))
                     for d_r, w in zip(d, case.weights)]
        ranks.keep("backward", "position.weight", [g["weight"] for g in gradients], case.places["position.weight"])
    found, place = embedding_gradient(ranks, case, "embedding", ids, d)
    if config.tie_word_embeddings:
        found = [a + b for a, b in zip(ranks.changed(found, "tied_embedding"),
                                       ranks.changed(d_head["weight"], "tied_head"))]
    ranks.keep("backward", "embedding.weight", found, place, "weight_grad")
