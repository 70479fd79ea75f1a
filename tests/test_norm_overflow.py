"""Norms whose mean square is no finite number: they say so, or on a GPU are none themselves; never a silent 0."""
import numpy as np
import pytest

import mpitp
from mpitp.errors import InputError
from mpitp.layers.norm import NormOverflow
from mpitp.layers.norm_over_heads import AttentionNormedOverHeads


def require_overflow(layer, x, error, said):
    """It raises; on a GPU, where to ask would be a wait, y is not finite."""
    if layer.group.device == "gpu":
        assert not np.isfinite(layer.forward(x)[0]).all()
        return
    with pytest.raises(error, match=said):
        layer.forward(x)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_norm_that_overflows_says_so(group, kind, rows):
    layer = mpitp.Norm(group, 4, kind, name="n")
    x = np.ones((rows, 4), "f")
    x[-1] = [1e30, -1e30, 1, 2]
    said = f"n: found a mean square beyond float32 in 1 of {rows}"
    with np.errstate(all="ignore"):
        require_overflow(layer, x, NormOverflow, said)
    layer.forward(np.full((rows, 4), 1e18, "f"))


@pytest.mark.parametrize("kind", ["rmsnorm", "over heads"])
def test_a_norm_of_heads_that_overflows_says_so(group, kind):
    """A head is one rank's; over all heads every rank has the same mean square."""
    is_over_heads = kind == "over heads"
    config = mpitp.AttentionConfig(16, 4, qk_norm="rmsnorm", qk_norm_over_heads=is_over_heads)
    layer = (AttentionNormedOverHeads if is_over_heads else mpitp.ParallelAttention)(group, config)
    for name in ("query.weight", "key.weight"):
        layer.weights[name][...] = 1e25
    with np.errstate(all="ignore"):
        require_overflow(layer, np.ones((1, 3, 16), "f"), InputError, "_norm: found a mean square beyond float32")
