"""The collectives on arrays: shapes, dtypes and agreement are checked, bytes are counted, a transport carries.

n in the byte counts is the size in bytes of the whole (reduced, gathered) array, P the number of ranks.
"""
from math import prod
from threading import get_ident
from typing import TYPE_CHECKING, Any

from ..arrays import Array, is_writable, module_of
from ..errors import InputError
from ..sharding.partition import Partition
from .ledger import Collective, Recording, dtype_name, refuse_thread, wire_bytes
from .mpi import OPERATIONS

if TYPE_CHECKING:
    from .pending import PendingReduction

# float16 sums in MPI are 12 to 20 times slower than float32 ones, and there is no bfloat16: float32 travels.
SENT_AS_FLOAT32 = ("float16", "bfloat16")
DTYPES = ("float32", "float64", "int32", "int64") + SENT_AS_FLOAT32


class Collectives:
    """What a group can do together. Needs comm, rank, size, xp, transport, ledger and check from the group.

    Every method is collective, counts itself in the ledger, and raises InputError for something that is not an
    array of the group's device, for a dtype, operation, axis, root or partition that does not fit. With
    check=True it raises on every rank where one rank has bad input or the ranks disagree.
    """

    def all_reduce(self: Any, x: Array, op: str = "sum", out: Array | None = None) -> Array:
        """Return the sum (max, min) of x over the ranks, on every rank: MPI_Allreduce, 2 (P-1)/P n bytes a rank.

        Parameters
        ----------
        x : array
            The same shape and dtype on every rank; not changed unless `out` is x.
        op : str
            "sum", "max" or "min". Max and min may lose NaN: count non-finite values with a sum.
        out : array, optional
            C-contiguous, for the result; `out=x` works in place, twice as fast for large arrays.

        Notes
        -----
        The bits of a sum depend on the number of ranks; `sum` in reproducible mode is the sum that does not.
        """
        out, wire = self._prepare_reduction("all_reduce", x, op, out)
        with self._record("all_reduce", x):
            self.transport.all_reduce(wire, op)
        return self._deliver(wire, out)

    def begin_all_reduce(self: Any, x: Array, op: str = "sum", out: Array | None = None) -> "PendingReduction":
        """Start all_reduce(x, op, out). Returns an object whose wait() gives the result; `out` must rest until then.

        MPI_Iallreduce. Hardly any MPI makes progress while none of its functions runs: overlap is not a given.
        """
        from .pending import PendingReduction
        if get_ident() != self.ledger.thread:
            refuse_thread(self.ledger.thread)
        out, wire = self._prepare_reduction("begin_all_reduce", x, op, out)
        return PendingReduction(self, self.transport.begin_all_reduce(wire, op), x, wire, out)

    def all_gather(self: Any, x: Array, partition: Partition, axis: int = -1) -> Array:
        """Return the parts of all ranks put together along `axis`: MPI_Allgatherv, (P-1)/P n bytes a rank.

        x : array that along `axis` is this rank's range of `partition`; the other axes are the same everywhere
        """
        self._enter("all_gather", x, partition=partition, axis=axis, part=True)
        shape, counts = _whole(x, partition, axis)
        received = self.xp.empty(prod(shape), x.dtype)
        with self._record("all_gather", received):
            self.transport.all_gather(_raw(_flat(x)), _raw(received), counts)
        return self._assemble(received, counts, shape, partition, axis)

    def gather(self: Any, x: Array, partition: Partition, axis: int = -1, root: int = 0) -> Array | None:
        """Return the parts of all ranks put together on root, None elsewhere: MPI_Gatherv, (P-1)/P n bytes."""
        self._enter("gather", x, partition=partition, axis=axis, part=True, root=root)
        shape, counts = _whole(x, partition, axis)
        received = self.xp.empty(prod(shape), x.dtype) if self.rank == root else None
        with self._record("gather", x, elements=prod(shape)):
            self.transport.gather(_raw(_flat(x)), None if received is None else _raw(received), counts, root)
        return None if received is None else self._assemble(received, counts, shape, partition, axis)

    def reduce_scatter(self: Any, x: Array, partition: Partition, axis: int = -1, op: str = "sum") -> Array:
        """Return this rank's range along `axis` of the sum of x: MPI_Reduce_scatter, (P-1)/P n bytes a rank.

        The bits of a sum depend on the number of ranks.
        """
        self._enter("reduce_scatter", x, op, partition=partition, axis=axis)
        rows = self.xp.moveaxis(x, axis, 0)
        send = _flat(rows).astype(_wire_dtype(x), copy=False)
        mine = self.xp.empty((partition.lengths[self.rank], *rows.shape[1:]), send.dtype)
        counts = [length * prod(rows.shape[1:]) for length in partition.lengths]
        with self._record("reduce_scatter", x):
            self.transport.reduce_scatter(send, mine.reshape(-1), counts, op)
        return self.xp.ascontiguousarray(self.xp.moveaxis(mine, 0, axis).astype(x.dtype, copy=False))

    def broadcast(self: Any, x: Array, root: int = 0) -> Array:
        """Return root's x, as a new array on every rank: MPI_Bcast. Elsewhere x only says shape and dtype."""
        self._enter("broadcast", x, root=root)
        out = self.xp.array(x, order="C")
        with self._record("broadcast", out):
            self.transport.broadcast(_raw(out.reshape(-1)), root)
        return out

    # --- what each rank checks first ----------------------------------------------------------------------------

    def _enter(self: Any, operation: str, *arguments: Any, **options: Any) -> None:
        """Refuse bad input of this rank; with check=True on all ranks, which must be about to do the same."""
        if self.check:
            self._agree(self._describe, operation, *arguments, **options)
        else:
            self._describe(operation, *arguments, **options)

    def _begin(self: Any, name: str) -> None:
        """Refuse another thread than the group's; with check=True compare the name on all ranks."""
        if get_ident() != self.ledger.thread:
            refuse_thread(self.ledger.thread)
        if self.check:
            self._agree(tuple, [name])

    def _agree(self: Any, describe: Any, *arguments: Any, **options: Any) -> None:
        """Compare what describe(...) returns on each rank. Collective: 16 bytes."""
        from .agreement import require_everywhere
        with self.ledger.record_control("agreement", wire_bytes("all_reduce", 2, 8, self.size)):
            require_everywhere(self.comm, "a collective", lambda: " ".join(map(str, describe(*arguments, **options))))

    def _describe(self: Any, operation: str, x: Array, op: str | None = None, out: Array | None = None, *,
                  partition: Partition | None = None, axis: int = 0, part: bool = False,
                  root: int | None = None) -> tuple:
        """Return what this rank is about to do, for comparison. Raises InputError for bad input.

        part : whether x is this rank's range of `partition` along `axis`, not the whole
        """
        if module_of(x) is not self.xp:
            raise InputError(f"{operation}: found {type(x).__module__}.{type(x).__name__}, expected an array of "
                             f"{self.xp.__name__} (the group's device is {self.device!r})")
        if dtype_name(x.dtype) not in DTYPES:
            raise InputError(f"found {operation} of {x.dtype}, expected one of {', '.join(DTYPES)}")
        if op is not None and op not in OPERATIONS:
            raise InputError(f"found {operation} operation {op!r}, expected one of {', '.join(OPERATIONS)}")
        if out is not None:
            fits = module_of(out) is self.xp and out.shape == x.shape and out.dtype == x.dtype
            if not fits or not is_writable(out):
                raise InputError(f"found out {getattr(out, 'dtype', type(out).__name__)} {getattr(out, 'shape', '')}, "
                                 f"expected a C-contiguous {x.dtype} {x.shape}, aligned and writable")
        if root is not None and not 0 <= root < self.size:
            raise InputError(f"found {operation} with root {root}, expected a rank from 0 to {self.size - 1}")
        what = operation + ("" if root is None else f" root {root}") + ("" if op is None else f" {op}")
        if partition is None:
            return what, x.dtype, x.shape
        if not -x.ndim <= axis < x.ndim:
            raise InputError(f"found {operation} along axis {axis} of shape {x.shape}, expected an axis that it has")
        self._require_partition(operation, partition)
        length = partition.lengths[self.rank] if part else partition.size
        if x.shape[axis] != length:
            whose = f" on rank {self.rank}, its part of {partition.size}" if part else ""
            raise InputError(f"found {operation} of shape {x.shape}, expected {length} along axis {axis % x.ndim}"
                             f"{whose}")
        return what, x.dtype, _whole(x, partition, axis)[0], "axis", axis % x.ndim, partition

    def _require_partition(self: Any, operation: str, partition: Partition) -> None:
        if partition.ranks != self.size:
            raise InputError(f"found {operation} over {partition}, expected one of this group's {self.size} ranks")

    # --- what they share -----------------------------------------------------------------------------------

    def _record(self: Any, operation: str, x: Array, elements: int | None = None) -> Recording:
        elements = x.size if elements is None else elements
        name = dtype_name(x.dtype)
        widened = name in SENT_AS_FLOAT32 and operation in ("all_reduce", "reduce_scatter")
        return self.ledger.record_data(Collective(operation, elements, name),
                                       wire_bytes(operation, elements, 4 if widened else x.itemsize, self.size))

    def _prepare_reduction(self: Any, operation: str, x: Array, op: str, out: Array | None) -> tuple[Array, Array]:
        """Return where the result goes, and the array that travels: `out` itself or a float32 copy of a 16-bit x."""
        self._enter(operation, x, op, out)
        out = self.xp.empty(x.shape, x.dtype) if out is None else out
        if dtype_name(x.dtype) in SENT_AS_FLOAT32:
            return out, x.astype(self.xp.float32, order="C")
        if out is not x:
            out[...] = x
        return out, out

    def _deliver(self: Any, wire: Array, out: Array) -> Array:
        """Return the result in `out`, out of the array that travelled."""
        if wire is not out:
            out[...] = wire                         # 16-bit: rounded once, after the sum
        return out

    def _assemble(self: Any, received: Array, counts: list[int], shape: tuple[int, ...], partition: Partition,
                  axis: int) -> Array:
        """Return the parts, which lie one after the other as the ranks sent them, side by side along `axis`."""
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


def _whole(x: Array, partition: Partition, axis: int) -> tuple[tuple[int, ...], list[int]]:
    """Return the shape of the array whose parts are gathered, and the elements that each rank contributes."""
    shape = list(x.shape)
    shape[axis] = 1
    others = prod(shape)
    shape[axis] = partition.size
    return tuple(shape), [length * others for length in partition.lengths]


def _flat(x: Array) -> Array:
    xp: Any = module_of(x)
    as_it_lies = x.flags.c_contiguous and getattr(x.flags, "aligned", True)      # MPI has no type for unaligned numbers
    return (x if as_it_lies else xp.array(x, order="C")).reshape(-1)


def _raw(flat: Array) -> Array:
    """Return the same bytes under a dtype that MPI knows, for operations that only move them."""
    return flat.view("uint16") if dtype_name(flat.dtype) in SENT_AS_FLOAT32 else flat


def _wire_dtype(x: Array) -> Any:
    return "float32" if dtype_name(x.dtype) in SENT_AS_FLOAT32 else x.dtype
