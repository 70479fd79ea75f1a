"""A small tensor-parallel implementation of its own, P ranks in one process; it records what it does and can be wrong.

It shares no code with the court: products, sums and layouts are written out here. A `bug` is a name that
some line asks for.
"""
import numpy as np

from mpitp.oracle.recorder import Recorder

try:
    import ml_dtypes
    BF16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:                     # tests with it are skipped
    BF16 = None


def cuts(size, ranks):
    """Uneven ranges: the first ones are larger."""
    base, more = divmod(size, ranks)
    stops = np.cumsum([base + (rank < more) for rank in range(ranks)])
    return [(int(stop - base - (rank < more)), int(stop)) for rank, stop in enumerate(stops)]


class Host:
    """P ranks, a dtype, and a bug.

    sequence_parallel : x and y, dx and dy are recorded as each rank's tokens
    """

    def __init__(self, folder, ranks, kind, config, *, dtype="float32", bug="", seed=0, options=None,
                 sequence_parallel=False, between=True):
        self.P, self.bug, self.dtype, self.between = ranks, bug, dtype, between
        self.sequence_parallel = sequence_parallel
        self.recorders = [Recorder(folder, rank, ranks, kind, config, options=options) for rank in range(ranks)]
        self.draw = np.random.default_rng(seed)
        self.store = BF16 if dtype == "bfloat16" else np.dtype(dtype)
        self.compute = np.float64 if dtype == "float64" else np.float32

    # --- numbers ---------------------------------------------------------------------------------------------------

    def random(self, *shape, scale=1.0):
        return self.stored(self.draw.standard_normal(shape) * scale)

    def stored(self, array):
        """The numbers as they come back out of the dtype, in what is computed with."""
        return np.asarray(array).astype(self.compute).astype(self.store).astype(self.compute)

    def total(self, summands, name=""):
        """All-reduce: a sum on every rank."""
        if self.bug == f"{name} missing":
            return [self.stored(s) for s in summands]
        total = summands[0]
        for summand in summands[1:]:
            total = total + summand
        times = self.P if self.bug == f"{name} twice" else 1 / self.P if self.bug == f"{name} mean" else 1
        return [self.stored(total * self.compute(times))] * self.P

    # --- records ---------------------------------------------------------------------------------------------------

    def reference(self, weights):
        for name, w in weights.items():
            self.recorders[0].reference(name, np.asarray(w).astype(self.store))

    def record(self, phase, name, local, axis=None, ranges=None, partial=False):
        for recorder, array in zip(self.recorders, local):
            array = np.asarray(array)
            recorder.record(phase, name, array if array.dtype.kind in "iu" else array.astype(self.store), axis, ranges,
                            partial)

    def tokens(self, phase, name, local):
        """x, y and their gradients: replicated, or each rank's tokens."""
        if not self.sequence_parallel:
            return self.record(phase, name, local)
        parts = cuts(local[0].shape[1], self.P)
        self.record(phase, name, [a[:, start:stop] for a, (start, stop) in zip(local, parts)], 1,
                    [list(part) for part in parts])

    def save(self):
        for recorder in self.recorders:
            recorder.save()

    # --- feed-forward ----------------------------------------------------------------------------------------------

    def mlp(self, D, F, tokens=(2, 7), gated=False, bias=True, activation="relu"):
        P, bug, st = self.P, self.bug, self.stored
        w = {"up.weight": self.random(F, D, scale=D ** -0.5), "down.weight": self.random(D, F, scale=F ** -0.5)}
        if gated:
            w["gate.weight"] = self.random(F, D, scale=D ** -0.5)
        if bias:
            w.update({"up.bias": self.random(F, scale=0.3), "down.bias": self.random(D, scale=0.3)})
            if gated:
                w["gate.bias"] = self.random(F, scale=0.3)
        self.reference(w)
        x, dy = self.random(*tokens, D), self.random(*tokens, D)
        parts = cuts(F, P)
        mine = [slice(*part) for part in parts]
        if bug == "shards swapped":
            mine = mine[::-1]
        if bug == "rank 0's shard":
            mine = [mine[0]] * P
        if bug == "shard offset by one":
            mine = [slice(max(0, m.start - (r > 0)), m.stop - (r > 0)) for r, m in enumerate(mine)]
        zero = np.zeros(F, self.compute)
        own = [{name: (a if name == "down.bias" else a[:, m] if name == "down.weight" else a[m])
                for name, a in w.items()} for m in mine]
        if bug == "gate and up swapped":
            own = [{**o, "gate.weight": o["up.weight"], "up.weight": o["gate.weight"]} for o in own]
        ys, saved = [], []
        for o in own:
            n = len(o["up.weight"])
            up = st(x @ o["up.weight"].T + o.get("up.bias", zero[:n]))
            gate = st(x @ o["gate.weight"].T + o.get("gate.bias", zero[:n])) if gated else up
            if activation == "relu":
                act, slope = np.maximum(gate, 0), (gate > 0).astype(self.compute)
            else:
                s = 1 / (1 + np.exp(-gate))
                act, slope = gate * s, s + gate * s * (1 - s)
            hidden = st(act * up if gated else act)
            ys.append(hidden @ o["down.weight"].T)
            saved.append((up, gate, act, slope, hidden))
        y = self.total(ys, "g")
        if bias:
            times = {"bias P times": P, "bias over P": 1 / P, "bias missing": 0}.get(bug, 1)
            y = [st(a + self.compute(times) * w["down.bias"]) for a in y]
        dxs, grads = [], {name: [] for name in w}
        dy_used = dy * self.compute(P if bug == "dy summed" else 1)
        for o, (up, _, act, slope, hidden) in zip(own, saved):
            d = st(dy_used @ o["down.weight"])
            flat = lambda a: a.reshape(a.shape[0] * a.shape[1], a.shape[2])         # noqa: E731
            grads["down.weight"].append(flat(dy_used).T @ flat(hidden))
            d_up, d_gate = (st(d * act), st(d * up * slope)) if gated else (st(d * slope), None)
            dx = d_up @ o["up.weight"]
            grads["up.weight"].append(flat(d_up).T @ flat(x))
            if gated:
                dx = dx + d_gate @ o["gate.weight"]
                grads["gate.weight"].append(flat(d_gate).T @ flat(x))
            if bias:
                grads["up.bias"].append(flat(d_up).sum(0))
                if gated:
                    grads["gate.bias"].append(flat(d_gate).sum(0))
                grads["down.bias"].append(flat(dy_used).sum(0) / (P if bug == "bias over P" else 1))
            dxs.append(dx)
        if bias and self.sequence_parallel:
            pieces = [dy_used[:, a:b] for a, b in cuts(tokens[1], P)]
            grads["down.bias"] = self.total([a.reshape(-1, D).sum(0) for a in pieces], "bias gradient")
        dx = self.total(dxs, "f")
        self.tokens("forward", "x", [x] * P)
        if self.between:
            self.record("forward", "hidden", [s[4] for s in saved], -1, [list(p) for p in parts])
        self.tokens("forward", "y", y)
        self.tokens("backward", "y", [dy] * P)
        self.tokens("backward", "x", dx)
        for name, local in grads.items():
            if name == "down.bias":
                self.record("backward", name, local)
            else:
                self.record("backward", name, local, 1 if name == "down.weight" else 0, [list(p) for p in parts])
        self.save()

    # --- attention -------------------------------------------------------------------------------------------------

    def attention(self, D, H, G, K, B=2, S=6, bias=True, rotary=True, base=10000.0):
        P, bug, st = self.P, self.bug, self.stored
        std = D ** -0.5
        w = {"query.weight": self.random(H * K, D, scale=std), "key.weight": self.random(G * K, D, scale=std),
             "value.weight": self.random(G * K, D, scale=std), "out.weight": self.random(D, H * K, scale=std)}
        if bias:
            w.update({"query.bias": self.random(H * K, scale=0.3), "key.bias": self.random(G * K, scale=0.3),
                      "value.bias": self.random(G * K, scale=0.3), "out.bias": self.random(D, scale=0.3)})
        self.reference(w)
        x, dy = self.random(B, S, D), self.random(B, S, D)
        parts, share = cuts(H, P), H // G
        cos, sin = self.turns(S, K, base)
        ys, saved = [], []
        for a, b in parts:
            heads = np.arange(a, b)
            kv = sorted(set(heads // share))
            rows = (heads[:, None] * K + np.arange(K)).ravel()
            kv_rows = (np.array(kv, int)[:, None] * K + np.arange(K)).ravel()
            z = {}
            for name, own in (("query", rows), ("key", kv_rows), ("value", kv_rows)):
                z[name] = x @ w[f"{name}.weight"][own].T
                if bias:
                    z[name] = z[name] + w[f"{name}.bias"][own]
                z[name] = st(z[name]).reshape(B, S, len(own) // K, K).transpose(0, 2, 1, 3)
            if rotary:
                for name in ("query", "key"):
                    z[name] = st(self.turn(z[name], cos, sin))
                    if bug == "rotary twice":
                        z[name] = st(self.turn(z[name], cos, sin))
            group = np.array([kv.index(h // share) for h in heads], int)
            wrong = {"scale of hidden": D ** -0.5, "scale of local heads": (D / max(1, b - a)) ** -0.5}
            scale = wrong.get(bug, K ** -0.5)
            q, k, v = z["query"] * self.compute(scale), z["key"][:, group], z["value"][:, group]
            s = q @ k.swapaxes(-1, -2)
            s = np.where(np.tril(np.ones((S, S), bool)), s, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            p = p / p.sum(-1, keepdims=True)
            context = st((p @ v).transpose(0, 2, 1, 3).reshape(B, S, len(heads) * K))
            ys.append(context @ w["out.weight"][:, rows].T)
            saved.append((rows, kv_rows, kv, group, q, k, v, p, context, scale))
        y = self.total(ys, "g")
        if bias:
            y = [st(a + (P if bug == "bias P times" else 1) * w["out.bias"]) for a in y]
        dxs, grads = [], {name: [] for name in w}
        flat = lambda a: a.reshape(a.shape[0] * a.shape[1], a.shape[2])             # noqa: E731
        for rows, kv_rows, kv, group, q, k, v, p, context, scale in saved:
            grads["out.weight"].append(flat(dy).T @ flat(context))
            da = st(dy @ w["out.weight"][:, rows]).reshape(B, S, len(rows) // K, K).transpose(0, 2, 1, 3)
            dv = p.swapaxes(-1, -2) @ da
            dp = da @ v.swapaxes(-1, -2)
            ds = p * (dp - (p * dp).sum(-1, keepdims=True))
            dq, dk = ds @ k * self.compute(scale), ds.swapaxes(-1, -2) @ q
            d = {"query": dq, **{name: np.zeros((B, len(kv), S, K), self.compute) for name in ("key", "value")}}
            for i, g in enumerate(group):
                d["key"][:, g] += dk[:, i]
                d["value"][:, g] += dv[:, i]
            if rotary:
                for name in ("query", "key"):
                    d[name] = self.turn(d[name], cos, -sin)
                    if bug == "rotary twice":
                        d[name] = self.turn(d[name], cos, -sin)
            dx = 0
            for name, own in (("query", rows), ("key", kv_rows), ("value", kv_rows)):
                g = st(d[name].transpose(0, 2, 1, 3).reshape(B, S, len(own)))
                dx = dx + g @ w[f"{name}.weight"][own]
                dw, db = flat(g).T @ flat(x), flat(g).sum(0)
                if name == "query":
                    grads["query.weight"].append(dw)
                    if bias:
                        grads["query.bias"].append(db)
                else:
                    whole = np.zeros((G * K, D), self.compute)
                    whole[own] = dw
                    grads[f"{name}.weight"].append(whole)
                    if bias:
                        whole = np.zeros(G * K, self.compute)
                        whole[own] = db
                        grads[f"{name}.bias"].append(whole)
            if bias:
                grads["out.bias"].append(flat(dy).sum(0))
            dxs.append(dx)
        for name in ("key.weight", "value.weight", "key.bias", "value.bias"):
            if name in grads:
                grads[name] = self.total(grads[name], "kv")
        dx = self.total(dxs, "f")
        if bias and self.sequence_parallel:
            pieces = [dy[:, a:b] for a, b in cuts(S, P)]
            grads["out.bias"] = self.total([a.reshape(-1, D).sum(0) for a in pieces], "bias gradient")
        self.tokens("forward", "x", [x] * P)
        self.tokens("forward", "y", y)
        self.tokens("backward", "y", [dy] * P)
        self.tokens("backward", "x", dx)
        ranges = [[a * K, b * K] for a, b in parts]
        for name, local in grads.items():
            if name in ("query.weight", "query.bias"):
                self.record("backward", name, local, 0, ranges)
            elif name == "out.weight":
                self.record("backward", name, local, 1, ranges)
            elif name == "out.bias":
                self.record("backward", name, local)
            else:
                held = [[[int(g) * K, int(g + 1) * K] for g in s[2]] for s in saved]
                self.record("backward", name, [a[s[1]] for a, s in zip(local, saved)], 0, held)
        self.save()

    def turns(self, S, K, base):
        angle = np.arange(S)[:, None] * base ** (-2 * np.arange(K // 2) / K)
        return np.cos(angle).astype(self.compute), np.sin(angle).astype(self.compute)

    def turn(self, z, cos, sin):
        one, two = np.split(z, 2, axis=-1)
        if self.bug == "rotary interleaved":
            one, two = z[..., 0::2], z[..., 1::2]
            return np.stack([one * cos - two * sin, two * cos + one * sin], -1).reshape(z.shape)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    # --- norm, linear, embedding, loss -----------------------------------------------------------------------------

    def norm(self, D, S=7, B=2, rms=False, epsilon=1e-5):
        """Each rank's tokens."""
        P, bug, st = self.P, self.bug, self.stored
        w = {"weight": self.random(D) + 1}
        if not rms:
            w["bias"] = self.random(D)
        w = {name: st(a) for name, a in w.items()}
        self.reference(w)
        x, dy = self.random(B, S, D, scale=0.1), self.random(B, S, D)
        epsilon = {"epsilon": 1e-3}.get(bug, epsilon)
        c = x if rms else x - x.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + self.compute(epsilon))
        xhat = c * rstd
        y = xhat * w["weight"] + (0 if rms else w["bias"])
        g = dy * w["weight"]
        dx = g - xhat * (g * xhat).mean(-1, keepdims=True)
        if not rms:
            dx = dx - g.mean(-1, keepdims=True)
        parts = cuts(S, P)
        ranges = [list(p) for p in parts]
        for phase, name, whole in (("forward", "x", x), ("forward", "y", y), ("backward", "y", dy),
                                   ("backward", "x", dx * rstd)):
            self.record(phase, name, [whole[:, a:b] for a, b in parts], 1, ranges)
        for name, d in (("weight", dy * xhat), ("bias", dy)):
            if name in w:
                self.record("backward", name, self.total([d[:, a:b].reshape(-1, D).sum(0) for a, b in parts], "norm"))
        self.save()

    def column_linear(self, inside, out, N=5):
        """Each rank's rows of the weight."""
        w = {"weight": self.random(out, inside, scale=inside ** -0.5), "bias": self.random(out)}
        self.reference(w)
        x, dy = self.random(N, inside), self.random(N, out)
        parts = cuts(out, self.P)
        ranges = [list(p) for p in parts]
        self.record("forward", "x", [x] * self.P)
        self.record("forward", "y", [x @ w["weight"][a:b].T + w["bias"][a:b] for a, b in parts], 1, ranges)
        self.record("backward", "y", [dy[:, a:b] for a, b in parts], 1, ranges)
        self.record("backward", "x", self.total([dy[:, a:b] @ w["weight"][a:b] for a, b in parts], "f"))
        self.record("backward", "weight", [dy[:, a:b].T @ x for a, b in parts], 0, ranges)
        self.record("backward", "bias", [dy[:, a:b].sum(0) for a, b in parts], 0, ranges)
        self.save()

    def embedding(self, V, D, shape=(2, 7)):
        """Each rank's rows; ids of other ranks give 0."""
        w = self.random(V, D)
        self.reference({"weight": w})
        ids, dy = self.draw.integers(0, V, shape), self.random(*shape, D)
        parts = cuts(V, self.P)
        ids.reshape(-1)[:2 * self.P] = [i for a, b in parts for i in (a, b - 1)]
        ys, grads = [], []
        for a, b in parts:
            last = b - 1 if self.bug == "last id masked" else b
            inside = (ids >= a) & (ids < last)
            ys.append(np.where(inside[..., None], w[np.where(inside, ids, 0)], 0))
            g = np.zeros((b - a, D), self.compute)
            np.add.at(g, ids[inside] - a, dy[inside])
            grads.append(g)
        self.record("forward", "ids", [ids] * self.P)
        self.record("forward", "y", self.total(ys, "g"))
        self.record("backward", "y", [dy] * self.P)
        self.record("backward", "weight", grads, 0, [list(p) for p in parts])
        self.save()

    def loss(self, V, shape=(2, 7), smoothing=0.1):
        """Cross entropy, each rank's part of the vocabulary, as Megatron's where bug is "smoothing local"."""
        z = self.random(*shape, V)
        targets = self.draw.integers(0, V, shape)
        targets[0, 3] = -100
        counted, parts = targets != -100, cuts(V, self.P)
        targets[1, :self.P] = [b - 1 for _, b in parts]
        highest = z.max(-1, keepdims=True)
        total = np.exp(z - highest).sum(-1)
        if self.bug == "log P":
            total = total * self.P
        lse = np.log(total) + highest[..., 0]
        at = sum(np.where((targets >= a) & (targets < (b - 1 if self.bug == "last id masked" else b)),
                          np.take_along_axis(z, np.clip(targets, a, b - 1)[..., None], -1)[..., 0] - highest[..., 0], 0)
                 for a, b in parts) + highest[..., 0]
        losses, grads = [], []
        for a, b in parts:
            s, n, mean = smoothing, V, z.mean(-1)
            if self.bug == "smoothing local":
                n = b - a
                s, mean = smoothing * n / (n - 1), z[..., a:b].mean(-1)
            of_token = (1 - s) * (lse - at) + s * (lse - mean)
            losses.append((of_token * counted).sum() / counted.sum())
            p = np.exp(z[..., a:b] - highest) / total[..., None]
            hot = (targets[..., None] == np.arange(a, b)).astype(self.compute)
            grads.append((p - (1 - s) * hot - s / n) * (counted / counted.sum())[..., None])
        ranges = [list(p) for p in parts]
        self.record("forward", "logits", [z[..., a:b] for a, b in parts], -1, ranges)
        self.record("forward", "targets", [targets] * self.P)
        self.record("forward", "loss", [np.asarray(one, self.compute) for one in losses])
        self.record("backward", "logits", grads, -1, ranges)
        self.save()


__all__ = ["BF16", "Host", "cuts"]
