"""The parameters of the layers, by arithmetic from their sizes alone. Weights are [out, in].

Those of whole decoders, made of these, stand in decoder_specs.py.
"""
from .parameters import ParameterSpec


def join(prefix: str, name: str) -> str:
    """Return the dotted name of something inside `prefix`, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


def column_parallel_specs(out_features: int, in_features: int, bias: bool, init_std: float | None, name: str,
                          multiple: int = 1, share: int = 1) -> list[ParameterSpec]:
    """Return a weight [out, in] and a bias [out], both split by out features. init_std None: in^-0.5."""
    std = in_features ** -0.5 if init_std is None else init_std
    specs = [ParameterSpec(join(name, "weight"), (out_features, in_features), 0, std, multiple=multiple, share=share)]
    if bias:
        specs.append(ParameterSpec(join(name, "bias"), (out_features,), 0, decay=False, multiple=multiple, share=share))
    return specs


def row_parallel_specs(out_features: int, in_features: int, bias: bool, init_std: float | None, name: str,
                       multiple: int = 1) -> list[ParameterSpec]:
    """Return a weight [out, in], split by in features, and a replicated bias [out]. init_std None: in^-0.5."""
    std = in_features ** -0.5 if init_std is None else init_std
    specs = [ParameterSpec(join(name, "weight"), (out_features, in_features), 1, std, multiple=multiple)]
    if bias:
        specs.append(ParameterSpec(join(name, "bias"), (out_features,), None, decay=False))
    return specs


def mlp_specs(hidden_size: int, ffn_hidden_size: int, gated: bool, bias: bool, init_std: float | None,
              output_init_std: float | None, name: str) -> list[ParameterSpec]:
    """Return the parameters of ParallelMLP: "up", "gate" if gated, "down"."""
    specs = column_parallel_specs(ffn_hidden_size, hidden_size, bias, init_std, join(name, "up"))
    if gated:
        specs += column_parallel_specs(ffn_hidden_size, hidden_size, bias, init_std, join(name, "gate"))
    return specs + row_parallel_specs(hidden_size, ffn_hidden_size, bias, output_init_std, join(name, "down"))


def norm_specs(size: int, bias: bool, zero_centered: bool, name: str) -> list[ParameterSpec]:
    """Return the parameters of a norm, replicated."""
    start = 0.0 if zero_centered else 1.0
    specs = [ParameterSpec(join(name, "weight"), (size,), None, decay=False, init_value=start)]
    if bias:
        specs.append(ParameterSpec(join(name, "bias"), (size,), None, decay=False))
    return specs
