"""The feed-forward block on one process, forward and backward: what the parallel one must equal.

Shares no code with the layers or the ops, and says every formula in its plainest form: an oracle is read,
not trusted. Runs in the dtype of what it is given; float64 is the exact value that errors are measured from.

Dimension key: N rows (tokens), D hidden, F feed-forward.
"""
import math

import numpy as np


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
    raise ValueError(f"found activation {name!r}")


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
    return y_ND.astype(x_ND.dtype, copy=False), (x_ND, g_NF, u_NF, a_NF)


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

    To first order: each product and each sum is replaced by that of absolute values, and the magnitude of what
    enters an activation leaves it times |act'| (or |act''| where a derivative is taken). The error of a result in
    a dtype is then eps times its magnitude, times a factor that grows slowly with the sizes.
    """
    size = {key: np.abs(value) for key, value in w.items()}
    x, dy = np.abs(x_ND), np.abs(dy_ND)
    _, (_, g_NF, u_NF, a_NF) = mlp_forward(x_ND, w, name, gated)
    _, d_a = a_NF, dy_ND @ w["down.weight"]
    in_u = x @ size["up.weight"].T + size.get("up.bias", 0)
    in_da = dy @ size["down.weight"]
    if gated:
        in_g = x @ size["gate.weight"].T + size.get("gate.bias", 0)
        act, slope, bend = activation(name, g_NF)
        kink = kinks(name, g_NF, in_g)
        in_act = np.abs(act) + np.abs(slope) * in_g
        in_a = in_act * np.abs(u_NF) + np.abs(act) * in_u
        in_du = in_da * np.abs(act) + np.abs(d_a) * in_act
        in_dg = (in_da * np.abs(u_NF) + np.abs(d_a) * in_u) * np.abs(slope) \
            + np.abs(d_a * u_NF) * (bend * in_g + np.abs(slope) + kink)
    else:
        act, slope, bend = activation(name, u_NF)
        kink = kinks(name, u_NF, in_u)
        in_a = np.abs(act) + np.abs(slope) * in_u
        in_du = in_da * np.abs(slope) + np.abs(d_a) * (bend * in_u + np.abs(slope) + kink)
    found = {"y": in_a @ size["down.weight"].T + size.get("down.bias", 0), "dx": in_du @ size["up.weight"],
             "up.weight": in_du.T @ x, "up.bias": in_du.sum(axis=0),
             "down.weight": dy.T @ in_a, "down.bias": dy.sum(axis=0)}
    if gated:
        found["dx"] = found["dx"] + in_dg @ size["gate.weight"]
        found.update({"gate.weight": in_dg.T @ x, "gate.bias": in_dg.sum(axis=0)})
    return {key: found[key] for key in ("y", "dx", *w)}


def kinks(name, h, magnitude):
    """1/eps where relu's input is so close to 0 that rounding may flip its sign: any derivative is right there."""
    if name != "relu":
        return 0.0
    eps = float(np.finfo(np.float32).eps)
    return (np.abs(h) <= 4 * eps * magnitude) / eps


def error_ratio(computed, exact, magnitude):
    """max |computed - exact| / (eps * magnitude), eps of the computed dtype; inf for anything not finite.

    As ScaLAPACK's testers judge it (PBLAS/TESTING). 0 / 0 counts as 0: exact where there is nothing to round.
    """
    if computed.size == 0:
        return 0.0
    error = np.abs(computed.astype(np.float64) - exact)
    allowed = np.finfo(computed.dtype).eps * magnitude
    ratio = np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=allowed > 0)
    return float(ratio.max()) if np.isfinite(ratio).all() else math.inf


def limit(dense_ratio):
    """What a parallel error ratio may be: as good as dense in the same dtype, within a factor of two."""
    return max(4.0, 2 * dense_ratio)
