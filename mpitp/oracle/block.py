"""The decoder block on one process: attention and feed-forward, their norms, residuals and dropout.

Dimension key: B sequences, S positions, D hidden, H query heads.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arrays import Array
from . import attention, feed_forward, norm
from .linear import Weights, named, part

if TYPE_CHECKING:
    from ..config import DecoderConfig

Dropout = Callable[[str, tuple[int, ...], float], Any]


def no_dropout(name: str, shape: tuple[int, ...], probability: float) -> int:
    """Keep everything."""
    return 1


def forward(x_BSD: Array, w: Weights, config: DecoderConfig, layer: int = 0, mask: Array | None = None,
            dropout: Dropout = no_dropout, name: str = "") -> tuple[Array, Any]:
    """y = x + attention(norm(x)), then y + mlp(norm(y)), or as config.norm_placement and parallel_residual have it.

    Parameters
    ----------
    x_BSD : (B, S, D) array or Magnitude
    w : dict
        Under "attention." and "mlp." the weights of `attention` and `feed_forward`; norms under "attention_norm." and
        "mlp_norm." (before), "attention_post_norm." and "mlp_post_norm." (after).
    config : DecoderConfig
    layer : int
        Which layer of the decoder it is.
    mask : array of bool, optional
        As that of `attention.forward`.
    dropout : function of (name, shape, probability)
        Returns what to multiply by, 0 or 1 / (1 - p).
    name : str
        What the names that `dropout` is given begin with.

    Returns
    -------
    y_BSD : (B, S, D) array or Magnitude
    saved : object
        What `backward` needs.
    """
    B, S, _ = x_BSD.shape
    saved: dict[str, Any] = {"config": config}
    drop_weights = dropout(f"{name}attention.weights.dropout", (B, config.num_attention_heads, S, S),
                           config.attention_dropout)
    if config.parallel_residual:
        h = norm_forward("attention_norm", x_BSD, w, config, saved)
        h_mlp = h if config.shared_norm else norm_forward("mlp_norm", x_BSD, w, config, saved)
        a, saved["attention"] = attention.forward(h, part(w, "attention"), config, layer, mask, drop_weights)
        m, saved["mlp"] = feed_forward.forward(h_mlp, part(w, "mlp"), config.activation)
        saved["dropout"] = dropout(f"{name}dropout", x_BSD.shape, config.hidden_dropout) * config.residual_multiplier
        return x_BSD + (a + m) * saved["dropout"], saved
    for branch in ("attention", "mlp"):
        h = x_BSD
        if config.norm_placement in ("before", "both"):
            h = norm_forward(f"{branch}_norm", x_BSD, w, config, saved)
        if branch == "attention":
            h, saved[branch] = attention.forward(h, part(w, branch), config, layer, mask, drop_weights)
        else:
            h, saved[branch] = feed_forward.forward(h, part(w, branch), config.activation)
        saved[f"{branch} dropout"] = dropout(f"{name}{branch}.dropout", x_BSD.shape, config.hidden_dropout) * \
            config.residual_multiplier
        h = h * saved[f"{branch} dropout"]
        if config.norm_placement == "after_residual":
            x_BSD = norm_forward(f"{branch}_post_norm", x_BSD + h, w, config, saved)
        elif config.norm_placement == "before":
            x_BSD = x_BSD + h
        else:
            x_BSD = x_BSD + norm_forward(f"{branch}_post_norm", h, w, config, saved)
    return x_BSD, saved


def backward(dy_BSD: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
    """Compute the gradients of x and of every weight.

    Parameters
    ----------
    dy_BSD : (B, S, D) array or Magnitude
    saved : object
        From `forward`.

    Returns
    -------
    dx_BSD : (B, S, D) array or Magnitude
    gradients : dict
        By the names of the weights.
    """
    config = saved["config"]
    gradients: dict[str, Array] = {}
    if config.parallel_residual:
        d = dy_BSD * saved["dropout"]
        da, dm = (part_backward(branch, d, saved, gradients) for branch in ("attention", "mlp"))
        if config.shared_norm:
            return dy_BSD + part_backward("attention_norm", da + dm, saved, gradients), gradients
        dx_attention = part_backward("attention_norm", da, saved, gradients)
        return dy_BSD + dx_attention + part_backward("mlp_norm", dm, saved, gradients), gradients
    for branch in ("mlp", "attention"):
        d = dy_BSD
        if config.norm_placement != "before":
            d = part_backward(f"{branch}_post_norm", d, saved, gradients)
        d_residual = d if config.norm_placement == "after_residual" else dy_BSD
        d = part_backward(branch, d * saved[f"{branch} dropout"], saved, gradients)
        if config.norm_placement in ("before", "both"):
            d = part_backward(f"{branch}_norm", d, saved, gradients)
        dy_BSD = d_residual + d
    return dy_BSD, gradients


def norm_forward(name: str, x: Array, w: Weights, config: DecoderConfig, saved: dict[str, Any]) -> Array:
    """Normalise by the norm of this name, and keep under it what `part_backward` needs."""
    y, saved[name] = norm.forward(x, part(w, name), **norm.options(config))
    return y


def part_backward(name: str, d: Array, saved: dict[str, Any], gradients: dict[str, Array]) -> Array:
    """Go back through the part of this name, and add the gradients of its weights to `gradients`."""
    module = {"attention": attention, "mlp": feed_forward}.get(name, norm)
    d, found = module.backward(d, saved[name])
    gradients.update(named(name, found))
    return d
