"""The decoder on one process, forward and backward: what the parallel one must equal.

As dense.py: shares no code with the layers or the ops, and says every formula in its plainest form. Runs in the dtype
of what it is given, and on Magnitude arrays. Weights are a flat dict by the names of Decoder's parameters.

Dimension key: B sequences, S positions, D hidden, F feed-forward, V vocabulary, H query heads, G key/value heads, K
features of a head, N tokens.
"""
import math

import numpy as np

from .magnitude import activation, value


def part(w, prefix):
    """The weights behind a prefix, without it."""
    return {name[len(prefix):]: w[name] for name in w if name.startswith(prefix)}


def named(prefix, gradients):
    return {prefix + name: g for name, g in gradients.items()}


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
