"""What every parallel layer has: parameters that it holds its slices of, and rows that it takes."""
from collections.abc import Mapping
from math import prod

from ..arrays import compute_dtype, module_of, sum_dtype
from ..errors import InputError, is_integer, require
from ..sharding.parameters import by_name, check_dense, initialise

MANY = 12       # parameters; a message does not list as many


class ParallelLayer:
    """Holds this rank's slices of the parameters that `specs` declares.

    Attributes
    ----------
    specs : {name: ParameterSpec}, every parameter of the layer
    weights : {name: array}, this rank's slices; the arrays stay the same, load_dense writes into them
    dtype, sum_dtype : of weights, x and y; of gradients and of sums, float32 where dtype has 16 bits
    """

    def __init__(self, group, specs, dtype, seed, name):
        self.set_dtype(group, dtype)
        require(seed is None or is_integer(seed), f"seed {seed!r}", "an integer, or None for zeros")
        self.group, self.name, self.specs = group, name, by_name(specs)
        where = (group.rank, group.size, group.blocks)
        self.weights = {}
        for full_name, spec in self.specs.items():
            self.weights[full_name] = group.xp.zeros(spec.local_shape(*where), self.dtype) if seed is None else \
                group.xp.asarray(initialise(spec, seed, self.dtype, *where))
        skipped = len(join(name, ""))
        self.inside = {full_name[skipped:]: w for full_name, w in self.weights.items()}

    def set_dtype(self, group, dtype):
        self.dtype = compute_dtype(dtype, group.device)
        self.sum_dtype = sum_dtype(self.dtype)
        # What a summand of sum_blocks has. One summand alone may be rounded where it is made.
        self.leaf_dtype = self.dtype if group.size == 1 and not group.reproducible else self.sum_dtype

    def parameter(self, name):
        """This rank's slice of a parameter by its name inside the layer, None where the layer has no such one."""
        return self.inside.get(name)

    def load_dense(self, weights):
        """Take this rank's slices out of dense arrays.

        Parameters
        ----------
        weights : {name: array of the whole parameter's shape, [out, in]}, or anything that has a shape and slices,
            such as a memory map: only this rank's part is read.

        Raises InputError, before anything is changed, for a missing or an unexpected name, another shape, or numbers
        that are not floating-point ones.
        """
        self.require_names(weights, "weights")
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
            spec, axis = self.specs[name], self.specs[name].axis
            if axis is None:
                dense[name] = local.copy()
            else:
                where = (self.group.rank, self.group.size, self.group.blocks)
                mine = local[spec.owned(*where)]
                dense[name] = self.group.gather(mine, spec.partition(*where[1:]), axis)
        return dense if self.group.rank == 0 else None

    def local_bytes(self):
        """Bytes of this rank's slices."""
        return sum(w.nbytes for w in self.weights.values())

    def rows(self, x, features, what="x", count=None):
        """x (..., features) as rows (N, features), after checking device, dtype and size; count: the N expected."""
        xp = self.group.xp
        if type(x) is xp.ndarray and x.ndim == 2 and x.dtype == self.dtype and x.flags.c_contiguous and \
                x.shape == (len(x) if count is None else count, features):
            return x                                        # nothing to do, which costs a token less than to ask for it
        if module_of(x) is not xp:
            raise InputError(f"{what}: found {type(x).__module__}.{type(x).__name__}, expected an array of "
                             f"{self.group.xp.__name__} (the group's device is {self.group.device!r})")
        if x.dtype != self.dtype:
            raise InputError(f"{what}: found dtype {x.dtype}, expected {self.dtype}, the layer's")
        if x.ndim == 0 or x.shape[-1] != features:
            raise InputError(f"{what}: found shape {x.shape}, expected (..., {features})")
        tokens = prod(x.shape[:-1])
        if count not in (None, tokens):
            raise InputError(f"{what}: found {tokens} rows, expected {count}, as many as x had")
        # The memory order would be part of the bits; and a matrix or memory map would pass its type on.
        return self.group.xp.ascontiguousarray(x).reshape(tokens, features)

    def gradients(self, out):
        """Arrays for the gradients of all parameters: those of `out`, an earlier backward's, or new ones."""
        if out is None:
            return {name: self.group.xp.empty(w.shape, self.sum_dtype) for name, w in self.weights.items()}
        self.require_names(out, "out")
        for name, w in self.weights.items():
            g = out[name]
            fits = module_of(g) is self.group.xp and g.shape == w.shape and g.dtype == self.sum_dtype
            if not (fits and g.flags.c_contiguous):
                raise InputError(f"out[{name!r}]: found {getattr(g, 'dtype', type(g).__name__)} "
                                 f"{getattr(g, 'shape', '')}, expected C-contiguous {self.sum_dtype} {w.shape}")
        return out

    def require_names(self, arrays, what):
        """Raise InputError unless `arrays` is a dict with the parameters' names."""
        if not isinstance(arrays, Mapping):
            raise InputError(f"{what}: found {type(arrays).__name__}, expected a dict of {', '.join(self.specs)}")
        if arrays.keys() != self.specs.keys():
            if len(self.specs) > MANY:              # then only where they differ
                missing, unexpected = self.specs.keys() - arrays.keys(), arrays.keys() - self.specs.keys()
                raise InputError(f"{what}: found no {some(missing)}; unexpected: {some(unexpected)}; expected the "
                                 f"{len(self.specs)} names of the model's parameters")
            raise InputError(f"{what}: found names {', '.join(map(str, arrays)) or '(none)'}, "
                             f"expected {', '.join(self.specs)}")


class Composite(ParallelLayer):
    """A layer made of layers: its parameters are theirs, under the same names and in the same arrays.

    A parameter that two of them share (tied embeddings) is one.
    """

    def __init__(self, group, layers, dtype, name):
        self.group, self.name = group, name
        self.set_dtype(group, dtype)
        named = {id(spec): spec for layer in layers for spec in layer.specs.values()}
        self.specs = by_name(named.values())
        self.weights = {name: layer.weights[name] for layer in layers for name in layer.specs}

    def of(self, layer, gradients):
        """The gradients of one of its layers."""
        return {name: gradients[name] for name in layer.specs}


def cut(x, at, axis=0):
    """x[at] along axis 0, or 1; x itself where that is all of it, as a rank's one block is in ordinary mode.

    (To make a view takes a GPU's host longer than to launch a kernel.)
    """
    if at.start == 0 and at.stop == x.shape[axis]:
        return x
    return x[:, at] if axis else x[at]


def some(names):
    """A few of the names, for a message."""
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def join(prefix, name):
    return f"{prefix}.{name}" if prefix else name


def require_saved(saved):
    require(saved is not None, "saved = None", "what forward(x) returned beside y; it keeps nothing with saved=False")
