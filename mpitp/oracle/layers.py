"""The layers of a decoder on one process, forward and backward: what the parallel ones must equal.

As dense.py: shares no code with the layers or the ops, and says every formula in its plainest form. Runs in the dtype
of what it is given, and on Magnitude arrays. Weights are a flat dict by the names of the layer's parameters.

Dimension key: B sequences, S positions, D hidden, F feed-forward, V vocabulary, H query heads, G key/value heads, K
features of a head, N tokens.
"""
import math

import numpy as np

from .magnitude import activation, value


def one_hot(ids, size, dtype):
    return (ids[..., None] == np.arange(size)).astype(dtype)


# --- linear, norm ------------------------------------------------------------------------------------------------

def linear_forward(x, w, name):
    """y = x W^T + b."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def linear_backward(dy, x, w, name):
    flat_dy, flat_x = (a.reshape(-1, a.shape[-1]) for a in (dy, x))
    gradients = {f"{name}.weight": flat_dy.T @ flat_x}
    if f"{name}.bias" in w:
        gradients[f"{name}.bias"] = flat_dy.sum(axis=0)
    return dy @ w[f"{name}.weight"], gradients


def norm_forward(x, w, config):
    """y = (x - mean) / sqrt(var + epsilon) * w + b; RMS norm without the mean; 1 + w where it is zero-centered."""
    K = x.shape[-1]
    centred = x - x.sum(axis=-1, keepdims=True) / K if config.normalization == "layernorm" else x
    rstd = 1 / np.sqrt((centred * centred).sum(axis=-1, keepdims=True) / K + config.norm_epsilon)
    xhat = centred * rstd
    scale = w["weight"] + 1 if config.zero_centered_gamma else w["weight"]
    y = xhat * scale
    return (y + w["bias"] if "bias" in w else y), (xhat, rstd, scale)


def norm_backward(dy, saved, w, config):
    xhat, rstd, scale = saved
    K, rows = dy.shape[-1], (-1, dy.shape[-1])
    gradients = {"weight": (dy * xhat).reshape(*rows).sum(axis=0)}
    if "bias" in w:
        gradients["bias"] = dy.reshape(*rows).sum(axis=0)
    dxhat = dy * scale
    dx = dxhat - xhat * ((dxhat * xhat).sum(axis=-1, keepdims=True) / K)
    if config.normalization == "layernorm":
        dx = dx - dxhat.sum(axis=-1, keepdims=True) / K
    return dx * rstd, gradients


# --- attention ---------------------------------------------------------------------------------------------------

def rotation(rotary, K, S, dtype):
    """cos (S, K), signed sin (S, K) and the partner of each feature: rotated x = x cos + x[partner] sin."""
    dim = K if rotary.dim is None else rotary.dim
    frequency = np.array([rotary.base ** (-2 * i / dim) for i in range(dim // 2)])
    attention_factor = 1.0
    if rotary.scaling == "linear":
        frequency = frequency / rotary.factor
    elif rotary.scaling == "llama3":
        for i, f in enumerate(frequency):
            wave = 2 * math.pi / f
            longest, shortest = (rotary.original_max_positions / a for a in (rotary.low_freq_factor,
                                                                             rotary.high_freq_factor))
            if wave > longest:
                frequency[i] = f / rotary.factor
            elif wave > shortest:
                smooth = (rotary.original_max_positions / wave - rotary.low_freq_factor) \
                    / (rotary.high_freq_factor - rotary.low_freq_factor)
                frequency[i] = (1 - smooth) * f / rotary.factor + smooth * f
    elif rotary.scaling == "yarn":
        def pair(turns):
            return dim * math.log(rotary.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))
        low, high = pair(rotary.beta_fast), pair(rotary.beta_slow)
        if rotary.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high
        for i, f in enumerate(frequency):
            slowed = min(1, max(0, (i - low) / (high - low)))
            frequency[i] = slowed * f / rotary.factor + (1 - slowed) * f
        attention_factor = rotary.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(rotary.factor) + 1 if rotary.factor > 1 else 1.0
    cos, sin, partner = np.ones((S, K)), np.zeros((S, K)), np.arange(K)
    for i, f in enumerate(frequency):
        one, two = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + dim // 2)
        angle = np.arange(S) * f
        cos[:, one] = cos[:, two] = np.cos(angle) * attention_factor
        sin[:, one], sin[:, two] = -np.sin(angle) * attention_factor, np.sin(angle) * attention_factor
        partner[one], partner[two] = two, one
    return cos.astype(dtype), sin.astype(dtype), partner


def slopes(heads):
    """ALiBi's slope of each head."""
    power = 2 ** int(math.log2(heads))
    found = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    found += [2 ** (-8 * (h + 1) / (2 * power)) for h in range(0, 2 * power, 2)]
    return np.array(found[:heads])


def allowed_pairs(B, S, window, mask):
    """(B, 1, S, S): may the query attend to the key?"""
    query, key = np.arange(S)[:, None], np.arange(S)
    allowed = np.broadcast_to((key <= query) & (query - key < (window or S)), (B, S, S))
    if mask is not None:
        allowed = allowed & (mask if mask.ndim == 3 else mask[:, None, :])
    return allowed[:, None]


