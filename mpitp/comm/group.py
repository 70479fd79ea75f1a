"""The ranks that share a layer: what every layer is handed."""
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from operator import index
from types import TracebackType
from typing import Any, TypeVar

from mpi4py import MPI

from ..arrays import COMPUTE_DTYPES, GPU_DTYPES, array_module
from ..errors import InputError, require, require_positive
from ..sharding.parameters import Place
from ..sharding.partition import Partition
from .collectives import Collectives
from .ledger import Ledger
from .mpi import host_transport, requested_transport
from .sums import Sum, Sums

T = TypeVar("T")


@dataclass(frozen=True)
class GroupOptions:
    """What a group is made with beside its communicator; the parameters of TensorParallelGroup, which explains them."""
    device: str = "cpu"
    reproducible: bool = False
    blocks: int = 8
    check: bool = False
    transport: str = "auto"
    gpu: int | None = None
    share_gpu: bool = False
    tf32: bool = False


class TensorParallelGroup(Collectives, Sums):
    """A group of the ranks of a communicator that share layers: who they are, and how they add up.

    Parameters
    ----------
    comm : mpi4py communicator, optional
        Default MPI.COMM_WORLD. The group works on a duplicate of its own.
    device : str
        "cpu" (NumPy) or "gpu" (CuPy).
    reproducible : bool
        The same bits for any number of ranks: sharded dimensions are cut into `blocks` blocks whatever that number is,
        each is computed by one BLAS thread, and `sum` adds them up in one fixed tree.
    blocks : int
        How many in reproducible mode; otherwise there is one a rank.
    check : bool
        Prove before every collective that all ranks mean the same one (16 bytes more each).
    transport : str
        "auto", "mpi", "nccl", "staged" or "peer"; MPITP_TRANSPORT stands in for "auto".
    gpu : int, optional
        Number of the device. None: the rank's number on its node, modulo the devices visible.
    share_gpu : bool
        Whether ranks may share a GPU; MPITP_SHARE_GPU=1 stands in.
    tf32 : bool
        Whether float32 products on the GPU round their factors to TF32, a setting of the process.

    Attributes
    ----------
    rank, size : int
        Of this process, of the group.
    place : Place
        (rank, size, blocks): what decides which part of a parameter this rank holds.
    xp : module
        The array module, numpy or cupy.
    transport : object
        What carries; its `name`, and `how`: why it is that one.
    ledger : Ledger
        The record of every collective.

    Raises
    ------
    InputError
        On every rank, for an unknown device, a missing CuPy, a launcher of another MPI than mpi4py's, ranks that
        disagree on these arguments or, in reproducible mode, run on different kinds of machine.

    Notes
    -----
    Collective: the constructor, close(), and every method that communicates. As a context manager the group ends
    the whole job when the body, or a thread meanwhile, raises on any rank, instead of leaving the others waiting.
    Bad input that every rank finds leaves the body as the InputError that it is.
    """

    def __init__(self, comm: MPI.Comm | None = None, *, device: str = "cpu", reproducible: bool = False,
                 blocks: int = 8, check: bool = False, transport: str = "auto", gpu: int | None = None,
                 share_gpu: bool = False, tf32: bool = False):
        if comm is None or comm == MPI.COMM_WORLD:
            from .launch import join_world
            comm = join_world()
        self.comm = comm.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.options = GroupOptions(device, bool(reproducible), blocks, bool(check), transport, gpu, share_gpu,
                                    bool(tf32))
        self.device, self.reproducible, self.check = device, bool(reproducible), bool(check)
        self.tf32, self.ledger = bool(tf32), Ledger()
        self.gpu: Any = None
        self.workers: Any = None
        self.watch: Any = None
        self.pending: list = []                     # reductions that were begun and not waited for
        self._give_back_threads: Callable[[], None] | None = None
        from .agreement import require_everywhere
        try:
            require_everywhere(self.comm, "the group's arguments", self._describe_arguments)
            if self.size > 1 and os.environ.get("MPITP_STALL_LIMIT") != "0":
                from .watchdog import watch
                self.watch = watch(self.comm, self.ledger)
            self.blocks = int(blocks) if self.reproducible else self.size
            self.place = Place(self.rank, self.size, self.blocks)
            self.summed_dtypes = COMPUTE_DTYPES if device == "cpu" else GPU_DTYPES
            self.transport = host_transport(self.comm, transport) if device == "cpu" else self._gpu_transport()
            self.ledger.transport = self.transport.name
            # Whether sums can be under way while the device computes.
            self.overlaps = self.transport.overlaps and self.size > 1 and not self.reproducible
            self.sum_class = getattr(self.transport, "sums", (Sum,))[0]
            if self.reproducible:
                from .reproducible import hold_bits
                self._give_back_threads = hold_bits(self)
        except InputError:                          # raised on every rank
            self._release()
            raise

    def _describe_arguments(self) -> str:
        asked = self.options
        require_positive(blocks=asked.blocks)
        require(self.device != "cpu" or not asked.tf32, "tf32 on device 'cpu'", "device 'gpu', which has it")
        self.xp = array_module(self.device)
        transport, stall = requested_transport(asked.transport), os.environ.get("MPITP_STALL_LIMIT", "")
        return f"device={self.device!r} reproducible={self.reproducible} blocks={int(asked.blocks)} " \
               f"check={self.check}{'' if transport == 'auto' else f' transport={transport}'}" \
               f"{' tf32' if asked.tf32 else ''}{f' MPITP_STALL_LIMIT={stall}' if stall else ''}"

    def _gpu_transport(self) -> Any:
        """Make one GPU this rank's own, and choose what carries. Imported here: GPUs are not everywhere."""
        from .gpu.binding import bind
        from .gpu.choose import choose_transport
        share = self.options.share_gpu or os.environ.get("MPITP_SHARE_GPU") == "1"
        self.gpu = bind(self.comm, self.xp, self.options.gpu, share, self.options.tf32)
        return choose_transport(self.comm, self.xp, self.gpu, self.options.transport)

    def _release(self) -> None:
        if self.workers:
            self.workers.close()
        if self._give_back_threads:
            self._give_back_threads()
        if self.watch:
            self.watch.remove(self.ledger)
        self.comm.Free()
        self.ledger.thread = None               # whose collectives are refused from now on: everybody's

    def partition(self, size: int, unit: int = 1, share: int = 1) -> Partition:
        """Return how a dimension of `size` is split over this group; unit, share: as Partition's."""
        return self.place.partition(index(size), index(unit), index(share))     # NumPy's integers print otherwise

    def subgroup(self, color: int | None, key: int = 0) -> "TensorParallelGroup | None":
        """Return the group of the ranks that give the same color, ordered by key; None for color None.

        Collective: MPI_Comm_split. The subgroup has this group's options.
        """
        self._begin("subgroup")
        part = self.comm.Split(MPI.UNDEFINED if color is None else color, key)
        if part == MPI.COMM_NULL:
            return None
        try:
            group = TensorParallelGroup(part, **asdict(replace(
                self.options, transport=self.transport.name, gpu=self.gpu and self.gpu.number, share_gpu=True)))
        finally:
            part.Free()
        if self.workers:
            group.workers.count = self.workers.count        # the other subgroups share the cores too
        return group

    def report(self, value: T) -> list[T] | None:
        """Return the values of all ranks as a list on rank 0, None elsewhere: any picklable values, for tables."""
        with self.ledger.record_control("report"):
            return self.comm.gather(value)

    def any(self, flag: object) -> bool:
        """Return whether the flag is set on any rank. Collective, control."""
        with self.ledger.record_control("any"):
            return bool(self.comm.allreduce(bool(flag), MPI.LOR))

    def on_root(self, function: Callable[[], T]) -> T | None:
        """Call function() on rank 0, and return its result there, None elsewhere. Collective, control.

        A ValueError or OSError of rank 0 becomes an InputError on every rank.
        """
        return self.root_first(function if self.rank == 0 else lambda: None)

    def root_first(self, function: Callable[[], T]) -> T:
        """Call function() on rank 0, and on the others only when it succeeded there. Returns each rank's own result.

        For reading what the user named: a ValueError or OSError of rank 0 becomes an InputError on every rank,
        before any of them enters a data collective.
        """
        result, problem = None, None
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as error:
                problem = str(error)
        with self.ledger.record_control("root_first"):
            problem = self.comm.bcast(problem)
        if problem is not None:
            raise InputError(problem)
        return result if self.rank == 0 else function()      # type: ignore[return-value]  # or it raised

    def close(self) -> None:
        """Free the communicator. Collective. With check=True it proves that all ranks are through."""
        if self.comm != MPI.COMM_NULL:
            self._begin("close")
            for begun in list(self.pending):
                begun.wait()
            self.transport.close()
            self._release()

    def __enter__(self) -> "TensorParallelGroup":
        from .guard import watch_threads
        self._outer_hook = watch_threads() if self.size > 1 else threading.excepthook
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        from .guard import leave
        threading.excepthook = self._outer_hook
        if error is None:
            try:
                return self.close()
            except InputError as early:             # the others go on
                leave(self, early)
                raise
        leave(self, error)
