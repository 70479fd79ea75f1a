"""The ranks that share a layer: what every layer is handed."""
import os
import threading

import numpy as np
from mpi4py import MPI

from ..arrays import COMPUTE_DTYPES, GPU_DTYPES, sum_dtype
from ..errors import InputError, require, require_positive
from ..sharding.partition import Partition
from . import agreement, guard, launch, tree
from .collectives import Collectives, dtype_name
from .gpu.aware import array_module
from .gpu.binding import bind
from .ledger import Collective, Ledger, wire_bytes
from .gpu.choose import choose_transport, requested
from .workers import Workers, do_nothing, one_blas_thread


class TensorParallelGroup(Collectives):
    """The ranks of a communicator as one tensor-parallel group: who they are, and how they add up.

    Parameters
    ----------
    comm : mpi4py communicator, default MPI.COMM_WORLD; the group works on a duplicate of its own
    device : "cpu" (NumPy) or "gpu" (CuPy)
    reproducible : the same bits for any number of ranks: sharded dimensions are cut into `blocks` blocks whatever
        that number is, each is computed by one BLAS thread, and sum_blocks adds them in one fixed tree
    blocks : how many in reproducible mode; otherwise there is one a rank
    check : prove before every collective that all ranks mean the same one (16 bytes more each)
    transport : "auto", "mpi", "nccl" or "staged", see transport.py; MPITP_TRANSPORT stands in for "auto"
    gpu : number of the device; None: the rank's number on its node, modulo the devices visible
    share_gpu : whether ranks may share a GPU; MPITP_SHARE_GPU=1 stands in
    tf32 : whether float32 products on the GPU round their factors to TF32, a setting of the process

    Attributes
    ----------
    rank, size : of this process, of the group
    xp : the array module, numpy or cupy
    transport : what carries; its `name`, and `how`: why it is that one
    ledger : the record of every collective

    Notes
    -----
    Collective: the constructor, close(), and every method that communicates. As a context manager the group ends
    the whole job when the body, or a thread meanwhile, raises on any rank, instead of leaving the others waiting.
    Bad input that every rank finds leaves the body as the InputError that it is.

    Raises
    ------
    InputError (a ValueError), on every rank, for an unknown device, a missing CuPy, a launcher of another MPI than
    mpi4py's, ranks that disagree on these arguments or, in reproducible mode, run on different kinds of machine.
    """

    def __init__(self, comm=None, *, device="cpu", reproducible=False, blocks=8, check=False,
                 transport="auto", gpu=None, share_gpu=False, tf32=False):
        if comm is None or comm == MPI.COMM_WORLD:
            launch.require_matching_launcher()
            comm = MPI.COMM_WORLD
        self.comm = comm.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.device, self.reproducible, self.check = device, bool(reproducible), bool(check)
        self.tf32, self.gpu = bool(tf32), None
        self.ledger = Ledger()
        self._workers, self._give_back_threads = Workers(1), do_nothing
        try:
            agreement.require_everywhere(self.comm, "the group's arguments",
                                         lambda: self._look_at_arguments(blocks, transport))
            self.blocks = int(blocks) if self.reproducible else self.size
            if device == "gpu":
                share_gpu = share_gpu or os.environ.get("MPITP_SHARE_GPU") == "1"
                self.gpu = bind(self.comm, self.xp, gpu, share_gpu, self.tf32)
            self.transport = choose_transport(self.comm, device, self.xp, self.gpu, transport)
            self.ledger.transport = self.transport.name
            if self.reproducible and device == "cpu":
                agreement.require_everywhere(self.comm, "the machine type, and with it the bits of a product",
                                             self._look_at_machine)
                self._workers = Workers(launch.share_of_cores(self.comm))
        except InputError:                          # on every rank alike
            self._give_back_threads()
            self.comm.Free()
            raise

    def _look_at_arguments(self, blocks, transport):
        require_positive(blocks=blocks)
        require(self.device != "cpu" or not self.tf32, "tf32 on device 'cpu'", "device 'gpu', which has it")
        self.xp = array_module(self.device)
        asked = requested(transport)
        return f"device={self.device!r} reproducible={self.reproducible} blocks={int(blocks)} check={self.check}" \
               f"{'' if asked == 'auto' else f' transport={asked}'}{' tf32' if self.tf32 else ''}"

    def _look_at_machine(self):
        self._give_back_threads = one_blas_thread()
        return launch.machine()

    def partition(self, size, unit=1, share=1):
        """How a dimension of `size` is split over this group; unit, share: as Partition's."""
        return Partition(size, self.size, self.blocks, unit, share)

    def each_block(self, compute, partition):
        """Yield (block, compute(block)) for each block of this rank; spare cores work ahead in reproducible mode."""
        blocks = partition.blocks_of(self.rank)
        yield from zip(blocks, self.each(compute, blocks))

    def each(self, compute, items):
        """Yield compute(item) for each item, in order; spare cores work ahead in reproducible mode."""
        return self._workers.each(compute, items)

    def sum_blocks(self, compute, partition, shape, dtype, later=None):
        """The sum of compute(block) over all blocks of all ranks, on every rank.

        Ordinary mode: the one block of each rank, then an all-reduce in place: 2 (P-1)/P n bytes a rank, n the bytes
        of the summands. Reproducible mode: one fixed tree over the blocks (tree.py), the same bits for any P; as many
        bytes where P divides the blocks, up to twice as many elsewhere.

        Parameters
        ----------
        compute : function of a Block; returns a new C-contiguous array of `shape`, which is overwritten, of `dtype`.
            Where that has 16 bits the summands are float32, travel as such, and their sum is rounded once (the one
            summand of one rank in ordinary mode may have been rounded already). Not called for a block that holds
            nothing.
        later : list of functions, called once the sum is under way where the transport can add up meanwhile
            (`overlaps`), else after it. compute may append to it.
        """
        self._enter(self._look_at_sum, partition, shape, dtype)
        shape, dtype = tuple(shape), np.dtype(dtype)
        added = sum_dtype(dtype)
        if self.reproducible:
            fold = tree.Fold(partition, self.rank)
            for block, leaf in self.each_block(compute, partition):
                fold.add(block.index, self._checked(block, leaf, shape, added))
            total = self.xp.empty(shape, added)
            key = Collective("all_reduce", total.size, dtype_name(dtype))
            with self.ledger.record("data", key, tree.bytes_sent(partition, self.rank, total.size, total.itemsize)):
                tree.exchange(fold, self.rank, total.reshape(-1), self.transport)
        else:
            blocks = partition.blocks_of(self.rank)         # one or none, and one token's sum takes microseconds
            leaf = compute(blocks[0]) if blocks else self.xp.zeros(shape, added)
            if self.size == 1 and leaf.dtype == dtype:
                added = dtype
            total = self._checked(blocks[0], leaf, shape, added) if blocks else leaf
            key = Collective("all_reduce", total.size, dtype_name(dtype))       # now: a GPU is at work meanwhile
            with self.ledger.record("data", key, wire_bytes("all_reduce", total.size, total.itemsize, self.size)):
                if later and self.overlaps:
                    wait = self.transport.begin_all_reduce(total, "sum")
                    call_all(later)
                    wait()
                else:
                    self.transport.all_reduce(total, "sum")
        if later:
            call_all(later)
        return total if total.dtype == dtype else total.astype(dtype)

    @property
    def overlaps(self):
        """Whether this group's sums can be under way while the device computes."""
        return self.transport.overlaps and self.size > 1 and not self.reproducible

    def sum_own_blocks(self, compute, partition):
        """sum_blocks where this rank owns every block that holds anything: the same additions, no collective."""
        fold = tree.Fold(partition, self.rank)
        for block, leaf in self.each_block(compute, partition):
            fold.add(block.index, leaf)
        return tree.finish(fold.known, 0, tree.root_width(partition.blocks))

    def _look_at_sum(self, partition, shape, dtype):
        dtype = np.dtype(dtype)
        known = COMPUTE_DTYPES if self.device == "cpu" else GPU_DTYPES
        if dtype_name(dtype) not in known:
            raise InputError(f"found sum_blocks of {dtype}, expected one of {', '.join(known)}")
        self._look_at_partition("sum_blocks", partition)
        if not self.reproducible and partition.blocks != self.size:
            raise InputError(f"found sum_blocks over {partition}, expected one block a rank in ordinary mode")
        return "sum_blocks", dtype, tuple(map(int, shape)), partition

    def _checked(self, block, leaf, shape, dtype):
        if leaf.shape != shape or leaf.dtype != dtype or not leaf.flags.c_contiguous:
            raise InputError(f"found a partial result {leaf.dtype} {leaf.shape} in {agreement.memory_order(leaf)} "
                             f"order for block {block.index}, expected a C-contiguous {dtype} {shape}")
        return leaf

    def subgroup(self, color, key=0):
        """The group of the ranks that give the same color, ordered by key; None for color None. MPI_Comm_split."""
        part = self.comm.Split(MPI.UNDEFINED if color is None else color, key)
        if part == MPI.COMM_NULL:
            return None
        try:
            group = TensorParallelGroup(part, device=self.device, reproducible=self.reproducible,
                                        blocks=self.blocks if self.reproducible else 8, check=self.check,
                                        tf32=self.tf32, transport=self.transport.name,
                                        gpu=self.gpu and self.gpu.number, share_gpu=True)
        finally:
            part.Free()
        group._workers.count = self._workers.count          # the other subgroups share the cores too
        return group

    def report(self, value):
        """The values of all ranks as a list on rank 0, None elsewhere: for tables and messages, any picklable value."""
        with self.ledger.record("control", "report", 0):
            return self.comm.gather(value)

    def any(self, flag):
        """Whether the flag is set on any rank. Collective, control."""
        with self.ledger.record("control", "any", 0):
            return bool(self.comm.allreduce(bool(flag), MPI.LOR))

    def root_first(self, function):
        """function() on rank 0, and on the others only when it succeeded there. Returns each rank's own result.

        For reading what the user named: a ValueError or OSError of rank 0 becomes an InputError on every rank,
        before any of them enters a data collective.
        """
        result, problem = None, None
        if self.rank == 0:
            try:
                result = function()
            except (ValueError, OSError) as error:
                problem = str(error)
        with self.ledger.record("control", "root_first", 0):
            problem = self.comm.bcast(problem)
        if problem is not None:
            raise InputError(problem)
        return result if self.rank == 0 else function()

    def close(self):
        """Free the communicator. Collective. With check=True it proves that all ranks are through."""
        if self.comm != MPI.COMM_NULL:
            self._enter(lambda: ("close",))
            self._workers.close()
            self.transport.close()
            self._give_back_threads()
            self.comm.Free()

    def __enter__(self):
        self._outer_hook = guard.watch_threads() if self.size > 1 else threading.excepthook
        return self

    def __exit__(self, kind, error, trace):
        threading.excepthook = self._outer_hook
        if error is None:
            try:
                return self.close()
            except InputError as early:             # the others go on
                self._leave(early)
                raise
        self._leave(error)

    def _leave(self, error):
        """Let an error out of the body where it meets no rank that waits for this one; else end the job."""
        if guard.active or guard.succeeds(error):
            return                                  # guarded() ends the job; sys.exit(0) is no failure
        if self.size == 1 or isinstance(error, InputError) and guard.all_leave(self.comm):
            self.close()
        else:
            guard.abort(error)


def call_all(functions):
    """Call each and drop it: what it holds is freed."""
    while functions:
        functions.pop(0)()
