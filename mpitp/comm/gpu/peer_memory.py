"""Memory of the GPUs of one node that their ranks write to, and the kernels that do: what transport `peer` stands on.

Set up over MPI with CUDA's IPC handles, and tried before it is used: containers may forbid it.
"""
import os
from types import ModuleType
from typing import Any

import numpy as np
from mpi4py import MPI

from ...arrays import DeviceArray
from ...errors import InputError
from ..ledger import dtype_name
from . import peer_kernels
from .binding import Gpu
from .nccl import key_of
from .peer_kernels import MOST_RANKS, Order

PATIENCE = 300.0        # seconds that a kernel waits for another rank's; MPITP_PEER_SECONDS stands in
TRIAL_PATIENCE = 5.0    # and in the trial
NOTHING = (np.uint64(0),)               # the summands of a rank without any
MOVED = {2: "uint16", 4: "int32", 8: "int64"}       # what arrays that are only moved are taken for
EIGHT_BYTES = ("float64", "int64")      # of a summand; the others have 4
# {(ranks of the world, their devices): Peers, or why there are none}: groups of the same ranks share them, as NCCL's.
_peers: dict[Any, Any] = {}


def patience() -> float:
    """Return the seconds that a kernel waits for another rank's. Raises InputError unless they are positive."""
    text = os.environ.get("MPITP_PEER_SECONDS", str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InputError(f"found MPITP_PEER_SECONDS={text}, expected seconds, above 0")
    return seconds


def peers(comm: MPI.Comm, cupy: ModuleType, gpu: Gpu, share: bool = False) -> "Peers | str":
    """Return what the ranks of comm share, or why their GPUs cannot write to each other. Collective.

    Parameters
    ----------
    comm : mpi4py communicator
    cupy : module
    gpu : Gpu
        This rank's.
    share : bool
        Whether ranks may share a GPU. The kernels of two processes take turns there, some milliseconds each.
    """
    obstacle = next(filter(None, comm.allgather(own_obstacle(comm, cupy, gpu, share))), None)
    if obstacle:
        return obstacle
    key = key_of(comm, cupy)
    if key not in _peers or MPI.UNDEFINED in key[0]:
        made = Peers(comm, cupy)
        _peers[key] = made.problem or made
    return _peers[key]


def own_obstacle(comm: MPI.Comm, cupy: ModuleType, gpu: Gpu, share: bool) -> str | None:
    """Say what keeps this rank's GPU from being written to, as far as it is known before the trial. Collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks_of_node = node.size
    node.Free()
    gpus = comm.allgather((gpu.uuid, gpu.name))
    if comm.size > MOST_RANKS:
        return f"{comm.size} ranks, of which GPUs write to each other up to {MOST_RANKS}"
    if ranks_of_node < comm.size:
        return "ranks on several nodes, whose GPUs do not write to each other"
    if gpu.shared and not share:
        return f"ranks that share a GPU ({gpu.name}), which would wait for each other's kernels"
    names = sorted({name for _, name in gpus})
    if len(names) > 1:
        return f"GPUs of different kinds ({', '.join(names)})"
    runtime = cupy.cuda.runtime
    for number in range(runtime.getDeviceCount()):         # a launcher may hide the others: then the trial decides
        uuid = runtime.getDeviceProperties(number)["uuid"].hex()
        if uuid != gpu.uuid and uuid in {other for other, _ in gpus} and \
                not runtime.deviceCanAccessPeer(gpu.number, number):
            return f"GPUs without peer access ({gpu.number} and {number} of {gpu.name})"
    return None


class Peers:
    """What ranks share: a buffer of each, mapped into all of their processes, and the kernels of each sum.

    The constructor is collective. `problem` says why it cannot be had, on every rank, else it is None. It stays as long
    as the process.

    Parameters
    ----------
    comm : mpi4py communicator
        Of ranks of one node, each with a GPU.
    cupy : module
    """

    def __init__(self, comm: MPI.Comm, cupy: ModuleType) -> None:
        self.cupy, self.rank, self.size = cupy, comm.rank, comm.size
        self.kernels: dict[Any, Any] = {}
        self.plans: dict[Any, tuple] = {}
        self.of_ranks = peer_kernels.order_of_ranks(comm.size)
        self.under_way: Any = None              # the end of a sum on another stream: the next one comes behind it
        nanoseconds = int(patience() * 1e9)
        handle, self.problem = None, None
        try:
            handle = self.allocate()
        except Exception as error:              # CuPy's own: too little memory, no IPC
            self.problem = f"{type(error).__name__}: {error}"
        handles = comm.allgather(handle)
        if self.problem is None and None not in handles:
            try:
                self.map_all(handles)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
        self.problem = self.agreed(comm, self.problem)
        if self.problem is None:
            self.tail = (*self.places, self.ticks, self.error_at, np.uint64(nanoseconds))
            self.problem = self.agreed(comm, self.tried(comm))

    def agreed(self, comm: MPI.Comm, problem: str | None) -> str | None:
        """Return the first rank's problem. Collective."""
        found = [(rank, text) for rank, text in enumerate(comm.allgather(problem)) if text]
        return f"memory that GPUs cannot share (rank {found[0][0]}: {found[0][1]})" if found else None

    def allocate(self) -> bytes:
        """Make this rank's buffer, with memory of its own, not of a pool. Returns the handle for the other ranks."""
        runtime = self.cupy.cuda.runtime
        size = peer_kernels.memory_bytes(self.size)
        self.own = runtime.malloc(size)
        runtime.memset(self.own, 0, size)
        self.ticks = self.cupy.zeros(peer_kernels.BLOCKS + peer_kernels.SHARE_BLOCKS, "uint32")
        self.error = self.cupy.cuda.alloc_pinned_memory(8)      # the host reads it when the device no longer answers
        self.gave_up = np.frombuffer(self.error, np.uint32, 1)
        self.gave_up[0] = 0
        self.error_at = np.uint64(self.error.ptr)
        runtime.deviceSynchronize()
        return runtime.ipcGetMemHandle(self.own)

    def map_all(self, handles: list[bytes]) -> None:
        """Map the buffers of the other ranks."""
        runtime = self.cupy.cuda.runtime
        self.places = tuple(np.uint64(self.own if rank == self.rank else runtime.ipcOpenMemHandle(handle, 1))
                            for rank, handle in enumerate(handles))

    def tried(self, comm: MPI.Comm) -> str | None:
        """Let every rank write to every other one, and say whose writing did not arrive. Collective."""
        try:
            kernel = self.kernel("trial", "float32", self.of_ranks)
            arrived = self.cupy.zeros(self.size, "uint32")
            kernel.compile()
        except Exception as error:
            kernel, problem = None, f"{type(error).__name__}: {error}"
        if not all(comm.allgather(kernel is not None)):
            return problem if kernel is None else None
        try:
            kernel((1,), (32,), (np.uint32(1), arrived, *self.tail[:-1], np.uint64(int(TRIAL_PATIENCE * 1e9))))
            missing = [rank for rank, there in enumerate(arrived.get().tolist()) if not there]
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return f"nothing of rank {missing[0]} arrived within {TRIAL_PATIENCE:g} s" if missing else None

    def kernel(self, name: str, dtype_name: str, order: Order) -> Any:
        """Return a kernel for results of a dtype, which adds up in this order."""
        key = name, dtype_name, order
        if key not in self.kernels:
            from ...ops.cuda.kernel import ROUND
            types = peer_kernels.TYPES.get(dtype_name) or ROUND[dtype_name]
            code = peer_kernels.source(name, types, self.rank, order)
            self.kernels[key] = self.cupy.RawKernel(code, name, options=("--std=c++14",))
        return self.kernels[key]

    def wait_for_others(self) -> None:
        """Let the current stream wait for a sum that another one was given: the kernels of all follow each other."""
        if self.under_way is not None:
            self.cupy.cuda.get_current_stream().wait_event(self.under_way)
            self.under_way = None

    def sum_words(self, summands: list[DeviceArray], y: DeviceArray, order: Order) -> None:
        """y = the total of everybody's summands, few bytes."""
        if self.under_way is not None:
            self.wait_for_others()
        kernel, grid, threads, n, width = self.plans.get((y.size, y.dtype, order)) or self.plan_words(y, order)
        kernel(grid, threads, (*(summands or NOTHING), y, n, width, *self.tail))

    def plan_words(self, y: DeviceArray, order: Order) -> tuple:
        """Return how sum_words is called for arrays like y, and keep it: a token's sums take microseconds."""
        name = dtype_name(y.dtype)
        blocks, threads, width = peer_kernels.words_grid(y.size if name in EIGHT_BYTES else -(-y.size // 2))
        plan = self.kernel("sum_words", name, order), (blocks,), (threads,), np.int64(y.size), np.int32(width)
        self.plans[y.size, y.dtype, order] = plan
        return plan

    def sum_shares(self, summands: list[DeviceArray], y: DeviceArray, order: Order, most_blocks: int) -> None:
        """y = the total of everybody's summands, many float32; rounded to 16 bits where y has those."""
        self.wait_for_others()
        blocks, threads, width = peer_kernels.shares_grid(y.size, self.size, most_blocks)
        self.kernel("sum_shares", dtype_name(y.dtype), order)((blocks,), (threads,), (
            *(summands or NOTHING), y, np.int64(y.size), np.int32(width), *self.tail))

    def gather_words(self, x: DeviceArray, y: DeviceArray | None, counts: list[int], to: int) -> None:
        """y = everybody's x, one after the other, few bytes; x goes to the ranks in the mask `to`."""
        self.wait_for_others()
        words = -(-max(counts) * x.itemsize // 8)
        if words:
            blocks, threads, width = peer_kernels.words_grid(words)
            self.kernel("gather_words", MOVED[x.itemsize], self.of_ranks)((blocks,), (threads,), (
                x, np.uint64(0) if y is None else y, np.int32(to), np.int64(words), np.int32(width),
                *map(np.int64, counts), *self.tail))


def gave_up() -> str | None:
    """Return a line where a kernel of this process waited for another rank longer than it may, else None."""
    if any(isinstance(found, Peers) and found.gave_up[0] for found in _peers.values()):
        return f"found no answer of another rank's GPU within {patience():g} s, expected one: a rank hangs, or is " \
               "slower than MPITP_PEER_SECONDS allows\n"
    return None
