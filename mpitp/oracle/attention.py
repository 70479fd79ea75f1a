"""Self-attention on one process: grouped queries, rotary positions or ALiBi, query/key norm, sliding windows.

Dimension key: B sequences, S positions, D hidden, H query heads, G key/value heads, K features of a head; the last two
axes of scores are queries and keys.

Sources: A. Vaswani et al., arXiv 1706.03762; J. Ainslie et al., arXiv 2305.13245 (grouped queries).
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from . import linear, norm
from .linear import Weights, named, part
from .magnitude import numbers_of
from .positions import alibi, rotate_backward, rotate_forward

if TYPE_CHECKING:
    from ..config import DecoderConfig


# --- softmax -----------------------------------------------------------------------------------------------------

def softmax_forward(z: Array, allowed: Array) -> Array:
    """p = e^z / sum of e^z over the allowed keys; 0 for the others, and for a query that may attend to none.

    Parameters
    ----------
    z : (..., S, S) array or Magnitude
    allowed : array of bool
        Which keys each query may attend to; broadcasts to the shape of z.

    Returns
    -------
    p : (..., S, S) array or Magnitude
    """
    highest = np.where(allowed, numbers_of(z), -np.inf).max(axis=-1, keepdims=True)
    highest = np.where(np.isfinite(highest), highest, 0).astype(z.dtype)
    e = np.exp((z - highest) * allowed) * allowed
    total = e.sum(axis=-1, keepdims=True)
    return e / (total + (numbers_of(total) == 0))


def softmax_backward(dp: Array, p: Array) -> Array:
    """dz = p (dp - sum of p dp over the keys)"""
    return p * (dp - (p * dp).sum(axis=-1, keepdims=True))


def softcap_forward(z: Array, cap: float) -> tuple[Array, Array]:
    """y = cap tanh(z / cap), and dy/dz = 1 - tanh^2 (Gemma 2, arXiv 2408.00118)

    Parameters
    ----------
    z : (...) array or Magnitude
    cap : float

    Returns
    -------
    y, slope : (...) array or Magnitude
    """
    t = np.tanh(z / cap)
    return t * cap, 1 - t * t


def allowed_pairs(B: int, S: int, window: int | None, mask: Array | None, causal: bool = True) -> Array:
    """Return whether each query may attend to each key: (B, 1, S, S).

    Parameters
    ----------
    B, S : int
    window : int or None
        How many positions a query sees up to itself, and in both directions from itself on; None: all.
    mask : array of bool or None
        Keys that may be attended to, (B, S); or a choice for each query, (B, S, S).
    causal : bool
        Whether no later key may be.
    """
    query, key = np.arange(S)[:, None], np.arange(S)
    within = np.abs(query - key) < (window or S)
    allowed = np.broadcast_to(within & (key <= query) if causal else within, (B, S, S))
    if mask is not None:
        allowed = allowed & (mask if mask.ndim == 3 else mask[:, None, :])
    return allowed[:, None]


# --- heads -------------------------------------------------------------------------------------------------------

def heads_forward(x_BSD: Array, w: Weights, name: str, config: DecoderConfig, layer: int) -> tuple[Array, Any]:
    """Project x to the heads of "query", "key" or "value"; the config says whether to normalise and rotate."""
    (B, S, _), K = x_BSD.shape, config.head_dim
    z, saved_linear = linear.forward(x_BSD, part(w, name))
    saved_norm, of_each_head = None, config.qk_norm and not config.qk_norm_over_heads
    if config.qk_norm_over_heads and name != "value":
        z, saved_norm = norm.forward(z, part(w, f"{name}_norm"), **norm.options(config))
    z_BHSK = z.reshape(B, S, -1, K).transpose(0, 2, 1, 3)
    rotary, saved, of_norm = config.rotary_of(layer), [], part(w, f"{name}_norm") if of_each_head else {}
    if config.qk_norm_by_head and of_each_head and name != "value":
        of_norm["weight"] = of_norm["weight"][:, None, :]           # (heads, 1, K)
    steps = ("rotary", "norm") if config.qk_norm_after_rotary else ("norm", "rotary")
    for step in steps if name != "value" else ():
        if step == "norm" and of_each_head:
            z_BHSK, of_step = norm.forward(z_BHSK, of_norm, **norm.options(config))
            saved.append((step, of_step))
        elif step == "rotary" and rotary is not None:
            z_BHSK, of_step = rotate_forward(z_BHSK, rotary)
            saved.append((step, of_step))
    return z_BHSK, (name, saved_linear, saved_norm, saved)


def heads_backward(dz_BHSK: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
    """Compute the gradients of x and of the weights of one projection."""
    name, saved_linear, saved_norm, saved_steps = saved
    gradients = {}
    for step, of_step in reversed(saved_steps):
        if step == "rotary":
            dz_BHSK = rotate_backward(dz_BHSK, of_step)
        else:
            dz_BHSK, d_norm = norm.backward(dz_BHSK, of_step)
            gradients.update(named(f"{name}_norm", d_norm))
    B, H, S, K = dz_BHSK.shape
    dz = dz_BHSK.transpose(0, 2, 1, 3).reshape(B, S, H * K)
    if saved_norm is not None:
        dz, d_norm = norm.backward(dz, saved_norm)
        gradients.update(named(f"{name}_norm", d_norm))
    dx_BSD, d_linear = linear.backward(dz, saved_linear)
    return dx_BSD, {**named(name, d_linear), **gradients}


# --- attention ---------------------------------------------------------------------------------------------------

def forward(x_BSD: Array, w: Weights, config: DecoderConfig, layer: int = 0, mask: Array | None = None,
            dropout: Any = 1) -> tuple[Array, Any]:
    """y = (softmax(q k^T * scale) v, the heads side by side) W_o^T + b_o

    Parameters
    ----------
    x_BSD : (B, S, D) array or Magnitude
    w : dict
        "query.weight" (H K, D), "key.weight" and "value.weight" (G K, D), "out.weight" (D, H K), their biases where
        there are some, and with config.qk_norm "query_norm.weight" and "key_norm.weight" (K), or of each head (H, K)
        and (G, K), and their biases (K).
    config : DecoderConfig
        Heads, positions, windows and norms.
    layer : int
        Which layer of the decoder it is, as windows and rotary positions may differ by layer.
    mask : array of bool, optional
        Keys that may be attended to, (B, S) or (B, S, S), beside what the config allows.
    dropout : (B, H, S, S) array or 1
        What the attention weights are multiplied by, 0 or 1 / (1 - p).

    Returns
    -------
    y_BSD : (B, S, D) array or Magnitude
    saved : object
        What `backward` needs.
    """
    (B, S, _), H, G = x_BSD.shape, config.num_attention_heads, config.query_groups
    q_BHSK, saved_query = heads_forward(x_BSD, w, "query", config, layer)
    k_BGSK, saved_key = heads_forward(x_BSD, w, "key", config, layer)
    v_BGSK, saved_value = heads_forward(x_BSD, w, "value", config, layer)
    group_of_head = np.arange(H) // (H // G)
    k_BHSK, v_BHSK = k_BGSK[:, group_of_head], v_BGSK[:, group_of_head]
    q_BHSK = q_BHSK * config.scale
    z_BHSS = q_BHSK @ k_BHSK.swapaxes(-1, -2)
    slope: Any = 1
    if config.attention_softcap is not None:
        z_BHSS, slope = softcap_forward(z_BHSS, config.attention_softcap)
    if config.position_embedding == "alibi":
        z_BHSS = z_BHSS + alibi(H, S, x_BSD.dtype)
    p_BHSS = softmax_forward(z_BHSS, allowed_pairs(B, S, config.window(layer), mask, config.causal))
    a_BHSK = (p_BHSS * dropout) @ v_BHSK
    y_BSD, saved_out = linear.forward(a_BHSK.transpose(0, 2, 1, 3).reshape(B, S, -1), part(w, "out"))
    saved_projections = (saved_query, saved_key, saved_value, saved_out)
    return y_BSD, (saved_projections, q_BHSK, k_BHSK, v_BHSK, p_BHSS, slope, dropout, config)


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
    (saved_query, saved_key, saved_value, saved_out), q_BHSK, k_BHSK, v_BHSK, p_BHSS, slope, dropout, config = saved
    (B, S, _), H, G, K = dy_BSD.shape, config.num_attention_heads, config.query_groups, config.head_dim
    da, d_out = linear.backward(dy_BSD, saved_out)
    da_BHSK = da.reshape(B, S, H, K).transpose(0, 2, 1, 3)
    dv_BHSK = (p_BHSS * dropout).swapaxes(-1, -2) @ da_BHSK
    dz_BHSS = softmax_backward((da_BHSK @ v_BHSK.swapaxes(-1, -2)) * dropout, p_BHSS) * slope
    dq_BHSK, dk_BHSK = (dz_BHSS @ k_BHSK) * config.scale, dz_BHSS.swapaxes(-1, -2) @ q_BHSK
    # A key/value head is shared by H / G query heads, so its gradient is the sum over them.
    dk_BGSK, dv_BGSK = (d.reshape(B, G, H // G, S, K).sum(axis=2) for d in (dk_BHSK, dv_BHSK))
    dx_query, d_query = heads_backward(dq_BHSK, saved_query)
    dx_key, d_key = heads_backward(dk_BGSK, saved_key)
    dx_value, d_value = heads_backward(dv_BGSK, saved_value)
    return dx_query + dx_key + dx_value, {**d_query, **d_key, **d_value, **named("out", d_out)}
