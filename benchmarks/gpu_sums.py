"""Sums between GPUs: each transport that can be had against NCCL's own all-reduce, and the sum in a fixed order."""
import cupy
import mpitp
from mpitp.errors import InputError

SIZES = [8 << shift for shift in (0, 7, 10, 14, 17, 20, 22, 24)]       # 8 B to 128 MiB


def rows(rows, groups):
    comm = rows.group.comm
    if comm.size == 1:
        return
    carriers = {}
    for name in ("mpi", "nccl", "staged"):
        try:
            carriers[name] = mpitp.TensorParallelGroup(comm, device="gpu", transport=name)
        except InputError as error:
            if comm.rank == 0:
                print(f"transport {name}: {error}")
    bare = cupy.cuda.nccl
    identity = comm.bcast(bare.get_unique_id() if comm.rank == 0 else None)
    nccl = bare.NcclCommunicator(comm.size, identity, comm.rank)
    for size in SIZES:
        x = cupy.ones(size // 4, "float32")

        def own():
            nccl.allReduce(x.data.ptr, x.data.ptr, x.size, bare.NCCL_FLOAT32, bare.NCCL_SUM,
                           cupy.cuda.get_current_stream().ptr)
        cases = {f"mpitp {name}": lambda group=group: group.all_reduce(x, out=x) for name, group in carriers.items()}
        rows.add(f"all-reduce of {size} B, float32", {**cases, "nccl": own})
    x = cupy.ones(32 << 18, "float32")
    cases, ordering = {}, []
    for name in carriers:
        group = mpitp.TensorParallelGroup(comm, device="gpu", transport=name, reproducible=True)
        ordering.append(group)
        partition = group.partition(group.blocks)
        leaves = {block.index: x.copy() for block in partition.blocks_of(group.rank)}

        def ordered(group=group, partition=partition, leaves=leaves):
            total = group.sum(partition, x.shape, "float32")
            for block in partition.blocks_of(group.rank):
                total.add(block, leaves[block.index])
            total.all_reduce()
        cases[f"mpitp {name}"] = ordered

    def own():
        nccl.allReduce(x.data.ptr, x.data.ptr, x.size, bare.NCCL_FLOAT32, bare.NCCL_SUM,
                       cupy.cuda.get_current_stream().ptr)
    rows.add("sum of 8 blocks of 32 MiB in a fixed order", {**cases, "nccl": own})
    for group in (*carriers.values(), *ordering):
        group.close()
