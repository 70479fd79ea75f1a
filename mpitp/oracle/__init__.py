"""Dense transformers on one process, forward and backward, and how far another computation may be from them.

The parallel layers of mpitp are judged by this, and any other tensor-parallel code can be. Nothing here shares code
with the layers: formulas stand in their plainest form, and NumPy is all that they need.

    linear, norm, embedding, feed_forward, attention, block, decoder, cross_entropy
                    modules with `forward` and `backward`; weights are a dict by the names of the parameters
    Magnitude       an array that carries a bound on its rounding error; every function above runs on it
    compare         judges one result against the exact one; compare_all judges all of a computation
    Comparison      what they return
    Recorder        writes what the ranks of any run hold to a folder, for `python -m mpitp judge`
    check_layer     the same judge for results at hand, in a test

Examples
--------
A gradient in float32, judged:

>>> import numpy as np
>>> from mpitp import oracle
>>> draw = np.random.default_rng(0).standard_normal
>>> x, dy, w = draw((5, 4)), draw((5, 3)), {"weight": draw((3, 4))}
>>> _, saved = oracle.linear.forward(oracle.Magnitude(x), {"weight": oracle.Magnitude(w["weight"])})
>>> dx, gradients = oracle.linear.backward(oracle.Magnitude(dy), saved)
>>> mine = dy.T @ x
>>> oracle.compare(mine, gradients["weight"]).good
True
>>> oracle.compare(mine * (1 + 1e-12), gradients["weight"]).good
False
"""
from . import attention, block, cross_entropy, decoder, embedding, feed_forward, linear, norm
from .check import check_layer
from .comparison import Comparison, compare, compare_all, error_ratio, limit, normwise_limit, normwise_ratio
from .magnitude import Magnitude
from .recorder import Recorder

__all__ = ["Comparison", "Magnitude", "Recorder", "attention", "block", "check_layer", "compare", "compare_all",
           "cross_entropy", "decoder", "embedding", "error_ratio", "feed_forward", "limit", "linear", "norm",
           "normwise_limit", "normwise_ratio"]
