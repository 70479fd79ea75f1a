"""The feed-forward block on one process.

Dimension key: N tokens (any number of axes), D hidden, F feed-forward.

Source of the gated form: N. Shazeer, arXiv 2002.05202.
"""
from typing import Any

from ..arrays import Array
from . import activation as activations, linear
from .linear import Weights, named, part


def forward(x_ND: Array, w: Weights, activation: str = "gelu_tanh") -> tuple[Array, Any]:
    """y = act(x U^T + b_u) V^T + b_v; with a gate, (act(x G^T + b_g) * (x U^T + b_u)) V^T + b_v.

    Parameters
    ----------
    x_ND : (..., D) array or Magnitude
    w : dict
        "up.weight" (F, D), "down.weight" (D, F); "gate.weight" (F, D) if the block has a gate; "up.bias" (F),
        "gate.bias" (F), "down.bias" (D) where there are biases.
    activation : str
        "gelu_tanh", "gelu", "silu", "relu" or "identity".

    Returns
    -------
    y_ND : (..., D) array or Magnitude
    saved : object
        What `backward` needs.
    """
    up_NF, saved_up = linear.forward(x_ND, part(w, "up"))
    gate_NF, saved_gate = linear.forward(x_ND, part(w, "gate")) if "gate.weight" in w else (up_NF, None)
    act_NF, slope_NF = activations.forward(gate_NF, activation)
    y_ND, saved_down = linear.forward(act_NF if saved_gate is None else act_NF * up_NF, part(w, "down"))
    return y_ND, (saved_up, saved_gate, saved_down, up_NF, act_NF, slope_NF)


def backward(dy_ND: Array, saved: Any) -> tuple[Array, dict[str, Array]]:
    """Compute the gradients of x and of every weight.

    Parameters
    ----------
    dy_ND : (..., D) array or Magnitude
    saved : object
        From `forward`.

    Returns
    -------
    dx_ND : (..., D) array or Magnitude
    gradients : dict
        By the names of the weights.
    """
    saved_up, saved_gate, saved_down, up_NF, act_NF, slope_NF = saved
    da_NF, d_down = linear.backward(dy_ND, saved_down)
    if saved_gate is None:
        dx_ND, d_up = linear.backward(activations.backward(da_NF, slope_NF), saved_up)
        return dx_ND, {**named("up", d_up), **named("down", d_down)}
    dx_ND, d_up = linear.backward(da_NF * act_NF, saved_up)
    dx_gate_ND, d_gate = linear.backward(activations.backward(da_NF * up_NF, slope_NF), saved_gate)
    return dx_ND + dx_gate_ND, {**named("up", d_up), **named("gate", d_gate), **named("down", d_down)}
