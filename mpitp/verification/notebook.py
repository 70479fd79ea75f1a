"""The example that tensor parallelism is usually told with: x (1, 5, 10), weights 10 -> 40 -> 10."""
from dataclasses import dataclass

import numpy as np

from ..arrays import on_host
from ..comm.group import TensorParallelGroup
from ..layers.mlp import ParallelMLP
from ..ops.linear import linear_forward
from .numbers import standard_normals


@dataclass
class RankPart:
    """What one rank of the example holds and computes.

    Parameters
    ----------
    rank : int
    features : list of int
        The first of the 40 in the middle, and the last + 1.
    up_shape, down_shape, partial_shape : tuple of int
        Shapes of its slices, and of its partial sum.
    partial_first_value : float
        The first number of its partial sum.
    """
    rank: int
    features: list
    up_shape: tuple
    down_shape: tuple
    partial_shape: tuple
    partial_first_value: float


@dataclass
class Notebook:
    """A Notebook is what came out of the example over all ranks.

    Parameters
    ----------
    parts : list of RankPart
    sum_first_value, dense_first_value : float
        The first number of the sum over the ranks, and of the dense result.
    allclose : bool
        Whether the two results agree to 1e-5.
    largest_difference : float
    """
    parts: list
    sum_first_value: float
    dense_first_value: float
    allclose: bool
    largest_difference: float


def notebook_example(group: TensorParallelGroup, seed: int) -> Notebook | None:
    """Compute the example over the ranks, without bias or activation. Collective.

    Returns
    -------
    Notebook or None
        None but on rank 0.
    """
    layer = ParallelMLP(group, 10, 40, "identity", bias=False, seed=seed)
    x = group.xp.asarray(standard_normals(seed, "notebook.x", (1, 5, 10), "float32"))
    up, down = layer.weights["up.weight"], layer.weights["down.weight"]
    # This rank's share by hand, as the ranks' partial sums are what the example is about.
    partial = linear_forward(linear_forward(x.reshape(-1, 10), up)[0], down)[0].reshape(x.shape)
    y, _ = layer.forward(x, save=False)
    owned = layer.partition.range(group.rank)
    parts = group.report(RankPart(group.rank, [owned.start, owned.stop], up.shape, down.shape, partial.shape,
                                  float(partial.flat[0])))
    weights = layer.gather()
    if parts is None or weights is None:                # not rank 0
        return None
    dense = on_host(x) @ on_host(weights["up.weight"]).T @ on_host(weights["down.weight"]).T
    y = on_host(y)
    return Notebook(parts, float(y.flat[0]), float(dense.flat[0]), bool(np.allclose(y, dense, rtol=1e-5, atol=1e-5)),
                    float(np.abs(y - dense).max()))
