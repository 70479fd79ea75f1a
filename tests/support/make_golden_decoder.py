"""Write golden_decoder.json: decoders of every kind in PyTorch's own functions, gradients by its autograd, in float64.

    pip install torch==2.13.0 && python tests/support/make_golden_decoder.py      (PYTHONPATH: the repository)

Shares no code with mpitp beyond its configs. golden_decoder.py has the weights and reads the file without PyTorch.
"""
import json
import math

import numpy as np
import torch
from torch.nn import functional as F

from golden_decoder import CASES, FILE, SMOOTHING, ids_and_targets, mask_of, summary, weights_of

ACTIVATIONS = {"gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def frequencies(rotary, dim):
    """Radians per position of each pair, as transformers' modeling_rope_utils computes them, and the factor of both."""
    plain = 1.0 / rotary.base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    slow, length = plain / rotary.factor, rotary.original_max_positions
    if rotary.scaling is None:
        return plain, 1.0
    if rotary.scaling == "linear":
        return slow, 1.0
    if rotary.scaling == "llama3":
        wave = 2 * math.pi / plain
        smooth = (length / wave - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
        between = (1 - smooth) * slow + smooth * plain
        found = torch.where(wave > length / rotary.low_freq_factor, slow, between)
        return torch.where(wave < length / rotary.high_freq_factor, plain, found), 1.0
    ends = [dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rotary.base))
            for turns in (rotary.beta_fast, rotary.beta_slow)]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if rotary.truncate else ends
    low, high = max(low, 0), min(high, dim - 1)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low or 0.001), 0, 1)
    factor = rotary.attention_factor
    return slow * ramp + plain * (1 - ramp), 0.1 * math.log(rotary.factor) + 1.0 if factor is None else factor


def rotate(x, rotary):
    """Pairs as complex numbers, times factor * e^(i angle). x (B, heads, S, K)"""
    dim = x.shape[-1] if rotary.dim is None else rotary.dim
    frequency, factor = frequencies(rotary, dim)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency)
    turning, rest = x[..., :dim], x[..., dim:]
    shape = (dim // 2, 2) if rotary.interleaved else (2, dim // 2)
    pairs = turning.unflatten(-1, shape)
    pairs = pairs if rotary.interleaved else pairs.transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(factor + 0 * angle, angle))
    turned = turned if rotary.interleaved else turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), rest], dim=-1)


def alibi_slopes(heads):
    """As the paper's code: a geometric sequence of a power of two; of other counts, the rest from twice that."""
    def geometric(n):
        start = 2 ** (-2 ** -(math.log2(n) - 3))
        return [start * start ** i for i in range(n)]
    if math.log2(heads).is_integer():
        return geometric(heads)
    below = 2 ** math.floor(math.log2(heads))
    return geometric(below) + geometric(2 * below)[0::2][:heads - below]


class Model:
    def __init__(self, config, weights):
        self.config = config
        self.w = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}

    def linear(self, name, x):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        weight, config = self.w[f"{name}.weight"], self.config
        weight = 1 + weight if config.zero_centered_gamma else weight
        if config.normalization == "layernorm":
            return F.layer_norm(x, weight.shape, weight, self.w.get(f"{name}.bias"), config.norm_epsilon)
        return F.rms_norm(x, weight.shape, weight, config.norm_epsilon)

    def attention(self, name, x, layer, mask):
        config, S = self.config, x.shape[1]
        found = {}
        for part, heads in (("query", config.num_attention_heads), ("key", config.query_groups),
                            ("value", config.query_groups)):
            z = self.linear(f"{name}.{part}", x).unflatten(-1, (heads, config.head_dim)).transpose(1, 2)
            if part != "value":
                z = self.norm(f"{name}.{part}_norm", z) if config.qk_norm else z
                z = rotate(z, config.rotary_of(layer)) if config.position_embedding == "rotary" else z
            found[part] = z
        position = torch.arange(S)
        distance = position[:, None] - position
        allowed = distance.abs() < (config.window(layer) or S)
        allowed = allowed & (distance >= 0) if config.causal else allowed
        allowed = allowed if mask is None else allowed & torch.tensor(mask)[:, None, None, :]
        bias = torch.zeros(distance.shape, dtype=torch.float64).masked_fill(~allowed, -math.inf)
        if config.position_embedding == "alibi":
            slopes = torch.tensor(alibi_slopes(config.num_attention_heads), dtype=torch.float64)
            bias = bias - slopes[:, None, None] * distance
        y = F.scaled_dot_product_attention(found["query"], found["key"], found["value"], attn_mask=bias,
                                           scale=config.scale, enable_gqa=True)
        return self.linear(f"{name}.out", y.transpose(1, 2).flatten(-2))

    def mlp(self, name, x):
        act = ACTIVATIONS[self.config.activation]
        up = self.linear(f"{name}.up", x)
        return self.linear(f"{name}.down", act(self.linear(f"{name}.gate", x)) * up if self.config.gated else act(up))

    def block(self, i, x, mask):
        config, at = self.config, f"layers.{i}."
        branches = {"attention": lambda h: self.attention(f"{at}attention", h, i, mask),
                    "mlp": lambda h: self.mlp(f"{at}mlp", h)}
        if config.parallel_residual:
            h = self.norm(f"{at}attention_norm", x)
            return x + branches["attention"](h) + branches["mlp"](h if config.shared_norm else
                                                                  self.norm(f"{at}mlp_norm", x))
        for name, branch in branches.items():
            before, after = f"{at}{name}_norm", f"{at}{name}_post_norm"
            x = {"before": lambda x: x + branch(self.norm(before, x)),
                 "after": lambda x: x + self.norm(after, branch(x)),
                 "both": lambda x: x + self.norm(after, branch(self.norm(before, x))),
                 "after_residual": lambda x: self.norm(after, x + branch(x))}[config.norm_placement](x)
        return x

    def logits(self, ids, mask):
        config = self.config
        x = F.embedding(ids, self.w["embedding.weight"]) * config.embedding_multiplier
        if config.position_embedding == "learned":
            x = x + F.embedding(torch.arange(ids.shape[1]), self.w["position.weight"])
        x = self.norm("embedding_norm", x) if config.embedding_norm else x
        for i in range(config.num_layers):
            x = self.block(i, x, mask)
        x = self.norm("final_norm", x) if config.final_norm else x
        head = self.w["embedding.weight" if config.tie_word_embeddings else "head.weight"]
        return F.linear(x, head, self.w.get("head.bias"))


def results(kind, config):
    model, (ids, targets) = Model(config, weights_of(config)), map(torch.tensor, ids_and_targets(config))
    logits = model.logits(ids, mask_of(kind))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING, ignore_index=-100)
    loss.backward()
    return summary(logits.detach().numpy(), loss.item(), {name: w.grad.numpy() for name, w in model.w.items()})


def main():
    cases = []
    for kind, config in CASES.items():
        rows = [f"{json.dumps(name)}: [{', '.join(format(number, '.13g') for number in numbers)}]"
                for name, numbers in results(kind, config).items()]
        cases.append(f"{json.dumps(kind)}: {{\n" + ",\n".join(rows) + "}")
    versions = f'"torch": "{torch.__version__}", "numpy": "{np.__version__}"'
    FILE.write_text(f'{{{versions}, "cases": {{\n' + ",\n".join(cases) + "}}\n")


if __name__ == "__main__":
    main()
