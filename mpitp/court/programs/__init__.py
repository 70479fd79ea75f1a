"""What each kind of layer computes, forward and backward, on ranks in lockstep, by the functions of mpitp.oracle."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..case import Case
from ..ranks import Local, Ranks
from . import attention as attentions, feed_forward
from .decoder import block, decoder
from .linear import column_linear, row_linear
from .norm import norm_backward, norm_forward
from .vocabulary import embedding_alone, loss_alone


def mlp(ranks: Ranks, case: Case) -> None:
    """Run a feed-forward block alone."""
    saved = feed_forward.mlp_forward(ranks, case, "", copies(ranks, case, "x"))
    feed_forward.mlp_backward(ranks, case, "", copies(ranks, case, "dy"), saved, "x")


def attention(ranks: Ranks, case: Case) -> None:
    """Run an attention layer alone."""
    saved = attentions.forward(ranks, case, "", copies(ranks, case, "x"), case.options["layer"])
    attentions.backward(ranks, case, "", copies(ranks, case, "dy"), saved, "x")


def norm(ranks: Ranks, case: Case) -> None:
    """Run a norm alone."""
    _, saved = norm_forward(ranks, case, "", copies(ranks, case, "x"), "y")
    dy = ranks.keep("backward", "y", copies(ranks, case, "dy"), None, "dy")
    norm_backward(ranks, case, "", dy, saved, "x")


def copies(ranks: Ranks, case: Case, name: str) -> Local:
    """Return an input as all ranks have it."""
    return ranks.changed([case.inputs[name]] * ranks.count, f"input_{name}")


def gradient_norm(ranks: Ranks, case: Case) -> None:
    """norm = sqrt(sum of the squares of all gradients): of the split ones summed over the ranks, of others once."""
    split = [sum((w * w).sum() for name, w in of_rank.items() if case.places[name] is not None)
             for of_rank in case.weights]
    whole = [sum((w * w).sum() for name, w in of_rank.items() if case.places[name] is None)
             for of_rank in case.weights]
    split = ranks.total("forward", "norm", split, "norm_squares")
    whole = ranks.changed(whole, "norm_replicated")
    ranks.keep("forward", "norm", [np.sqrt(a + b) for a, b in zip(split, whole)], None, "norm_value")


PROGRAMS: dict[str, Callable[[Ranks, Case], None]] = {
    "column_linear": column_linear, "row_linear": row_linear, "mlp": mlp, "attention": attention, "norm": norm,
    "embedding": embedding_alone, "loss": loss_alone, "block": block, "decoder": decoder,
    "gradient_norm": gradient_norm}
