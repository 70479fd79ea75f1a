"""Sums between GPUs: each transport that can be had against NCCL's own all-reduce, and the sum in a fixed order.

Three kinds of rows: calls from Python; many calls in one CUDA graph, divided by their number; 16-bit results of float32
summands, against NCCL's all-reduce of the 16-bit array, also in graphs.
"""
import cupy

import mpitp
from mpitp.arrays import compute_dtype
from mpitp.errors import InputError

SIZES = [8 << shift for shift in (0, 7, 10, 14, 17, 20, 22, 24)]       # 8 B to 128 MiB
IN_GRAPHS = [8, 8 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
ROUNDED = [1 << 20, 16 << 20, 64 << 20, 128 << 20]                      # bytes of the 16-bit result


def recorded(function, times):
    """A function that replays a CUDA graph of so many calls."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        function()
        stream.synchronize()
        stream.begin_capture()
        for _ in range(times):
            function()
        graph = stream.end_capture()
    return lambda: graph.launch(cupy.cuda.get_current_stream())


class Nccl:
    """NCCL itself, without the library."""

    def __init__(self, comm):
        self.nccl = cupy.cuda.nccl
        identity = comm.bcast(self.nccl.get_unique_id() if comm.rank == 0 else None)
        self.comm = self.nccl.NcclCommunicator(comm.size, identity, comm.rank)

    def all_reduce(self, x, kind):
        """x becomes the sum over the ranks; kind : NCCL's name of its dtype"""
        self.comm.allReduce(x.data.ptr, x.data.ptr, x.size, getattr(self.nccl, kind), self.nccl.NCCL_SUM,
                            cupy.cuda.get_current_stream().ptr)


def groups_of_transports(comm):
    """{transport: group}, of those that can be had."""
    carriers = {}
    for name in ("peer", "mpi", "nccl", "staged"):
        try:
            carriers[name] = mpitp.TensorParallelGroup(comm, device="gpu", transport=name)
        except InputError as error:
            if comm.rank == 0:
                print(f"transport {name}: {error}")
    return carriers


def rows(rows, groups):
    comm = rows.group.comm
    if comm.size == 1:
        return
    carriers, nccl = groups_of_transports(comm), Nccl(comm)
    called(rows, carriers, nccl)
    in_graphs(rows, carriers, nccl)
    rounded(rows, carriers, nccl)
    ordered(rows, carriers, nccl)
    for group in carriers.values():
        group.close()


def called(rows, carriers, nccl):
    for size in SIZES:
        x = cupy.ones(size // 4, "float32")
        cases = {f"mpitp {name}": lambda group=group: group.all_reduce(x, out=x) for name, group in carriers.items()}
        rows.add(f"all-reduce of {size} B, float32", {**cases, "nccl": lambda: nccl.all_reduce(x, "NCCL_FLOAT32")})


def in_graphs(rows, carriers, nccl):
    for size in IN_GRAPHS:
        x, times = cupy.ones(size // 4, "float32"), 50 if size <= 4 << 20 else 5
        cases = {f"mpitp {name}": recorded(lambda group=group: group.transport.all_reduce(x, "sum"), times)
                 for name, group in carriers.items() if group.transport.records}
        rows.add(f"{times} all-reduces of {size} B in a graph, float32",
                 {**cases, "nccl": recorded(lambda: nccl.all_reduce(x, "NCCL_FLOAT32"), times)})


def rounded(rows, carriers, nccl):
    dtype = compute_dtype("bfloat16", "gpu")
    for size in ROUNDED:
        x, y, times = cupy.ones(size // 2, "float32"), cupy.ones(size // 2, "uint16"), 5
        cases = {}
        for name, group in carriers.items():
            if group.transport.records:
                partition = group.partition(group.size)
                block = next(iter(partition.blocks_of(group.rank)))

                def total(group=group, partition=partition, block=block):
                    found = group.sum(partition, x.shape, dtype)
                    found.add(block, x)
                    found.all_reduce()
                cases[f"mpitp {name}"] = recorded(total, times)
        cases["nccl"] = recorded(lambda: nccl.all_reduce(y, "NCCL_FLOAT16"), times)
        rows.add(f"{times} sums to {size} B of bfloat16 in a graph", cases)


def ordered(rows, carriers, nccl):
    x = cupy.ones(32 << 18, "float32")
    cases, ordering = {}, []
    for name, carrier in carriers.items():
        group = mpitp.TensorParallelGroup(carrier.comm, device="gpu", transport=name, reproducible=True)
        ordering.append(group)
        partition = group.partition(group.blocks)
        leaves = {block.index: x.copy() for block in partition.blocks_of(group.rank)}

        def total(group=group, partition=partition, leaves=leaves):
            found = group.sum(partition, x.shape, "float32")
            for block in partition.blocks_of(group.rank):
                found.add(block, leaves[block.index])
            found.all_reduce()
        cases[f"mpitp {name}"] = total
    cases["nccl"] = lambda: nccl.all_reduce(x, "NCCL_FLOAT32")
    rows.add("sum of 8 blocks of 32 MiB in a fixed order", cases)
    for group in ordering:
        group.close()
