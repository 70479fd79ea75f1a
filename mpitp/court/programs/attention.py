"""Causal self-attention on ranks in lockstep: query heads dealt over the ranks, key/value heads where they are needed.

A key/value head is computed by every rank whose query heads use it; the gradients of its weights are partial on each
of them, and add up. Roles: "kv_grad", "qk_norm_grad", "dk" (the gradient of keys and values before the projection).

Dimension key: B sequences, S positions, D hidden, h query heads of a rank, g key/value heads that it uses, K features.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from ...arrays import Array
from ...config import DecoderConfig
from ...oracle import linear, norm
from ...oracle.attention import allowed_pairs, softmax_backward, softmax_forward
from ...oracle.magnitude import Magnitude
from ...oracle.positions import alibi, rotate_backward, rotate_forward
from ..case import Case, part_of
from ..ranks import Local, Place, Ranks
from .linear import column_dx, joined, keep_column, linear_backward, row_backward, row_forward, sub


def forward(ranks: Ranks, case: Case, prefix: str, x: Local, layer: int = 0) -> Any:
    """y = sum over the ranks of context_p W_o,p^T + b_o, context = softmax(q k^T * scale) v."""
    weights, part = part_of(case.weights, prefix), prefix.rsplit(".", 1)[-1]
    used = [np.unique(heads) for heads in case.kv_heads]
    places: dict[str, Place | None] = {"query": Place(2, case.heads), "key": Place(2, tuple(used)),
                                       "value": Place(2, tuple(used))}
    if ranks.count == 1:
        places = dict.fromkeys(places)
    projected: dict[str, Local] = {}
    saved: dict[str, Any] = {"used": used, "layer": layer, "x": x, "places": places}
    for name in ("query", "key", "value"):
        found = [project(x_r, w, name, config, None if name == "query" else of_kv)
                 for x_r, w, config, of_kv in zip(x, weights, case.configs, used)]
        saved[name] = [s for _, s in found]
        projected[name] = ranks.keep("forward", joined(prefix, name), [z for z, _ in found], places[name], name, part)
    for name in ("query", "key"):
        z, saved[f"{name} turn"] = turned(ranks, case, projected[name], name, weights, layer)
        if z is not projected[name]:
            z = ranks.keep("forward", joined(prefix, f"{name}_rotated"), z, places[name], f"{name}_rotated", part)
        projected[name] = z
    context, saved["scores"] = scored(ranks, case, prefix, projected, used, layer)
    K = case.config.head_dim
    inner = None if ranks.count == 1 else Place(2, tuple(features(heads, K) for heads in case.heads))
    context = ranks.keep("forward", joined(prefix, "context"), context, inner, "context", part)
    saved["inner"], saved["out place"] = inner, inner and Place(1, inner.parts)
    saved["out"] = row_forward(ranks, case, prefix, context, [sub(w, "out") for w in weights], saved["out place"])
    return saved


def features(heads: Array, K: int) -> Array:
    """Return the features of heads, in order."""
    return (heads[:, None] * K + np.arange(K)).reshape(-1)


def project(x: Any, w: Any, name: str, config: DecoderConfig, heads: Array | None) -> tuple[Any, Any]:
    """Return (B, S, heads, K) of query, key or value; of whole key and value weights only the rows of `heads`."""
    own, rows = sub(w, name), None
    if heads is not None:
        rows = features(heads, config.head_dim)
        own = {key: array[rows] for key, array in own.items()}
    z, saved = linear.forward(x, own)
    B, S, _ = x.shape
    return z.reshape(B, S, own["weight"].shape[0] // config.head_dim, config.head_dim), (saved, rows)


def turned(ranks: Ranks, case: Case, z: Local, name: str, weights: list, layer: int) -> tuple[Local, list]:
    """Return query or key heads after their norm and their rotary positions, where there are some."""
    out, saved = [], []
    for rank, (z_r, config, w) in enumerate(zip(z, case.configs, weights)):
        saved_norm = saved_rotary = None
        if config.qk_norm:
            z_r, saved_norm = norm.forward(z_r, sub(w, f"{name}_norm"), **norm.options(config))
        rotary = config.rotary_of(layer)
        if rotary is not None:
            at = ranks.changed([np.arange(z_r.shape[1])] * ranks.count, "positions")[rank]
            z_r, saved_rotary = rotate_at(z_r, rotary, at)
        out.append(z_r)
        saved.append((saved_norm, saved_rotary))
    return (out if saved[0] != (None, None) else z), saved


def rotate_at(z: Any, rotary: Any, at: Array) -> tuple[Any, Any]:
    """Turn (B, S, heads, K) by the positions `at` (S)."""
    longest = int(at.max(initial=0)) + 1
    shape = longest, z.shape[-1]
    _, (cos, sin, partner) = rotate_forward(np.zeros(shape, z.dtype), rotary)
    cos, sin = cos[at][:, None], sin[at][:, None]
    return z * cos + z[..., partner] * sin, (cos, sin, partner)


def scored(ranks: Ranks, case: Case, prefix: str, z: dict[str, Local], used: list, layer: int) -> tuple[Local, list]:
    """Return the context (B, S, h K) of each rank's heads."""
    contexts, saved = [], []
    drop = case.inputs.get(joined(prefix, "weights.dropout"))
    for rank, config in enumerate(case.configs):
        heads, group = case.heads[rank], np.searchsorted(used[rank], case.kv_heads[rank])
        q = z["query"][rank].transpose(0, 2, 1, 3) * config.scale
        k, v = (z[name][rank].transpose(0, 2, 1, 3)[:, group] for name in ("key", "value"))
        B, h, S, K = q.shape
        scores = q @ k.swapaxes(-1, -2)
        if config.position_embedding == "alibi":
            own = ranks.changed(list(case.heads), "alibi_heads")[rank]
            of_heads = ranks.changed([config.num_attention_heads] * ranks.count, "alibi_count")[rank]
            scores = scores + alibi(of_heads, S, scores.dtype)[own]
        allowed = allowed_pairs(B, S, config.window(layer), mask_of(case, "mask"))
        p = softmax_forward(scores, ranks.changed([allowed] * ranks.count, "allowed")[rank])
        kept = 1.0 if drop is None else drop[:, heads]
        a = (p * kept) @ v if drop is not None else p @ v
        contexts.append(a.transpose(0, 2, 1, 3).reshape(B, S, h * K))
        saved.append((q, k, v, p, kept, group))
    return contexts, saved


