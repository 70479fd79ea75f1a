"""Tensor parallelism in plain NumPy: what somebody writes who has read the papers. Right; the cases of the zoo are not.

Every class is one layer on one rank: made of `comm` (ranks.py), a `Setting` and the whole weights, of which it takes
its part. `backward` keeps the weights' gradients in `self.gradients`; `write` tells a recorder what this rank holds.
The methods are small so that each can be got wrong by itself: see plain_cases.py.

Dimension key: N tokens, B sequences, S positions, D hidden, F feed-forward, H query heads, G key/value heads,
K features of a head, V vocabulary.
"""
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Weights = dict[str, Array]


@dataclass
class Setting:
    """What a run has besides weights and inputs: the layer's configuration, its dtype, how tokens are dealt."""
    config: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    dtype: str = "float64"
    sequence_parallel: bool = False

    @property
    def numbers(self) -> np.dtype:
        """What is computed in: 16-bit numbers are widened, multiplied and added up in float32."""
        return np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)

    def store(self, x: Array) -> Array:
        """Round to what is kept between operations."""
        return round_to_bfloat16(x) if self.dtype == "bfloat16" else np.asarray(x, self.numbers)

    def to_file(self, x: Array) -> Array:
        """Return x as it is written."""
        if self.dtype != "bfloat16" or x.dtype.kind != "f":
            return x
        import ml_dtypes
        return x.astype(ml_dtypes.bfloat16)


