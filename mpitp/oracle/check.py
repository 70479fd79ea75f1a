"""check_layer: the judge for tests, where the results are at hand."""
from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

Given = Mapping[str, Any]


def check_layer(kind: str, config: Any, weights: Given, inputs: Given, outputs: Given, gradients: Given, *,
                layouts: Given | None = None, options: Given | None = None) -> Any:
    """Judge a layer's results as `python -m mpitp judge` does.

    Parameters
    ----------
    kind : str
        "column_linear", "row_linear", "mlp", "attention", "norm", "embedding", "loss", "block", "decoder" or
        "gradient_norm"; docs/judge.md has the names of their tensors.
    config : dict or DecoderConfig
        The architecture, as far as the kind needs it.
    weights : dict
        Whole weights, [out, in], by name.
    inputs : dict
        "x", and "dy", the gradient of y; or "ids", "targets", "logits".
    outputs : dict
        "y", and any tensors between. A result is an array, the same on every rank, or a list of each rank's.
    gradients : dict
        "dx", and those of weights by their names; each an array or a list.
    layouts : dict, optional
        How lists lie on the ranks, by name: the axis along which the ranks' parts follow each other; "partial" for
        summands; or a dict with "axis" and "ranges". None: every rank has all of it.
    options : dict, optional
        "label_smoothing", "ignore_index", "loss_scale", "layer", "compute_dtype"; "accumulate", the dtype in which
        16-bit numbers are added up ("float32").

    Returns
    -------
    mpitp.court.verdict.Verdict
        With a row for each tensor, where all of them are right.

    Raises
    ------
    AssertionError
        Three lines: what is wrong first, which mistake that is, where to look.
    InputError
        What cannot be judged: a name or a shape that the kind does not have.

    Notes
    -----
    A temporary folder is written and removed. No communication: in a test under mpirun, gather the ranks' arrays first.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy, w = np.ones((2, 3)), np.ones((2, 4)), np.ones((4, 3))
    >>> verdict = check_layer("column_linear", {}, {"weight": w}, {"x": x, "dy": dy},
    ...                       {"y": [x @ w[:2].T, x @ w[2:].T]}, {"dx": dy @ w}, layouts={"y": 1})
    >>> verdict.good
    True
    >>> try:
    ...     check_layer("column_linear", {}, {"weight": w}, {"x": x, "dy": dy},
    ...                 {"y": [x @ w[:2].T, x @ w[2:].T]}, {"dx": 2 * (dy @ w)}, layouts={"y": 1})
    ... except AssertionError as error:
    ...     print(str(error).splitlines()[1])
    The mistake: the all-reduce of dx in f's backward is taken twice: 2 times too large.
    """
    # By name, and when it is called: the court stands on the oracle, and needs more of mpitp than that.
    court = import_module("mpitp.court.check")
    return court.check_layer(kind, config, weights, inputs, outputs, gradients, layouts=layouts, options=options)