def mask_of(case: Case, name: str) -> Array | None:
    """Return the mask of keys as booleans, None where there is none."""
    mask = case.inputs.get(name)
    return None if mask is None else mask.astype(bool)


def backward(ranks: Ranks, case: Case, prefix: str, dy: Local, saved: Any, x_name: str) -> Local:
    """Compute the gradient of x, under the name of x, and of every weight."""
    part, places = prefix.rsplit(".", 1)[-1], saved["places"]
    dy = ranks.keep("backward", joined(prefix, "y"), dy, None, "dy", part)
    da = row_backward(ranks, case, prefix, dy, saved["out"], saved["out place"], "out")
    da = ranks.keep("backward", joined(prefix, "context"), da, saved["inner"], "d_context", part)
    d: dict[str, Local] = {"query": [], "key": [], "value": []}
    for rank, config in enumerate(case.configs):
        for name, array in heads_backward(da[rank], saved["scores"][rank], config, len(saved["used"][rank])).items():
            d[name].append(array)
    weights = part_of(case.weights, prefix)
    norms: dict[str, list] = {}
    for name in ("query", "key"):
        turns = ranks.changed(saved[f"{name} turn"], "turns_back", part)
        if turns[0] != (None, None):
            d[name] = ranks.keep("backward", joined(prefix, f"{name}_rotated"), d[name], places[name], part=part)
        d[name] = [turn_back(d_r, turn, norms, name) for d_r, turn in zip(d[name], turns)]
    for name, summands in norms.items():
        full = joined(prefix, f"{name}_norm.weight")
        ranks.keep("backward", full, ranks.total("backward", full, summands, "qk_norm_grad", part))
    return projections_backward(ranks, case, prefix, d, saved, weights, x_name)


