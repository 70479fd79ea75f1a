"""What every parallel layer has: parameters that it holds its slices of, and rows that it takes."""
from collections.abc import Iterable, Mapping, MutableMapping
from math import prod
from typing import Any

from ..arrays import Array, compute_dtype, module_of, sum_dtype
from ..comm.group import TensorParallelGroup
from ..errors import InputError, is_integer, require
from ..sharding.parameters import ParameterSpec, by_name, check_dense, initialise
from ..sharding.partition import Partition
from ..sharding.specs import join


class Weights(dict):
    """This rank's slices by name. A layer computes with these arrays: another one in the place of one is refused."""

    def __setitem__(self, name: str, array: Array) -> None:
        require(array is self.get(name), f"another array for weights[{name!r}]",
                f"weights[{name!r}][...] = array, or load_dense, which write into the layer's")

    def __delitem__(self, *_: Any) -> Any:
        raise InputError("found weights to take away or to put in, expected to write into the layer's arrays")

    update = MutableMapping.update              # by __setitem__, which dict's own passes by
    pop = popitem = clear = setdefault = __ior__ = __delitem__


class ParallelLayer:
    """A layer that holds this rank's slices of the parameters that `specs` declares.

    Attributes
    ----------
    specs : {name: ParameterSpec}
        Every parameter of the layer.
    weights : {name: array}
        This rank's slices; the arrays stay the same, load_dense writes into them.
    own : {name: array}
        The same arrays by their names inside the layer: "up.weight" for "layers.3.mlp.up.weight".
    dtype, sum_dtype : dtype
        Of weights, x and y; of gradients and of sums, float32 where dtype has 16 bits.
    """

    def __init__(self, group: TensorParallelGroup, specs: Iterable[ParameterSpec], dtype: str, seed: int | None,
                 name: str):
        self.set_dtype(group, dtype)
        require(seed is None or is_integer(seed), f"seed {seed!r}", "an integer, or None for zeros")
        self.group, self.name, self.specs = group, name, by_name(specs)
        self.weights = Weights({
            name: group.xp.zeros(spec.local_shape(group.place), self.dtype) if seed is None else
            group.xp.asarray(initialise(spec, seed, self.dtype, group.place)) for name, spec in self.specs.items()})
        self.set_own()

    def __setattr__(self, name: str, value: Any) -> None:
        require(name != "weights" or isinstance(value, Weights), "another dict for weights", "load_dense of it")
        super().__setattr__(name, value)

    def set_dtype(self, group: TensorParallelGroup, dtype: str) -> None:
        """Compute in `dtype` from now on. Raises InputError for one that the group's device does not compute in."""
        self.dtype = compute_dtype(dtype, group.device)
        self.sum_dtype = sum_dtype(self.dtype)

    def set_own(self) -> None:
        """Find the weights by their names inside the layer."""
        skipped = len(join(self.name, ""))
        self.own = {full_name[skipped:]: w for full_name, w in self.weights.items()}

    def set_partition(self, partition: Partition) -> None:
        """Split the layer's work by `partition`: this rank has its `own_blocks`."""
        self.partition, self.own_blocks = partition, partition.blocks_of(self.group.rank)

    def parameter(self, name: str) -> Array | None:
        """Return this rank's slice of a parameter by its name inside the layer, None where there is no such one."""
        return self.own.get(name)

    def load_dense(self, weights: Mapping[str, Any]) -> None:
        """Take this rank's slices out of dense arrays.

        Parameters
        ----------
        weights : {name: array}
            Arrays of the whole parameters' shapes, [out, in], or anything that has a shape and slices, such as a
            memory map: only this rank's part is read.

        Raises
        ------
        InputError
            Before anything is changed, for a missing or an unexpected name, another shape, or numbers that are not
            floating-point ones.
        """
        self.require_names(weights, "weights")
        for name, spec in self.specs.items():
            check_dense(spec, weights[name])
        for name, spec in self.specs.items():
            self.weights[name][...] = self.group.xp.asarray(weights[name][spec.window(self.group.place)])

    def gather(self, arrays: Mapping[str, Array] | None = None) -> dict[str, Array] | None:
        """Return {name: dense array} on rank 0, None on the others. Collective: one gather per split parameter.

        Parameters
        ----------
        arrays : {name: array}, optional
            This rank's slices, such as gradients; default the weights.

        Returns
        -------
        {name: array} or None
            Dense arrays [out, in] on rank 0.
        """
        dense = {}
        for name, local in (self.weights if arrays is None else arrays).items():
            spec, axis = self.specs[name], self.specs[name].axis
            if axis is None:
                dense[name] = local.copy()
            else:
                mine, partition = local[spec.owned(self.group.place)], spec.partition(self.group.place)
                dense[name] = self.group.gather(mine, partition, axis)
        return dense if self.group.rank == 0 else None

    def local_bytes(self) -> int:
        """Return the bytes of this rank's slices."""
        return sum(w.nbytes for w in self.weights.values())

    def rows(self, x: Array, features: int, what: str = "x", count: int | None = None) -> Array:
        """Return x (..., features) as rows (N, features). Raises InputError for another device, dtype, size or N."""
        xp = self.group.xp
        if type(x) is xp.ndarray and x.ndim == 2 and x.dtype == self.dtype and x.flags.c_contiguous and \
                x.shape == (len(x) if count is None else count, features):
            return x                                        # nothing to do, which costs a token less than to ask for it
        if type(x) is not xp.ndarray and module_of(x) is not xp:
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

    def gradients(self, out: dict[str, Array] | None) -> dict[str, Array]:
        """Return arrays for the gradients of all parameters: those of `out`, an earlier backward's, or new ones."""
        if out is None:
            return {name: self.group.xp.empty(w.shape, self.sum_dtype) for name, w in self.weights.items()}
        from .names import require_gradients
        return require_gradients(out, self)

    def require_names(self, arrays: Any, what: str) -> None:
        """Raise InputError unless `arrays` is a dict with the parameters' names."""
        if not isinstance(arrays, Mapping) or arrays.keys() != self.specs.keys():
            from .names import refuse_names
            refuse_names(self.specs, arrays, what)


def require_saved(saved: Any, layer: ParallelLayer) -> tuple:
    """Return what forward kept for backward. Raises InputError where it kept nothing, or another layer kept it."""
    require(saved is not None, "saved = None", "what forward(x) returned beside y; it keeps nothing with save=False")
    require(isinstance(saved, tuple) and saved and saved[0] is layer, "saved of another layer",
            f"what this {type(layer).__name__}'s forward(x) returned beside y")
    return saved[1:]
