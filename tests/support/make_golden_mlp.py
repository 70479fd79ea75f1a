"""Write golden_mlp.json: the feed-forward block and its gradients by PyTorch's autograd, in float64.

    pip install torch==2.13.0 && python tests/support/make_golden_mlp.py

test_dense.py reads the file, and inputs() to make the same numbers again; it needs no PyTorch.
"""
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[1] / "data" / "golden_mlp.json"
TOKENS, HIDDEN, FFN = 2, 3, 5
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "identity")


def inputs(gated):
    """x, dy and the weights: fractions of 256 between -2 and 2, exact on every machine, none of them 0."""
    shapes = {"x": (TOKENS, HIDDEN), "dy": (TOKENS, HIDDEN), "up.weight": (FFN, HIDDEN), "up.bias": (FFN,)}
    if gated:
        shapes.update({"gate.weight": (FFN, HIDDEN), "gate.bias": (FFN,)})
    shapes.update({"down.weight": (HIDDEN, FFN), "down.bias": (HIDDEN,)})
    return {name: ((np.arange(np.prod(shape)) * 29 + 11 * number) % 64 / 16 - 1.97265625).reshape(shape)
            for number, (name, shape) in enumerate(shapes.items())}


def results(activation, gated):
    """{"y", "dx", and the gradient of every weight}, as nested lists."""
    import torch
    from torch.nn import functional as F
    act = {"gelu_tanh": lambda h: F.gelu(h, approximate="tanh"), "gelu": F.gelu, "silu": F.silu, "relu": F.relu,
           "identity": lambda h: h}[activation]
    given = {name: torch.tensor(value, requires_grad=name != "dy") for name, value in inputs(gated).items()}
    up = F.linear(given["x"], given["up.weight"], given["up.bias"])
    middle = act(F.linear(given["x"], given["gate.weight"], given["gate.bias"])) * up if gated else act(up)
    y = F.linear(middle, given["down.weight"], given["down.bias"])
    y.backward(given.pop("dy"))
    return {"y": y.tolist(), "dx": given.pop("x").grad.tolist(), **{k: v.grad.tolist() for k, v in given.items()}}


def main():
    import torch
    cases = [json.dumps({"activation": name, "gated": gated, **results(name, gated)})
             for name in ACTIVATIONS for gated in (False, True)]
    versions = f'"torch": "{torch.__version__}", "numpy": "{np.__version__}"'
    FILE.write_text(f'{{{versions}, "cases": [\n' + ",\n".join(cases) + "\n]}\n")


if __name__ == "__main__":
    main()
