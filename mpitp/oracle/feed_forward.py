"""The feed-forward block on one process, forward and backward: what the parallel one must equal.

Shares no code with the layers or the ops, and says every formula in its plainest form: an oracle is read,
not trusted. Runs in the dtype of what it is given; float64 is the exact value that errors are measured from.

Dimension key: N rows (tokens), D hidden, F feed-forward.
"""
import math

import numpy as np

PIECE = 1 << 18


def logistic(z):
    return np.exp(-np.logaddexp(0, -z))


def erf(z):
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(z.astype(np.float64)), dtype=np.float64).astype(z.dtype)


def activation(name, h):
    """act(h), act'(h) and a bound on |act''|, elementwise."""
    if name == "identity":
        return h, np.ones_like(h), 0.0
    if name == "relu":
        return np.maximum(h, 0), (h > 0).astype(h.dtype), 0.0
    if name == "silu":
        s = logistic(h)
        return h * s, s + h * s * (1 - s), 0.5
    if name == "gelu":
        cdf = (1 + erf(h / math.sqrt(2))) / 2
        return h * cdf, cdf + h * np.exp(-h * h / 2) / math.sqrt(2 * math.pi), 0.8
    if name == "gelu_tanh":
        k, c = math.sqrt(2 / math.pi), 0.044715
        t = np.tanh(k * (h + c * h * h * h))
        return 0.5 * h * (1 + t), 0.5 * (1 + t) + 0.5 * h * (1 - t * t) * k * (1 + 3 * c * h * h), 0.8
    raise ValueError(f"found activation {name!r}, expected gelu_tanh, gelu, silu, relu or identity")


def mlp_forward(x_ND, w, name, gated):
    """y = (act(x G^T + bg) * (x U^T + bu)) V^T + bv; without a gate, act(x U^T + bu) V^T + bv.

    w : {"up.weight" [F, D], "up.bias" [F], "gate.weight", "gate.bias", "down.weight" [D, F], "down.bias" [D]},
        biases and gate only where the block has them
    """
    u_NF = x_ND @ w["up.weight"].T + w.get("up.bias", 0)
    if gated:
        g_NF = x_ND @ w["gate.weight"].T + w.get("gate.bias", 0)
        a_NF = activation(name, g_NF)[0] * u_NF
    else:
        g_NF, a_NF = None, activation(name, u_NF)[0]
    y_ND = a_NF @ w["down.weight"].T + w.get("down.bias", 0)
    return y_ND, (x_ND, g_NF, u_NF, a_NF)


def mlp_backward(dy_ND, saved, w, name, gated):
    """The gradients of x and of every array in w."""
    x_ND, g_NF, u_NF, a_NF = saved
    d = {"down.weight": dy_ND.T @ a_NF, "down.bias": dy_ND.sum(axis=0)}
    da_NF = dy_ND @ w["down.weight"]
    if gated:
        act_NF, slope_NF, _ = activation(name, g_NF)
        du_NF, dg_NF = da_NF * act_NF, da_NF * u_NF * slope_NF
        dx_ND = du_NF @ w["up.weight"] + dg_NF @ w["gate.weight"]
        d.update({"gate.weight": dg_NF.T @ x_ND, "gate.bias": dg_NF.sum(axis=0)})
    else:
        du_NF = da_NF * activation(name, u_NF)[1]
        dx_ND = du_NF @ w["up.weight"]
    d.update({"up.weight": du_NF.T @ x_ND, "up.bias": du_NF.sum(axis=0)})
    return dx_ND, {key: d[key] for key in w}


