"""What the layers of the zoo are given, drawn from one seed; and a run of a layer on one rank, with its dump."""
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from plain import Array, Decoder, GradientNorm, Layer, Loss, Setting, bounds
from mpitp.oracle.recorder import Recorder

KINDS = ("column_linear", "row_linear", "mlp", "attention", "norm", "embedding", "loss", "block", "decoder",
         "gradient_norm")


@dataclass
class Problem:
    """One computation: the kind of layer and its configuration, whole weights, whole inputs."""
    kind: str
    config: dict
    weights: dict[str, Array]
    inputs: dict[str, Any]
    options: dict = field(default_factory=dict)


def make(kind: str, seed: int = 0, setting: Setting | None = None, **sizes: Any) -> Problem:
    """Draw a problem of a kind.

    Parameters
    ----------
    kind : str
        One of KINDS.
    seed : int
    setting : Setting, optional
        Its dtype is that of all numbers.
    sizes
        B, S, D, F, H, G, K, V, layers, and what else the configuration has.

    Returns
    -------
    Problem
    """
    setting = setting or Setting()
    draw = Draw(np.random.default_rng(seed), setting)
    size = {"B": 2, "S": 6, "D": 12, "F": 18, "H": 4, "G": 4, "K": 4, "V": 23, "layers": 1, "gated": False,
            "bias": True, "position_embedding": "rotary", "rms": False, "tied": False, "smoothing": 0.0, **sizes}
    return globals()[f"make_{kind}"](draw, size)


