"""The collectives on arrays: shapes, dtypes and agreement are checked, bytes are counted, a transport carries.

n in the byte counts is the size in bytes of the whole (reduced, gathered) array, P the number of ranks.
"""
from math import prod

from ..arrays import module_of
from ..errors import InputError
from . import agreement
from .ledger import Collective, wire_bytes
from .mpi import OPERATIONS
from .sums import dtype_name

# float16 sums in MPI are 12 to 20 times slower than float32 ones, and there is no bfloat16: float32 travels.
SENT_AS_FLOAT32 = ("float16", "bfloat16")
DTYPES = ("float32", "float64", "int32", "int64") + SENT_AS_FLOAT32


class Collectives:
    """What a group can do together. Needs comm, rank, size, xp, transport, ledger and check from the group.

    Every method is collective, counts itself in the ledger, and raises InputError for something that is not an
    array of the group's device, for a dtype, operation, axis, root or partition that does not fit. With
    check=True it raises on every rank where one rank has bad input or the ranks disagree.
    """

    def all_reduce(self, x, op="sum", out=None):
        """The sum (max, min) of x over the ranks, on every rank: MPI_Allreduce, 2 (P-1)/P n bytes a rank.

        Parameters
        ----------
        x : array, the same shape and dtype on every rank; not changed unless `out` is x
        op : "sum", "max" or "min". Max and min may lose NaN: count non-finite values with a sum.
        out : C-contiguous array for the result; `out=x` works in place, twice as fast for large arrays

        Notes
        -----
        The bits of a sum depend on the number of ranks; `sum` in reproducible mode is the sum that does not.
        """
        out, wire = self._prepare_reduction("all_reduce", x, op, out)
        with self._record("all_reduce", x):
            self.transport.all_reduce(wire, op)
        return _deliver(wire, out)

    def begin_all_reduce(self, x, op="sum", out=None):
        """Start all_reduce(x, op, out). Returns an object whose wait() gives the result; `out` must rest until then.

        MPI_Iallreduce. Hardly any MPI makes progress while none of its functions runs: overlap is not a given.
        """
        out, wire = self._prepare_reduction("begin_all_reduce", x, op, out)
        return PendingReduction(self, self.transport.begin_all_reduce(wire, op), x, wire, out)

    def all_gather(self, x, partition, axis=-1):
        """The parts of all ranks put together along `axis`, on every rank: MPI_Allgatherv, (P-1)/P n bytes a rank.

        x : array that along `axis` is this rank's range of `partition`; the other axes are the same everywhere
        """
        self._enter(self._describe_part, "all_gather", x, partition, axis)
        shape, counts = _whole(x, partition, axis)
        received = self.xp.empty(prod(shape), x.dtype)
        with self._record("all_gather", received):
            self.transport.all_gather(_raw(_flat(x)), _raw(received), counts)
        return self._assemble(received, counts, shape, partition, axis)

    def gather(self, x, partition, axis=-1, root=0):
        """The parts of all ranks put together along `axis` on root, None elsewhere: MPI_Gatherv, (P-1)/P n bytes."""
        self._enter(self._describe_part, "gather", x, partition, axis, root)
        shape, counts = _whole(x, partition, axis)
        received = self.xp.empty(prod(shape), x.dtype) if self.rank == root else None
        with self._record("gather", x, elements=prod(shape)):
            self.transport.gather(_raw(_flat(x)), None if received is None else _raw(received), counts, root)
        return None if received is None else self._assemble(received, counts, shape, partition, axis)

    def reduce_scatter(self, x, partition, axis=-1, op="sum"):
        """This rank's range along `axis` of the sum (max, min) of x: MPI_Reduce_scatter, (P-1)/P n bytes a rank.

        The bits of a sum depend on the number of ranks.
        """
        self._enter(self._describe_whole, "reduce_scatter", x, partition, axis, op)
        rows = self.xp.moveaxis(x, axis, 0)
        send = _flat(rows).astype(_wire_dtype(x), copy=False)
        mine = self.xp.empty((partition.lengths[self.rank], *rows.shape[1:]), send.dtype)
        counts = [length * prod(rows.shape[1:]) for length in partition.lengths]
        with self._record("reduce_scatter", x):
            self.transport.reduce_scatter(send, mine.reshape(-1), counts, op)
        return self.xp.ascontiguousarray(self.xp.moveaxis(mine, 0, axis).astype(x.dtype, copy=False))

    def broadcast(self, x, root=0):
        """Root's x, as a new array on every rank: MPI_Bcast. Elsewhere x only says shape and dtype."""
        self._enter(self._describe_broadcast, x, root)
        out = self.xp.array(x, order="C")
        with self._record("broadcast", out):
            self.transport.broadcast(_raw(out.reshape(-1)), root)
        return out

    # --- what each rank checks first; _describe_...() return what this rank is about to do ------------------

    def _enter(self, describe, *arguments):
        """Call describe(*arguments), which refuses bad input; with check=True on all ranks, comparing what they return."""
        if not self.check:
            describe(*arguments)
            return
        with self.ledger.record_control("agreement", wire_bytes("all_reduce", 2, 8, self.size)):
            agreement.require_everywhere(self.comm, "a collective", lambda: " ".join(map(str, describe(*arguments))))

    def _require_array(self, operation, x, op="sum"):
        if module_of(x) is not self.xp:
            raise InputError(f"{operation}: found {type(x).__module__}.{type(x).__name__}, expected an array of "
                             f"{self.xp.__name__} (the group's device is {self.device!r})")
        if dtype_name(x.dtype) not in DTYPES:
            raise InputError(f"found {operation} of {x.dtype}, expected one of {', '.join(DTYPES)}")
        if op not in OPERATIONS:
            raise InputError(f"found {operation} operation {op!r}, expected one of {', '.join(OPERATIONS)}")

    def _describe_reduction(self, operation, x, op, out):
        self._require_array(operation, x, op)
        if out is not None:
            alike = out is x or module_of(out) is self.xp and out.shape == x.shape and out.dtype == x.dtype
            if not alike or not out.flags.c_contiguous:
                raise InputError(f"found out {getattr(out, 'dtype', type(out).__name__)} {getattr(out, 'shape', '')}, "
                                 f"expected a C-contiguous {x.dtype} {x.shape}")
        return operation, op, x.dtype, x.shape, agreement.memory_order(x)

    def _axis(self, operation, x, partition, axis):
        """The axis counted from the front."""
        if not -x.ndim <= axis < x.ndim:
            raise InputError(f"found {operation} along axis {axis} of shape {x.shape}, expected an axis that it has")
        self._require_partition(operation, partition)
        return axis % x.ndim

    def _require_partition(self, operation, partition):
        if partition.ranks != self.size:
            raise InputError(f"found {operation} over {partition}, expected one of this group's {self.size} ranks")

    def _describe_part(self, operation, x, partition, axis, root=None):
        self._require_array(operation, x)
        axis = self._axis(operation, x, partition, axis)
        if root is not None:
            self._require_root(operation, root)
            operation = f"{operation} to {root}"
        if x.shape[axis] != partition.lengths[self.rank]:
            raise InputError(f"found {operation} of shape {x.shape}, expected {partition.lengths[self.rank]} along "
                             f"axis {axis} on rank {self.rank}, its part of {partition.size}")
        return operation, x.dtype, _whole(x, partition, axis)[0], "axis", axis, partition

    def _describe_whole(self, operation, x, partition, axis, op):
        self._require_array(operation, x, op)
        axis = self._axis(operation, x, partition, axis)
        if x.shape[axis] != partition.size:
            raise InputError(f"found {operation} of shape {x.shape}, expected {partition.size} along axis {axis}")
        return operation, op, x.dtype, x.shape, agreement.memory_order(x), "axis", axis, partition

    def _describe_broadcast(self, x, root):
        self._require_array("broadcast", x)
        self._require_root("broadcast", root)
        return "broadcast from", root, x.dtype, x.shape, agreement.memory_order(x)

    def _require_root(self, operation, root):
        if not 0 <= root < self.size:
            raise InputError(f"found {operation} with root {root}, expected a rank from 0 to {self.size - 1}")

    # --- what they share -----------------------------------------------------------------------------------

    def _record(self, operation, x, elements=None):
        elements = x.size if elements is None else elements
        name = dtype_name(x.dtype)
        widened = name in SENT_AS_FLOAT32 and operation in ("all_reduce", "reduce_scatter")
        return self.ledger.record_data(Collective(operation, elements, name),
                                       wire_bytes(operation, elements, 4 if widened else x.itemsize, self.size))

    def _prepare_reduction(self, operation, x, op, out):
        """Where the result goes, and the array that travels: `out` itself or a float32 copy of a 16-bit x."""
        self._enter(self._describe_reduction, operation, x, op, out)
        if out is None:
            out = self.xp.empty(x.shape, x.dtype)
        if dtype_name(x.dtype) in SENT_AS_FLOAT32:
            return out, x.astype(self.xp.float32, order="C")
        if out is not x:
            out[...] = x
        return out, out

    def _assemble(self, received, counts, shape, partition, axis):
        """The parts, which lie one after the other as the ranks sent them, side by side along `axis`."""
        axis = axis % len(shape)
        if prod(shape[:axis]) == 1:                 # along the first axis that is longer than 1 they do already
            return received.reshape(shape)
        whole = self.xp.empty(shape, received.dtype)
        start = 0
        for rank, count in enumerate(counts):
            window = (slice(None),) * axis + (partition.range(rank),)
            part = whole[window]
            part[...] = received[start:start + count].reshape(part.shape)
            start += count
        return whole