def mlp_magnitudes(x_ND, dy_ND, w, name, gated):
    """How large a rounding error of relative size 1 in every operation could grow: {"y", "dx", every key of w}.

    The lines of mlp_forward and mlp_backward to first order: what is multiplied or added up becomes its absolute
    value, and a product of two inexact factors passes on the error of each. The error of a result in some dtype is
    then eps times its magnitude, times a factor that grows slowly with the sizes.
    """
    size = {key: np.abs(value) for key, value in w.items()}
    x_size, dy_size = np.abs(x_ND), np.abs(dy_ND)
    _, (_, g_NF, u_NF, _) = mlp_forward(x_ND, w, name, gated)
    da_NF = dy_ND @ w["down.weight"]
    da_size = dy_size @ size["down.weight"]
    u_size = x_size @ size["up.weight"].T + size.get("up.bias", 0)
    if gated:
        g_size = x_size @ size["gate.weight"].T + size.get("gate.bias", 0)
        act_NF, slope_NF, _ = activation(name, g_NF)
        act_size, slope_size = activation_magnitudes(name, g_NF, g_size)
        a_size = act_size * np.abs(u_NF) + np.abs(act_NF) * u_size
        du_size = da_size * np.abs(act_NF) + np.abs(da_NF) * act_size
        dg_size = (da_size * np.abs(u_NF * slope_NF) + np.abs(da_NF * slope_NF) * u_size
                   + np.abs(da_NF * u_NF) * slope_size)
    else:
        slope_NF = activation(name, u_NF)[1]
        a_size, slope_size = activation_magnitudes(name, u_NF, u_size)
        du_size = da_size * np.abs(slope_NF) + np.abs(da_NF) * slope_size
    found = {"y": a_size @ size["down.weight"].T + size.get("down.bias", 0), "dx": du_size @ size["up.weight"],
             "up.weight": du_size.T @ x_size, "up.bias": du_size.sum(axis=0),
             "down.weight": dy_size.T @ a_size, "down.bias": dy_size.sum(axis=0)}
    if gated:
        found["dx"] = found["dx"] + dg_size @ size["gate.weight"]
        found.update({"gate.weight": dg_size.T @ x_size, "gate.bias": dg_size.sum(axis=0)})
    return {key: found[key] for key in ("y", "dx", *w)}


def activation_magnitudes(name, h, h_size):
    """The magnitudes of act(h) and act'(h): those of their own terms, and what becomes of h's, h_size."""
    act, slope, bend = activation(name, h)
    act_terms, slope_terms = np.abs(act), np.abs(slope)
    if name in ("gelu", "gelu_tanh"):           # 1 + erf and 1 + tanh cancel for negative h: their terms do not
        act_terms, slope_terms = np.abs(h), 1 + np.abs(h)
    if name == "relu":                          # so close to 0 float32 may flip the sign: either slope is right
        eps = float(np.finfo(np.float32).eps)
        slope_terms = slope_terms + (np.abs(h) <= 4 * eps * h_size) / eps
    return act_terms + np.abs(slope) * h_size, slope_terms + bend * h_size


def error_ratio(computed, exact, magnitude):
    """max |computed - exact| / (eps * magnitude), eps of the computed dtype; inf for another shape or a non-finite.

    As ScaLAPACK's testers judge it (PBLAS/TESTING). 0 / 0 counts as 0: exact where there is nothing to round.
    """
    if computed.shape != exact.shape:           # before NumPy stretches one over the other
        return math.inf
    if computed.size == 0:
        return 0.0
    worst, flat = 0.0, (computed.reshape(-1), exact.reshape(-1), magnitude.reshape(-1))
    for at in range(0, computed.size, PIECE):   # temporaries of a whole matrix cost more than the arithmetic
        found, true, size = (array[at:at + PIECE] for array in flat)
        error = np.abs(found.astype(np.float64) - true)
        allowed = np.finfo(computed.dtype).eps * size
        ratio = np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=allowed > 0)
        worst = max(worst, ratio.max() if np.isfinite(ratio).all() else math.inf)
    return float(worst)


def limit(dense_ratio):
    """What a parallel error ratio may be: as good as dense in the same dtype, within a factor of two.

    A dense run that overflows excuses nothing.
    """
    return max(4.0, 2 * dense_ratio) if math.isfinite(dense_ratio) else 4.0