class Draw:
    """Random numbers that the dtype holds exactly."""

    def __init__(self, generator: np.random.Generator, setting: Setting):
        self.generator, self.setting = generator, setting

    def __call__(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Array:
        drawn = self.generator.standard_normal(shape) * scale + offset
        return self.setting.store(drawn.astype(self.setting.numbers))

    def weight(self, out: int, into: int) -> Array:
        """Return a weight that keeps the size of what it multiplies."""
        return self(out, into, scale=into ** -0.5)


def make_column_linear(draw: Draw, n: dict) -> Problem:
    weights = {"weight": draw.weight(n["F"], n["D"]), "bias": draw(n["F"])}
    inputs = {"x": draw(n["B"], n["S"], n["D"]), "dy": draw(n["B"], n["S"], n["F"])}
    return Problem("column_linear", {}, weights, inputs)


def make_row_linear(draw: Draw, n: dict) -> Problem:
    weights = {"weight": draw.weight(n["D"], n["F"]), "bias": draw(n["D"])}
    inputs = {"x": draw(n["B"], n["S"], n["F"]), "dy": draw(n["B"], n["S"], n["D"])}
    return Problem("row_linear", {}, weights, inputs)


def mlp_weights(draw: Draw, n: dict) -> dict[str, Array]:
    D, F = n["D"], n["F"]
    weights = {"up.weight": draw.weight(F, D)}
    if n["gated"]:
        weights["gate.weight"] = draw.weight(F, D)
    elif n["bias"]:
        weights["up.bias"] = draw(F)
    weights["down.weight"] = draw.weight(D, F)
    if n["bias"]:
        weights["down.bias"] = draw(D)
    return weights


def mlp_config(n: dict) -> dict:
    return {"ffn_hidden_size": n["F"], "activation": "silu" if n["gated"] else "relu", "gated": n["gated"],
            "mlp_bias": n["bias"]}


def make_mlp(draw: Draw, n: dict) -> Problem:
    shape = n["B"], n["S"], n["D"]
    return Problem("mlp", {"hidden_size": n["D"], **mlp_config(n)}, mlp_weights(draw, n),
                   {"x": draw(*shape), "dy": draw(*shape)})


def attention_weights(draw: Draw, n: dict) -> dict[str, Array]:
    D, q, kv = n["D"], n["H"] * n["K"], n["G"] * n["K"]
    weights = {"query.weight": draw.weight(q, D), "key.weight": draw.weight(kv, D), "value.weight": draw.weight(kv, D),
               "out.weight": draw.weight(D, q)}
    if n["bias"]:
        weights["out.bias"] = draw(D)
    return weights


def attention_config(n: dict) -> dict:
    return {"hidden_size": n["D"], "num_attention_heads": n["H"], "num_query_groups": n["G"], "kv_channels": n["K"],
            "position_embedding": n["position_embedding"], "qkv_bias": False, "attention_bias": n["bias"]}


def make_attention(draw: Draw, n: dict) -> Problem:
    shape = n["B"], n["S"], n["D"]
    inputs = {"x": draw(*shape), "dy": draw(*shape)}
    problem = Problem("attention", attention_config(n), attention_weights(draw, n), inputs)
    if n.get("dropout"):
        problem.options["mask"] = dropout_mask(draw, (n["B"], n["H"], n["S"], n["S"]), n["dropout"])
    return problem


def dropout_mask(draw: Draw, shape: tuple[int, ...], probability: float) -> Array:
    """Return 0 or 1 / (1 - p)."""
    keep = draw.generator.random(shape) >= probability
    return draw.setting.store((keep / (1 - probability)).astype(draw.setting.numbers))


def norm_weights(draw: Draw, n: dict) -> dict[str, Array]:
    weights = {"weight": draw(n["D"], scale=0.2, offset=1)}
    return weights if n["rms"] else {**weights, "bias": draw(n["D"])}


def norm_config(n: dict) -> dict:
    return {"normalization": "rmsnorm" if n["rms"] else "layernorm", "norm_epsilon": 1e-5}


def make_norm(draw: Draw, n: dict) -> Problem:
    shape = n["B"], n["S"], n["D"]
    return Problem("norm", norm_config(n), norm_weights(draw, n), {"x": draw(*shape), "dy": draw(*shape)})


def make_embedding(draw: Draw, n: dict) -> Problem:
    ids = np.arange(n["B"] * n["S"]) * 7 % n["V"]
    ids[:1], ids[-1:] = n["V"] - 1, 0
    return Problem("embedding", {}, {"weight": draw(n["V"], n["D"])},
                   {"ids": ids.reshape(n["B"], n["S"]), "dy": draw(n["B"], n["S"], n["D"])})


def targets_of(draw: Draw, n: dict) -> Array:
    """Return targets, the first and last of the vocabulary and of every rank's part among them; some do not count."""
    targets = draw.generator.integers(0, n["V"], n["B"] * n["S"])
    edges = [edge for ranks in (2, 3) for cut in bounds(n["V"], ranks)[1:] for edge in (cut - 1, cut % n["V"])]
    targets[:len(edges)] = edges[:len(targets)]
    targets[-1] = -100
    return targets.reshape(n["B"], n["S"])


def make_loss(draw: Draw, n: dict) -> Problem:
    targets = targets_of(draw, n)
    if n.get("few_in_the_first"):
        targets[0, 1:] = -100
    return Problem("loss", {}, {}, {"logits": draw(n["B"], n["S"], n["V"], scale=2), "targets": targets},
                   {"label_smoothing": n["smoothing"]} if n["smoothing"] else {})


def block_weights(draw: Draw, n: dict) -> dict[str, Array]:
    parts = {"attention_norm": norm_weights(draw, n), "attention": attention_weights(draw, n),
             "mlp_norm": norm_weights(draw, n), "mlp": mlp_weights(draw, n)}
    return {f"{part}.{name}": w for part, weights in parts.items() for name, w in weights.items()}


def make_block(draw: Draw, n: dict) -> Problem:
    shape = n["B"], n["S"], n["D"]
    config = {**attention_config(n), **mlp_config(n), **norm_config(n)}
    problem = Problem("block", config, block_weights(draw, n), {"x": draw(*shape), "dy": draw(*shape)})
    if n.get("dropout"):
        problem.options.update({f"{branch}.dropout": dropout_mask(draw, shape, n["dropout"])
                                for branch in ("attention", "mlp")})
    return problem


def make_decoder(draw: Draw, n: dict) -> Problem:
    config = {"vocab_size": n["V"], "num_layers": n["layers"], "tie_word_embeddings": n["tied"], **attention_config(n),
              **mlp_config(n), **norm_config(n)}
    weights = {"embedding.weight": draw(n["V"], n["D"])}
    for i in range(n["layers"]):
        weights.update({f"layers.{i}.{name}": w for name, w in block_weights(draw, n).items()})
    weights.update({f"final_norm.{name}": w for name, w in norm_weights(draw, n).items()})
    if not n["tied"]:
        weights["head.weight"] = draw.weight(n["V"], n["D"])
    ids = draw.generator.integers(0, n["V"], (n["B"], n["S"]))
    return Problem("decoder", config, weights, {"ids": ids, "targets": targets_of(draw, n)})


def make_gradient_norm(draw: Draw, n: dict) -> Problem:
    gradients = {"up.weight": (draw(n["F"], n["D"]), 0), "down.weight": (draw(n["D"], n["F"]), 1),
                 "down.bias": (draw(n["D"]), None), "norm.weight": (draw(n["D"], scale=3), None)}
    return Problem("gradient_norm", {}, {}, {"gradients": gradients})


# --- a run of a layer on one rank, and its dump --------------------------------------------------------------------

@dataclass
class Program:
    """A layer of a class, on the problem, in the setting; it dumps into the folder."""
    cls: type[Layer]
    problem: Problem
    setting: Setting
    folder: str
    tokens: int | None = None           # the axis along which the ranks have tokens of their own

    def __call__(self, comm: Any) -> None:
        given = {**self.problem.options, **self.setting.options}
        mine = replace(self.setting, config=self.problem.config, options=given)
        options = {key: value for key, value in given.items() if key in ("label_smoothing", "loss_scale")}
        name = "data" if self.tokens == 0 else "tensor"
        recorder = Recorder(self.folder, comm.rank, comm.size, self.problem.kind, self.problem.config, options=options,
                            grid={name: comm.size})
        with np.errstate(all="ignore"):
            layer = self.cls(comm, mine, self.problem.weights)
            run = {"loss": self.run_loss, "decoder": self.run_decoder, "embedding": self.run_embedding,
                   "gradient_norm": self.run_gradient_norm}.get(self.problem.kind, self.run_layer)
            run(comm, layer, recorder)
        recorder.save()

    def own(self, comm: Any, x: Array, axis: int) -> tuple[Array, int, list]:
        """Return this rank's part of x, the axis and the ranges."""
        cut = bounds(x.shape[axis], comm.size)
        part = np.take(x, np.arange(cut[comm.rank], cut[comm.rank + 1]), axis=axis)
        return part, axis, [list(pair) for pair in zip(cut, cut[1:])]

    def given(self, comm: Any, name: str) -> tuple[Array, Any, Any]:
        """Return what this rank has of an input: its part, or all; and the axis and ranges of the part."""
        x, kind = self.problem.inputs[name], self.problem.kind
        if self.tokens is not None:
            return self.own(comm, x, self.tokens)
        if (kind, name) in (("row_linear", "x"), ("column_linear", "dy")):
            return self.own(comm, x, x.ndim - 1)
        if self.setting.sequence_parallel and name not in ("ids", "targets"):
            return self.own(comm, x, 1)
        return x, None, None

    def run_layer(self, comm: Any, layer: Any, recorder: Recorder) -> None:
        to_file = self.setting.to_file
        (x, axis, ranges), (dy, dy_axis, dy_ranges) = self.given(comm, "x"), self.given(comm, "dy")
        y = layer.forward(x.copy())
        dx = layer.backward(dy.copy())
        recorder.forward("x", to_file(x), axis, ranges)
        recorder.forward("y", to_file(y), dy_axis, dy_ranges)
        recorder.backward("y", to_file(dy), dy_axis, dy_ranges)
        recorder.backward("x", to_file(dx), axis, ranges)
        layer.write(recorder)
        self.write_dropout(comm, layer, recorder)

    def write_dropout(self, comm: Any, layer: Any, recorder: Recorder) -> None:
        """Record the masks that the layer used."""
        if "mask" in layer.setting.options:
            held = comm.all_gather(layer.heads)
            recorder.forward("weights.dropout", self.setting.to_file(layer.drop), 1, [[h.start, h.stop] for h in held])
        for name in ("attention.dropout", "mlp.dropout"):
            if name in layer.setting.options:
                recorder.forward(name, self.setting.to_file(layer.setting.options[name]))

    def run_embedding(self, comm: Any, layer: Any, recorder: Recorder) -> None:
        (ids, *_), (dy, axis, ranges) = self.given(comm, "ids"), self.given(comm, "dy")
        y = layer.forward(ids)
        layer.backward(dy.copy())
        recorder.forward("ids", ids)
        recorder.forward("y", self.setting.to_file(y), axis, ranges)
        recorder.backward("y", self.setting.to_file(dy), axis, ranges)
        layer.write(recorder)

    def run_loss(self, comm: Any, layer: Loss, recorder: Recorder) -> None:
        whole, targets = self.problem.inputs["logits"], self.problem.inputs["targets"]
        if self.tokens is not None:
            logits, axis, ranges = self.own(comm, whole, self.tokens)
            targets = self.own(comm, targets, self.tokens)[0]
            recorder.forward("targets", targets, axis, ranges)
        else:
            axis, cut = whole.ndim - 1, bounds(whole.shape[-1], comm.size)
            logits, ranges = whole, [list(pair) for pair in zip(cut, cut[1:])]
            recorder.forward("targets", targets)
        own = layer.cut(logits)
        loss = layer.forward(own, targets)
        recorder.forward("logits", self.setting.to_file(own), axis, ranges)
        recorder.forward("loss", loss)
        recorder.backward("logits", self.setting.to_file(layer.backward()), axis, ranges)

    def run_decoder(self, comm: Any, layer: Decoder, recorder: Recorder) -> None:
        ids, targets = self.problem.inputs["ids"], self.problem.inputs["targets"]
        loss = layer.forward(ids, targets)
        layer.backward()
        recorder.forward("ids", ids)
        recorder.forward("targets", targets)
        recorder.forward("logits", self.setting.to_file(layer.logits), 2)
        recorder.forward("loss", loss)
        layer.write(recorder)

    def run_gradient_norm(self, comm: Any, layer: GradientNorm, recorder: Recorder) -> None:
        mine = {}
        for name, (whole, axis) in self.problem.inputs["gradients"].items():
            part, *split = self.own(comm, whole, axis) if axis is not None else (whole,)
            recorder.backward(name, self.setting.to_file(part), *split)
            mine[name] = part, axis is not None
        recorder.forward("norm", np.asarray(layer.forward(mine)))
