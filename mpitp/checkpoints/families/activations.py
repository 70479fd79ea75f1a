"""The names that config.json has for activations, and those of DecoderConfig."""
ACTIVATIONS = {     # theirs: ours
    "relu": "relu", "relu2": "relu2", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "linear": "identity",
}
THEIR_ACTIVATIONS = {"relu": "relu", "relu2": "relu2", "silu": "silu", "gelu": "gelu",
                     "gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}
