"""What every parallel layer has: parameters that it holds its slices of, and rows that it takes."""
from math import prod

import numpy as np

from ..arrays import COMPUTE_DTYPES, module_of
from ..errors import InputError, require
from ..parameters import by_name, check_dense, initialise


class ParallelLayer:
    """Holds this rank's slices of the parameters that `specs` declares.

    Attributes
    ----------
    specs : {name: ParameterSpec}, every parameter of the layer
    weights : {name: array}, this rank's slices; the arrays stay the same, load_dense writes into them
    """

    def __init__(self, group, specs, dtype, seed, name):
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            raise InputError(f"found dtype {dtype!r}, expected one of {', '.join(COMPUTE_DTYPES)}") from None
        require(self.dtype.name in COMPUTE_DTYPES, f"dtype {self.dtype.name}", f"one of {', '.join(COMPUTE_DTYPES)}")
        require(seed is None or hasattr(seed, "__index__"), f"seed {seed!r}", "an integer, or None for zeros")
        self.group, self.name, self.specs = group, name, by_name(specs)
        where = (group.rank, group.size, group.blocks)
        self.weights = {}
        for full_name, spec in self.specs.items():
            local = np.zeros(spec.local_shape(*where), self.dtype) if seed is None else \
                initialise(spec, seed, self.dtype, *where)
            self.weights[full_name] = group.xp.asarray(local)

    def parameter(self, name):
        """This rank's slice of a parameter by its name inside the layer, None where the layer has no such one."""
        return self.weights.get(join(self.name, name))

    def load_dense(self, weights):
        """Take this rank's slices out of dense arrays.

        Parameters
        ----------
        weights : {name: array of the whole parameter's shape, [out, in]}, or anything that has a shape and slices,
            such as a memory map: only this rank's part is read.

        Raises InputError, before anything is changed, for a missing or an unexpected name, or another shape.
        """
        missing, unexpected = self.specs.keys() - weights.keys(), weights.keys() - self.specs.keys()
        require(not missing and not unexpected, f"weights named {', '.join(sorted(weights)) or '(none)'}",
                f"{', '.join(sorted(self.specs))}")
        for name, spec in self.specs.items():
            check_dense(spec, weights[name])
        for name, spec in self.specs.items():
            window = spec.window(self.group.rank, self.group.size, self.group.blocks)
            self.weights[name][...] = self.group.xp.asarray(weights[name][window])

    def gather(self, arrays=None):
        """{name: dense array} on rank 0, None on the others. Collective: one gather per split parameter.

        arrays : {name: this rank's slice}, such as gradients; default the weights
        """
        dense = {}
        for name, local in (self.weights if arrays is None else arrays).items():
            axis = self.specs[name].axis
            if axis is None:
                dense[name] = local.copy()
            else:
                dense[name] = self.group.gather(local, self.group.partition(self.specs[name].shape[axis]), axis)
        return dense if self.group.rank == 0 else None

    def local_bytes(self):
        """Bytes of this rank's slices."""
        return sum(w.nbytes for w in self.weights.values())

    def rows(self, x, features, what="x", count=None):
        """x (..., features) as rows (N, features), after checking device, dtype and size; count: the N expected."""
        if module_of(x) is not self.group.xp:
            raise InputError(f"{what}: found {type(x).__module__}.{type(x).__name__}, expected an array of "
                             f"{self.group.xp.__name__} (the group's device is {self.group.device!r})")
        require(x.dtype == self.dtype, f"{what} of dtype {x.dtype}", f"{self.dtype}, the layer's")
        require(x.ndim > 0 and x.shape[-1] == features, f"{what} of shape {x.shape}", f"(..., {features})")
        tokens = prod(x.shape[:-1])
        require(count in (None, tokens), f"{what} of {tokens} rows", f"{count}, as many as x had")
        return x.reshape(tokens, features)

    def gradients(self, out):
        """Arrays for the gradients of all parameters: those of `out`, an earlier backward's, or new ones."""
        if out is None:
            return {name: self.group.xp.empty_like(w) for name, w in self.weights.items()}
        require(out.keys() == self.weights.keys(), f"out with {sorted(out)}", f"{sorted(self.weights)}")
        for name, w in self.weights.items():
            require(out[name].shape == w.shape and out[name].dtype == w.dtype,
                    f"out[{name!r}] {out[name].dtype} {out[name].shape}", f"{w.dtype} {w.shape}")
        return out


def join(prefix, name):
    return f"{prefix}.{name}" if prefix else name


def require_saved(saved):
    require(saved is not None, "saved = None", "what forward(x) returned beside y; it keeps nothing with saved=False")