def attention_forward(x, w, config, layer=0, mask=None, scale=1):
    """y = sum over heads of softmax(scores) v, through the output projection.

    scale : dropout of the softmax, (B, H, S, S)
    """
    (B, S, _), H, G, K = x.shape, config.num_attention_heads, config.query_groups, config.head_dim
    rotary, saved = config.rotary_of(layer), {"x": x}

    def heads(name, count):
        return linear_forward(x, w, name).reshape(B, S, count, K).transpose(0, 2, 1, 3)

    def turned(name, count):
        z = heads(name, count)
        if config.qk_norm:
            z, saved[f"{name}_norm"] = norm_forward(z, {"weight": w[f"{name}_norm.weight"]}, config)
        if rotary:
            cos, sin, partner = rotation(rotary, K, S, x.dtype)
            z = z * cos + z[..., partner] * sin
        return z

    of_head = np.arange(H) // (H // G)
    q, k, v = turned("query", H), turned("key", G)[:, of_head], heads("value", G)[:, of_head]
    scores = (q * config.scale) @ k.swapaxes(-1, -2)
    if config.position_embedding == "alibi":
        distance = np.arange(S) - np.arange(S)[:, None]
        scores = scores + (slopes(H)[:, None, None] * distance).astype(x.dtype)
    allowed = allowed_pairs(B, S, config.window(layer), mask)
    highest = np.where(allowed, value(scores), -np.inf).max(axis=-1, keepdims=True)
    e = np.exp((scores - np.where(np.isfinite(highest), highest, 0).astype(x.dtype)) * allowed) * allowed
    total = e.sum(axis=-1, keepdims=True)
    p = e / (total + (value(total) == 0))               # a query that may attend to nothing: 0
    a = ((p * scale) @ v).transpose(0, 2, 1, 3).reshape(B, S, H * K)
    saved.update(q=q, k=k, v=v, p=p, a=a, scale=scale)
    return linear_forward(a, w, "out"), saved


def attention_backward(dy, saved, w, config, layer=0):
    (B, S, _), H, G, K = dy.shape, config.num_attention_heads, config.query_groups, config.head_dim
    q, k, v, p, scale = (saved[name] for name in ("q", "k", "v", "p", "scale"))
    da, gradients = linear_backward(dy, saved["a"], w, "out")
    da = da.reshape(B, S, H, K).transpose(0, 2, 1, 3)
    dv = (p * scale).swapaxes(-1, -2) @ da
    dp = (da @ v.swapaxes(-1, -2)) * scale
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    d = {"query": (ds @ k) * config.scale, "key": ds.swapaxes(-1, -2) @ (q * config.scale), "value": dv}
    dx = 0
    for name in ("query", "key", "value"):
        dz = d[name]
        if name != "query":                             # summed over the query heads that share the head
            dz = dz.reshape(B, G, H // G, S, K).sum(axis=2)
        if name != "value":
            if config.rotary_of(layer):
                cos, sin, partner = rotation(config.rotary_of(layer), K, S, dy.dtype)
                dz = dz * cos + (dz * sin)[..., partner]
            if config.qk_norm:
                norm = {"weight": w[f"{name}_norm.weight"]}
                dz, of_norm = norm_backward(dz, saved[f"{name}_norm"], norm, config)
                gradients[f"{name}_norm.weight"] = of_norm["weight"]
        dz = dz.transpose(0, 2, 1, 3).reshape(B, S, dz.shape[1] * K)
        dx_of, of_projection = linear_backward(dz, saved["x"], w, name)
        gradients.update(of_projection)
        dx = dx_of + dx
    return dx, gradients


# --- feed-forward ------------------------------------------------------------------------------------------------

def mlp_forward(x, w, config):
    """y = act(x U^T) V^T, or (act(x G^T) * x U^T) V^T."""
    up = linear_forward(x, w, "up")
    gate = linear_forward(x, w, "gate") if config.gated else up
    act, slope = activation(config.activation, gate)
    a = act * up if config.gated else act
    return linear_forward(a, w, "down"), (x, up, act, slope, a)


def mlp_backward(dy, saved, w, config):
    x, up, act, slope, a = saved
    da, gradients = linear_backward(dy, a, w, "down")
    dx, of_up = linear_backward(da * act if config.gated else da * slope, x, w, "up")
    gradients.update(of_up)
    if config.gated:
        dx_gate, of_gate = linear_backward(da * up * slope, x, w, "gate")
        gradients.update(of_gate)
        dx = dx + dx_gate
    return dx, gradients


# --- loss --------------------------------------------------------------------------------------------------------

def cross_entropy(logits, targets, label_smoothing=0.0, ignore_index=-100):
    """The mean over counted tokens of (1 - s) (lse - z_target) + s (lse - mean z), and its gradient."""
    V, counted = logits.shape[-1], targets != ignore_index
    count = max(1, int(counted.sum()))
    highest = value(logits).max(axis=-1, keepdims=True)
    e = np.exp(logits - highest)
    total = e.sum(axis=-1, keepdims=True)
    lse = (np.log(total) + highest)[..., 0]
    hot = one_hot(np.where(counted, targets, 0), V, logits.dtype)
    wanted = hot * (1 - label_smoothing) + np.asarray(label_smoothing / V, logits.dtype)
    loss = ((lse - (logits * wanted).sum(axis=-1)) * counted.astype(logits.dtype)).sum() / count
    return loss, (e / total - wanted) * (counted / count).astype(logits.dtype)[..., None]