def heads_backward(da: Any, saved: Any, config: DecoderConfig, g: int) -> dict[str, Any]:
    """Return the gradients (B, S, heads, K) of one rank's queries, keys and values, each kv head's added up."""
    q, k, v, p, kept, group = saved
    B, h, S, K = q.shape
    da = da.reshape(B, S, h, K).transpose(0, 2, 1, 3)
    dv = (p * kept).swapaxes(-1, -2) @ da
    scores = softmax_backward((da @ v.swapaxes(-1, -2)) * kept, p)
    dq, dk = (scores @ k) * config.scale, scores.swapaxes(-1, -2) @ q
    return {"query": dq.transpose(0, 2, 1, 3), "key": by_group(dk, group, g), "value": by_group(dv, group, g)}


def by_group(d: Any, group: Array, g: int) -> Any:
    """Add up the gradients (B, h, S, K) of query heads that share a key/value head: (B, S, g, K)."""
    B, h, S, K = d.shape
    if h == g and (group == np.arange(g)).all():
        return d.transpose(0, 2, 1, 3)
    share = h // g if g else 0
    if g and h == g * share and (group == np.arange(h) // share).all():
        return d.reshape(B, g, share, S, K).sum(axis=2).transpose(0, 2, 1, 3)
    chosen = (np.arange(g)[:, None] == group).astype(d.dtype)       # (g, h)
    moved = d.transpose(0, 2, 3, 1) @ chosen.T                      # (B, S, K, g)
    return moved.transpose(0, 1, 3, 2)


def turn_back(d: Any, saved: tuple[Any, Any], norms: dict[str, list], name: str) -> Any:
    """Go back through rotary positions and norm; the norm's gradient is added to `norms`."""
    saved_norm, saved_rotary = saved
    if saved_rotary is not None:
        d = rotate_backward(d, saved_rotary)
    if saved_norm is not None:
        d, found = norm.backward(d, saved_norm)
        norms.setdefault(name, []).append(found["weight"])
    return d


def projections_backward(ranks: Ranks, case: Case, prefix: str, d: dict[str, Local], saved: Any, weights: list,
                         x_name: str) -> Local:
    """Go back through query, key and value."""
    part, dx = prefix.rsplit(".", 1)[-1], []                        # type: str, Local
    for name in ("query", "key", "value"):
        own = ranks.keep("backward", joined(prefix, name), d[name], saved["places"][name], f"d_{name}", part)
        if name != "query":
            own = ranks.changed(own, "dk", part)
        gradients, dx_own = [], []
        for rank, d_r in enumerate(own):
            B, S, heads, K = d_r.shape
            inner, rows = saved[name][rank]
            dx_r, found = linear_backward(d_r.reshape(B, S, heads * K), inner)
            gradients.append(found if rows is None else {key: scattered(array, rows, weights[rank][f"{name}.{key}"])
                                                         for key, array in found.items()})
            dx_own.append(dx_r)
        dx_own = ranks.changed(dx_own, f"dx_{name}", part)
        dx = [a + b for a, b in zip(dx, dx_own)] if dx else dx_own
        if name == "query":
            keep_column(ranks, case, prefix, name, gradients, part)
        else:
            keep_kv(ranks, prefix, name, gradients, part)
    return column_dx(ranks, x_name, dx, part, saved["inner"])


def keep_kv(ranks: Ranks, prefix: str, name: str, gradients: list, part: str) -> None:
    """Keep the gradients of a whole key or value weight: the sum over the ranks that use its heads."""
    for key in ("bias", "weight"):
        if key in gradients[0]:
            full, summands = joined(prefix, f"{name}.{key}"), [g[key] for g in gradients]
            total = summands if ranks.count == 1 else ranks.total("backward", full, summands, "kv_grad", part)
            ranks.keep("backward", full, total, None, "weight_grad", part)


def scattered(array: Any, rows: Array, whole: Any) -> Any:
    """Return an array as large as `whole` with `array` in these rows, 0 elsewhere."""
    if len(rows) == whole.shape[0] and (rows == np.arange(len(rows))).all():
        return array
    if isinstance(array, Magnitude):
        return Magnitude(scattered(array.value, rows, whole), scattered(array.size, rows, whole))
    out = np.zeros(whole.shape, array.dtype)
    out[rows] = array
    return out