class PendingReduction:
    """An all-reduce under way. wait() finishes it, once, and returns the result."""

    def __init__(self, group, finish, x, wire, out):
        self.group, self.finish, self.x, self.wire, self.out = group, finish, x, wire, out

    def wait(self):
        if self.finish is not None:
            with self.group._record("all_reduce", self.x):
                self.finish()
            self.finish = None
            _deliver(self.wire, self.out)
        return self.out


def _deliver(wire, out):
    if wire is not out:
        out[...] = wire                             # 16-bit: rounded once, after the sum
    return out


def _whole(x, partition, axis):
    """Shape of the array whose parts are gathered, and the elements that each rank contributes."""
    shape = list(x.shape)
    shape[axis] = 1
    others = prod(shape)
    shape[axis] = partition.size
    return tuple(shape), [length * others for length in partition.lengths]


def _flat(x):
    return x.reshape(-1) if x.flags.c_contiguous else module_of(x).ascontiguousarray(x).reshape(-1)


def _raw(flat):
    """The same bytes under a dtype that MPI knows, for operations that only move them."""
    return flat.view("uint16") if dtype_name(flat.dtype) in SENT_AS_FLOAT32 else flat


def _wire_dtype(x):
    return "float32" if dtype_name(x.dtype) in SENT_AS_FLOAT32 else x.dtype