def round_to_bfloat16(x: Array) -> Array:
    """Round float32 to the nearest of 8 bits, ties to even; the result is float32 still."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def bounds(size: int, ranks: int) -> list[int]:
    """Return where each rank's part begins, and the end."""
    return [size * rank // ranks for rank in range(ranks + 1)]


class Layer:
    """What the layers share: this rank, its gradients, and f and g."""
    kind = ""

    def __init__(self, comm: Any, setting: Setting, weights: Weights):
        self.comm, self.setting, self.whole = comm, setting, weights
        self.gradients: dict[str, Array] = {}
        self.load(weights)

    def load(self, w: Weights) -> None:
        """Take this rank's part of the whole weights."""

    def mine(self, size: int) -> slice:
        """Return this rank's range."""
        cut = bounds(size, self.comm.size)
        return slice(cut[self.comm.rank], cut[self.comm.rank + 1])

    # f: x is used by every rank; under sequence parallelism it is gathered first

    def f_forward(self, x: Array) -> Array:
        if self.setting.sequence_parallel:
            return np.concatenate(self.comm.all_gather(x), axis=-2)
        return x

    def f_backward(self, dx: Array) -> Array:
        if self.setting.sequence_parallel:
            return self.setting.store(self.comm.reduce_scatter(dx, dx.ndim - 2, bounds(dx.shape[-2], self.comm.size)))
        return self.setting.store(self.comm.all_reduce(dx))

    # g: summands of y are added up; under sequence parallelism each rank keeps its tokens

    def g_forward(self, y: Array) -> Array:
        if self.setting.sequence_parallel:
            return self.setting.store(self.comm.reduce_scatter(y, y.ndim - 2, bounds(y.shape[-2], self.comm.size)))
        return self.setting.store(self.comm.all_reduce(y))

    def g_backward(self, dy: Array) -> Array:
        if self.setting.sequence_parallel:
            return np.concatenate(self.comm.all_gather(dy), axis=-2)
        return dy

    def keep(self, name: str, gradient: Array) -> None:
        """Keep the gradient of a weight, rounded."""
        self.gradients[name] = self.setting.store(gradient)

    def sum_of_tokens(self, gradient: Array) -> Array:
        """Finish the gradient of a weight that every rank has whole: a rank may have seen its own tokens alone."""
        return self.comm.all_reduce(gradient) if self.setting.sequence_parallel else gradient

    def split_of(self, name: str) -> tuple[int, Any] | None:
        """Return (axis, ranges) of a weight that is split, None for one that is not."""
        return None

    def write(self, recorder: Any) -> None:
        """Record weights, and their gradients."""
        for name, w in self.whole.items():
            recorder.reference(name, self.setting.to_file(w))
        for name, gradient in self.gradients.items():
            split = self.split_of(name)
            recorder.backward(name, self.setting.to_file(gradient), *(split or ()))


def rows(x: Array) -> Array:
    """Return x as (N, features)."""
    return x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


# --- linear layers -------------------------------------------------------------------------------------------------

class ColumnLinear(Layer):
    """y_p = x W_p^T + b_p: rows of W, entries of b."""
    kind = "column_linear"

    def load(self, w: Weights) -> None:
        self.w, self.b = w["weight"][self.mine(len(w["weight"]))], w["bias"][self.mine(len(w["bias"]))]

    def forward(self, x: Array) -> Array:
        self.x = self.f_forward(x)
        return self.setting.store(self.x @ self.w.T + self.b)

    def backward(self, dy: Array) -> Array:
        self.keep("bias", rows(dy).sum(0))
        self.keep("weight", rows(dy).T @ rows(self.x))
        return self.f_backward(dy @ self.w)

    def split_of(self, name: str) -> tuple[int, Any] | None:
        return 0, None


class RowLinear(Layer):
    """y = sum over p of x_p W_p^T + b: columns of W, all of b."""
    kind = "row_linear"

    def load(self, w: Weights) -> None:
        self.w, self.b = w["weight"][:, self.mine(w["weight"].shape[1])], w["bias"]

    def forward(self, x: Array) -> Array:
        self.x = x
        return self.setting.store(self.g_forward(x @ self.w.T) + self.b)

    def backward(self, dy: Array) -> Array:
        dy = self.g_backward(dy)
        self.keep("bias", rows(dy).sum(0))
        self.keep("weight", rows(dy).T @ rows(self.x))
        return self.setting.store(dy @ self.w)

    def split_of(self, name: str) -> tuple[int, Any] | None:
        return (1, None) if name == "weight" else None


# --- the feed-forward block ----------------------------------------------------------------------------------------

class MLP(Layer):
    """y = act(x U^T + b_u) V^T + b_v, or with a gate (silu(x G^T) * (x U^T)) V^T."""
    kind = "mlp"

    def load(self, w: Weights) -> None:
        part = self.mine(len(w["up.weight"]))
        self.up, self.down = w["up.weight"][part], w["down.weight"][:, part]
        self.gate = w["gate.weight"][part] if "gate.weight" in w else None
        self.up_bias = w["up.bias"][part] if "up.bias" in w else 0
        self.down_bias = w.get("down.bias")

    def act(self, h: Array) -> tuple[Array, Array]:
        """Return silu(h) with a gate, relu(h) without one; and the slope."""
        if self.gate is None:
            return np.maximum(h, 0), (h > 0).astype(h.dtype)
        s = 1 / (1 + np.exp(-h))
        return h * s, s * (1 + h * (1 - s))

    def forward(self, x: Array) -> Array:
        self.x = self.f_forward(x)
        self.h = self.setting.store(self.x @ self.up.T + self.up_bias)
        if self.gate is None:
            a, self.slope = self.act(self.h)
        else:
            self.act_of_gate, self.slope = self.act(self.setting.store(self.x @ self.gate.T))
            a = self.act_of_gate * self.h
        self.a = self.setting.store(a)
        return self.add_bias(self.g_forward(self.a @ self.down.T))

    def add_bias(self, y: Array) -> Array:
        return y if self.down_bias is None else self.setting.store(y + self.down_bias)

    def bias_gradient(self, dy_own: Array) -> Array:
        """Return the gradient of the row bias, of what this rank has of dy."""
        return self.sum_of_tokens(rows(dy_own).sum(0))

    def backward(self, dy: Array) -> Array:
        if self.down_bias is not None:
            self.keep("down.bias", self.bias_gradient(dy))
        dy = self.g_backward(dy)
        self.keep("down.weight", rows(dy).T @ rows(self.a))
        da = self.setting.store(dy @ self.down)
        if self.gate is None:
            dh = self.setting.store(da * self.slope)
            dx = 0
        else:
            dh = self.setting.store(da * self.act_of_gate)
            dgate = self.setting.store(da * self.h * self.slope)
            self.keep("gate.weight", rows(dgate).T @ rows(self.x))
            dx = dgate @ self.gate
        if "up.bias" in self.whole:
            self.keep("up.bias", rows(dh).sum(0))
        self.keep("up.weight", rows(dh).T @ rows(self.x))
        return self.f_backward(dx + dh @ self.up)

    def split_of(self, name: str) -> tuple[int, Any] | None:
        return None if name == "down.bias" else (1, None) if name == "down.weight" else (0, None)


# --- attention -----------------------------------------------------------------------------------------------------

class Attention(Layer):
    """Causal attention, grouped queries, rotary positions in halves or ALiBi. A rank has some query heads, and the
    key/value heads that they need; one that several ranks need is held by each of them."""
    kind = "attention"

    def load(self, w: Weights) -> None:
        c = self.setting.config
        self.H, self.D = c["num_attention_heads"], c["hidden_size"]
        self.G, self.K = c.get("num_query_groups") or self.H, c.get("kv_channels") or self.D // self.H
        self.heads = self.mine(self.H)
        self.group_of = np.arange(self.heads.start, self.heads.stop) // (self.H // self.G)      # of each of my heads
        first = self.group_of[0] if len(self.group_of) else 0
        self.groups = slice(first, self.group_of[-1] + 1 if len(self.group_of) else first)
        q, kv = self.features(self.heads), self.features(self.groups)
        self.wq, self.wk, self.wv = w["query.weight"][q], w["key.weight"][kv], w["value.weight"][kv]
        self.wo, self.bo = w["out.weight"][:, q], w.get("out.bias")

    def features(self, heads: slice) -> slice:
        return slice(heads.start * self.K, heads.stop * self.K)

    def by_head(self, z: Array) -> Array:
        """Return z (B, S, heads K) as (B, S, heads, K)."""
        return z.reshape(*z.shape[:2], z.shape[2] // self.K, self.K)

    def scale(self) -> float:
        return self.K ** -0.5

    def positions(self, S: int) -> Array:
        return np.arange(S)

    def turn(self, z: Array, back: bool = False) -> Array:
        """Turn (B, S, heads, K) by positions: feature i with i + K / 2."""
        if self.setting.config.get("position_embedding") != "rotary":
            return z
        half = self.K // 2
        angle = self.positions(z.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = (f(angle).astype(z.dtype)[:, None, :] for f in (np.cos, np.sin))
        sin = -sin if back else sin
        a, b = z[..., :half], z[..., half:]
        return self.setting.store(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))

    def slopes(self) -> Array:
        """Return ALiBi's slopes of my heads, for a power of two heads."""
        return 2.0 ** (-8.0 * np.arange(self.heads.start + 1, self.heads.stop + 1) / self.H)

    def allowed(self, S: int) -> Array:
        return np.tril(np.ones((S, S), bool))

    def dropout(self, shape: tuple) -> Array | float:
        """Return what my heads' attention weights (B, heads, S, S) are multiplied by."""
        mask = self.setting.options.get("mask")
        return 1.0 if mask is None else mask[:, self.heads]

    def forward(self, x: Array) -> Array:
        store, self.x = self.setting.store, self.f_forward(x)
        B, S, _ = self.x.shape
        q = self.turn(self.by_head(store(self.x @ self.wq.T)))
        k = self.turn(self.by_head(store(self.x @ self.wk.T)))
        self.v = self.by_head(store(self.x @ self.wv.T)).transpose(0, 2, 1, 3)
        self.q, self.k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
        used = self.group_of - self.groups.start
        z = self.q @ self.k[:, used].swapaxes(-1, -2) * self.setting.numbers.type(self.scale())
        if self.setting.config.get("position_embedding") == "alibi":
            distance = np.arange(S) - np.arange(S)[:, None]
            z = z + (self.slopes()[:, None, None] * distance).astype(z.dtype)
        z = np.where(self.allowed(S), z, -np.inf)
        e = np.exp(z - z.max(-1, keepdims=True))
        self.p = store(e / e.sum(-1, keepdims=True))
        self.drop = np.asarray(self.dropout(self.p.shape), z.dtype)
        context = store((self.p * self.drop) @ self.v[:, used]).transpose(0, 2, 1, 3)
        self.context = context.reshape(B, S, self.wo.shape[1])
        return self.add_bias(self.g_forward(self.context @ self.wo.T))

    def add_bias(self, y: Array) -> Array:
        return y if self.bo is None else self.setting.store(y + self.bo)

    def per_group(self, d: Array) -> Array:
        """Sum what my query heads say of their key/value heads; and over the ranks, where they share one."""
        B, _, S, K = d.shape
        total = np.zeros((B, self.G, S, K), d.dtype)
        for head, group in enumerate(self.group_of):
            total[:, group] += d[:, head]
        return self.share(total)[:, self.groups]

    def share(self, total: Array) -> Array:
        """Add up the gradients of all key/value heads over the ranks."""
        return self.comm.all_reduce(total)

    def owned(self) -> Array:
        """Return which of my key/value heads I own: those whose first query head is mine."""
        first = np.arange(self.groups.start, self.groups.stop) * (self.H // self.G)
        return first >= self.heads.start

    def carried(self, d: Array) -> Array:
        """Return the part of dk or dv (B, S, groups * K) that this rank carries on into dx."""
        return (self.by_head(d) * self.owned()[:, None]).reshape(d.shape)

    def backward(self, dy: Array) -> Array:
        store = self.setting.store
        if self.bo is not None:
            self.keep("out.bias", self.sum_of_tokens(rows(dy).sum(0)))
        dy = self.g_backward(dy)
        B, S, _ = dy.shape
        used = self.group_of - self.groups.start
        self.keep("out.weight", rows(dy).T @ rows(self.context))
        da = self.by_head(store(dy @ self.wo)).transpose(0, 2, 1, 3)
        dv = self.per_group((self.p * self.drop).swapaxes(-1, -2) @ da)
        dp = (da @ self.v[:, used].swapaxes(-1, -2)) * self.drop
        dz = self.p * (dp - (self.p * dp).sum(-1, keepdims=True)) * self.setting.numbers.type(self.scale())
        dk = self.per_group(dz.swapaxes(-1, -2) @ self.q)
        dq = dz @ self.k[:, used]
        dq, dk, dv = (store(d.transpose(0, 2, 1, 3)) for d in (dq, dk, dv))
        dq, dk = self.turn(dq, back=True), self.turn(dk, back=True)
        dq, dk, dv = (d.reshape(B, S, d.shape[2] * self.K) for d in (dq, dk, dv))
        for name, d in (("query.weight", dq), ("key.weight", dk), ("value.weight", dv)):
            self.keep(name, rows(d).T @ rows(self.x))
        return self.f_backward(dq @ self.wq + self.carried(dk) @ self.wk + self.carried(dv) @ self.wv)

    def split_of(self, name: str) -> tuple[int, Any] | None:
        if name == "out.bias":
            return None
        held = self.comm.all_gather((self.features(self.heads), self.features(self.groups)))
        if name in ("key.weight", "value.weight"):      # head by head, since ranks may share some of theirs
            return 0, [[[start, start + self.K] for start in range(part.start, part.stop, self.K)] for _, part in held]
        return (1 if name == "out.weight" else 0), [[part.start, part.stop] for part, _ in held]


# --- norms ---------------------------------------------------------------------------------------------------------

class Norm(Layer):
    """y = x / sqrt(mean of x^2 + e) * w, or with a bias (x - mean) / sqrt(variance + e) * w + b."""
    kind = "norm"
    epsilon = 1e-5

    def load(self, w: Weights) -> None:
        self.w, self.b = w["weight"], w.get("bias")

    def forward(self, x: Array) -> Array:
        centred = x if self.b is None else x - x.mean(-1, keepdims=True)
        self.r = 1 / np.sqrt((centred * centred).mean(-1, keepdims=True) + self.setting.numbers.type(self.epsilon))
        self.xhat = centred * self.r
        y = self.xhat * self.w
        return self.setting.store(y if self.b is None else y + self.b)

    def backward(self, dy: Array) -> Array:
        self.keep("weight", self.sum_of_tokens(rows(dy * self.xhat).sum(0)))
        d = dy * self.w
        if self.b is not None:
            self.keep("bias", self.sum_of_tokens(rows(dy).sum(0)))
            d = d - d.mean(-1, keepdims=True)
        return self.setting.store(self.r * (d - self.xhat * (d * self.xhat).mean(-1, keepdims=True)))


# --- vocabulary ----------------------------------------------------------------------------------------------------

class Embedding(Layer):
    """y = sum over p of W_p[ids], 0 for ids of other ranks."""
    kind = "embedding"

    def load(self, w: Weights) -> None:
        self.V = len(w["weight"])
        self.part = self.mine(self.V)
        self.w = w["weight"][self.part]

    def is_mine(self, ids: Array) -> Array:
        return (ids >= self.part.start) & (ids < self.part.stop)

    def forward(self, ids: Array) -> Array:
        self.ids, self.own = ids, self.is_mine(ids)
        local = np.where(self.own, ids - self.part.start, 0)
        found = self.w[local] if len(self.w) else np.zeros((*ids.shape, self.w.shape[1]), self.w.dtype)
        return self.g_forward(found * self.own[..., None])

    def backward(self, dy: Array) -> None:
        dy = self.g_backward(dy)
        gradient = np.zeros_like(self.w)
        np.add.at(gradient, self.ids[self.own] - self.part.start, dy[self.own])
        self.keep("weight", gradient)

    def split_of(self, name: str) -> tuple[int, Any] | None:
        return 0, None


class Loss(Layer):
    """The mean over counted tokens of (1 - s) (lse - z_t) + s (lse - mean of z), z split by vocabulary."""
    kind = "loss"

    def cut(self, z: Array) -> Array:
        """Return this rank's columns of whole logits."""
        self.V = z.shape[-1]
        self.part = self.mine(self.V)
        return z[..., self.part]

    def is_mine(self, t: Array) -> Array:
        return (t >= self.part.start) & (t < self.part.stop)

    def shift(self, z: Array) -> Array:
        """Return the maximum over all of the vocabulary."""
        own = z.max(-1, initial=-np.inf)
        return self.comm.all_reduce_max(own)

    def sum_exp(self, z: Array) -> Array:
        return self.comm.all_reduce(np.exp(z).sum(-1))

    def mean_logit(self, z: Array) -> Array:
        """Return the mean of z over the vocabulary."""
        return self.comm.all_reduce(z.sum(-1)) / self.V

    def smooth_label(self, s: float) -> float:
        """Return what label smoothing takes from the gradient of every logit."""
        return s / self.V

    def count(self, counted: Array) -> Array:
        return np.maximum(counted.sum(), 1)

    def forward(self, z: Array, targets: Array) -> Array:
        s = self.setting.options.get("label_smoothing", 0.0)
        z = z - self.shift(z)[..., None]
        counted = targets != -100
        own = self.is_mine(targets)
        picked = np.where(own, targets - self.part.start, 0)
        target = np.zeros(targets.shape, z.dtype)
        if z.shape[-1]:
            target = np.take_along_axis(z, picked[..., None], -1)[..., 0] * own
        z_t = self.comm.all_reduce(target)
        total = self.sum_exp(z)
        lse = np.log(total)
        loss = (1 - s) * (lse - z_t) + s * (lse - self.mean_logit(z)) if s else lse - z_t
        n = self.count(counted)
        self.kept = np.exp(z) / total[..., None], own, picked, counted, s, n
        return self.mean(np.where(counted, loss, 0), n)

    def mean(self, losses: Array, n: Array) -> Array:
        return np.asarray(losses.sum() / n, self.setting.numbers)

    def backward(self) -> Array:
        p, own, picked, counted, s, n = self.kept
        d = p - (self.smooth_label(s) if s else 0)
        token = np.nonzero(own)
        d[(*token, picked[token])] -= 1 - s
        return self.setting.store(d * (counted[..., None] / n))


class DataParallelLoss(Loss):
    """Each rank has some of the tokens, and all of the vocabulary; the mean is over the tokens of all ranks."""

    def cut(self, z: Array) -> Array:
        self.V, self.part = z.shape[-1], slice(0, z.shape[-1])
        return z

    def shift(self, z: Array) -> Array:
        return z.max(-1)

    def sum_exp(self, z: Array) -> Array:
        return np.exp(z).sum(-1)

    def mean_logit(self, z: Array) -> Array:
        return z.sum(-1) / self.V

    def forward(self, z: Array, targets: Array) -> Array:
        self.local_comm, self.comm = self.comm, Alone()
        try:
            return super().forward(z, targets)
        finally:
            self.comm = self.local_comm

    def count(self, counted: Array) -> Array:
        return np.maximum(self.local_comm.all_reduce(np.asarray(counted.sum(), float)), 1)

    def mean(self, losses: Array, n: Array) -> Array:
        return self.local_comm.all_reduce(np.asarray(losses.sum() / n, self.setting.numbers))


class Alone:
    """One rank."""
    rank, size = 0, 1

    def all_reduce(self, x: Array) -> Array:
        return x

    def all_gather(self, x: Any) -> list:
        return [x]


# --- data parallelism ----------------------------------------------------------------------------------------------

class DataParallelMLP(MLP):
    """Every rank has all weights and some of the tokens; gradients of weights are summed over the ranks."""

    def mine(self, size: int) -> slice:
        return slice(0, size)

    def f_forward(self, x: Array) -> Array:
        return x

    def f_backward(self, dx: Array) -> Array:
        return self.setting.store(dx)

    def g_forward(self, y: Array) -> Array:
        return self.setting.store(y)

    def g_backward(self, dy: Array) -> Array:
        return dy

    def sum_of_tokens(self, gradient: Array) -> Array:
        return gradient

    def backward(self, dy: Array) -> Array:
        dx = super().backward(dy)
        self.synchronise()
        return dx

    def synchronise(self) -> None:
        """Add up the gradients over the ranks."""
        for name in sorted(self.gradients):
            self.keep(name, self.comm.all_reduce(self.gradients[name]))

    def split_of(self, name: str) -> tuple[int, Any] | None:
        return None


# --- the block, and the decoder ------------------------------------------------------------------------------------

def below(weights: Weights, name: str) -> Weights:
    """Return the weights of one part."""
    return {key[len(name) + 1:]: w for key, w in weights.items() if key.startswith(f"{name}.")}


class Block(Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)). Under sequence parallelism x and the norms are split by tokens."""
    kind = "block"
    norm, attention, mlp = Norm, Attention, MLP

    def load(self, w: Weights) -> None:
        self.parts = {name: cls(self.comm, self.setting, below(w, name)) for name, cls in
                      (("attention_norm", self.norm), ("attention", self.attention), ("mlp_norm", self.norm),
                       ("mlp", self.mlp))}

    def dropped(self, name: str, y: Array) -> Array:
        """Return y times this rank's part of the mask of that name, if there is one."""
        mask = self.setting.options.get(name)
        return y if mask is None else self.setting.store(y * (mask[:, self.mine(mask.shape[1])]
                                                              if self.setting.sequence_parallel else mask))

    def forward(self, x: Array) -> Array:
        for branch in ("attention", "mlp"):
            y = self.parts[branch].forward(self.parts[f"{branch}_norm"].forward(x))
            x = self.setting.store(x + self.dropped(f"{branch}.dropout", y))
        return x

    def backward(self, dy: Array) -> Array:
        for branch in ("mlp", "attention"):
            d = self.parts[branch].backward(self.dropped(f"{branch}.dropout", dy))
            dy = self.setting.store(dy + self.parts[f"{branch}_norm"].backward(d))
        for name, part in self.parts.items():
            self.gradients.update({f"{name}.{key}": gradient for key, gradient in part.gradients.items()})
        return dy

    def split_of(self, name: str) -> tuple[int, Any] | None:
        part, _, key = name.partition(".")
        return self.parts[part].split_of(key)


class Decoder(Layer):
    """Embedding, blocks, norm, head and loss; the embedding and the head are split by vocabulary."""
    kind = "decoder"
    block, loss = Block, Loss

    def load(self, w: Weights) -> None:
        self.tied = "head.weight" not in w
        self.embedding = Embedding(self.comm, self.setting, below(w, "embedding"))
        self.blocks = [self.block(self.comm, self.setting, below(w, f"layers.{i}"))
                       for i in range(self.setting.config["num_layers"])]
        self.final_norm = Norm(self.comm, self.setting, below(w, "final_norm"))
        self.head = self.embedding.w if self.tied else w["head.weight"][self.mine(len(w["head.weight"]))]
        self.criterion = self.loss(self.comm, self.setting, {})

    def forward(self, ids: Array, targets: Array) -> Array:
        x = self.embedding.forward(ids)
        for block in self.blocks:
            x = block.forward(x)
        self.x = self.f_forward(self.final_norm.forward(x))
        self.logits = self.setting.store(self.x @ self.head.T)
        self.criterion.V = self.setting.config["vocab_size"]
        self.criterion.part = self.mine(self.criterion.V)
        return self.criterion.forward(self.logits, targets)

    def backward(self) -> None:
        dz = self.criterion.backward()
        d_head = rows(dz).T @ rows(self.x)
        d = self.final_norm.backward(self.head_backward(dz))
        for block in reversed(self.blocks):
            d = block.backward(d)
        self.embedding.backward(d)
        d_embedding = self.embedding.gradients["weight"]
        if self.tied:
            self.keep("embedding.weight", self.tie(d_embedding, d_head))
        else:
            self.keep("embedding.weight", d_embedding)
            self.keep("head.weight", d_head)
        for i, block in enumerate(self.blocks):
            self.gradients.update({f"layers.{i}.{name}": g for name, g in block.gradients.items()})
        self.gradients.update({f"final_norm.{name}": g for name, g in self.final_norm.gradients.items()})

    def head_backward(self, dz: Array) -> Array:
        return self.f_backward(dz @ self.head)

    def tie(self, d_embedding: Array, d_head: Array) -> Array:
        """Return the gradient of a weight that is both."""
        return d_embedding + d_head

    def split_of(self, name: str) -> tuple[int, Any] | None:
        if name.startswith("layers."):
            _, i, key = name.split(".", 2)
            return self.blocks[int(i)].split_of(key)
        return None if name.startswith("final_norm") else (0, None)


class GradientNorm(Layer):
    """The norm of all gradients: what is split is summed over the ranks, what every rank has is counted once."""
    kind = "gradient_norm"

    def forward(self, gradients: dict[str, tuple[Array, bool]]) -> Array:
        split = sum(self.squares(g) for g, is_split in gradients.values() if is_split)
        whole = sum(self.squares(g) for g, is_split in gradients.values() if not is_split)
        return np.sqrt(self.comm.all_reduce(np.asarray(split, self.setting.numbers)) + whole)

    def squares(self, g: Array) -> Any:
        return (g * g).sum()
