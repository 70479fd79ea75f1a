"""Transport `peer`: its real kernels, compiled for the host, on ranks that are processes with memory in common."""
import re
import time

import host_kernels
import numpy as np
import nvrtc
import pytest
import stand_in

import mpitp
from mpitp import InputError
from mpitp.arrays import compute_dtype
from mpitp.comm import tree
from mpitp.comm.gpu import binding, choose, peer, peer_kernels, peer_memory
from mpitp.sharding.partition import Partition
from spmd import draw, same_bytes, sum_of_blocks

needs_compiler = pytest.mark.skipif(host_kernels.COMPILER is None, reason="no g++, which compiles the kernels here")


@pytest.fixture
def small_peers(world, monkeypatch):
    """Few blocks and short tiles, so that short arrays take several."""
    stand_in.install(monkeypatch)
    stand_in.install_peers(monkeypatch)
    for name in ("MPITP_TRANSPORT", "MPITP_SHARE_GPU", "MPITP_CUDA_AWARE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(peer_memory, "_peers", {})
    monkeypatch.setenv("MPITP_PEER_SECONDS", "60")
    for module, name, value in ((peer_kernels, "BLOCKS", 3), (peer_kernels, "WORDS", 32), (peer_kernels, "SHARE", 64),
                                (peer_kernels, "SHARE_BLOCKS", 3), (peer, "WORDS_BYTES", 1000),
                                (peer, "GATHER_BYTES", 3000), (peer, "BESIDE_BLOCKS", 2)):
        monkeypatch.setattr(module, name, value)


# --- the order ------------------------------------------------------------------------------------------------------

def test_the_order_of_the_ranks():
    assert peer_kernels.order_of_ranks(3) == ((1, 1, 1), "((u[0] + u[1]) + u[2])")
    assert peer_kernels.order_of_ranks(2, "max").total == "most(u[0], u[1])"


@pytest.mark.parametrize("size, blocks", [(1, 1), (7, 8), (40, 8), (5, 5), (9, 3), (64, 6)])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_the_order_of_the_tree(size, blocks, ranks):
    """The expression is what tree.finish adds up, to the bit: blocks that hold nothing, ranks without blocks, too."""
    partition = Partition(size, ranks, blocks)
    nodes = tree.nodes_of_ranks(partition)
    order = peer_kernels.order_of_tree(nodes, tree.root_width(blocks))
    every = [node for of_rank in nodes for node in of_rank]
    u = [draw(k, 50).astype("float32") for k in range(len(every))]
    found = eval(order.total)
    expected = tree.finish({node: x.copy() for node, x in zip(every, u)}, 0, tree.root_width(blocks))
    assert same_bytes(found, expected) and order.counts == tuple(map(len, nodes))


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 1000, 32767, 32768, 32769, 65536, 65537, 10 ** 6, 10 ** 8])
def test_the_grids_cover_everything(count):
    blocks, threads, width = peer_kernels.words_grid(count)
    assert 1 <= blocks <= peer_kernels.BLOCKS and threads % 32 == width % threads == 0 and width <= peer_kernels.WORDS
    assert (blocks - 1) * width < count <= blocks * width or blocks == peer_kernels.BLOCKS
    for size in (2, 3, 8):
        blocks, threads, width = peer_kernels.shares_grid(count, size, 128)
        assert 1 <= blocks <= 128 and threads % 32 == width % 4 == 0 and threads <= 512
        assert width <= peer_kernels.share(size)
        assert (blocks - 1) * width * size < count <= blocks * width * size or blocks == 128


@pytest.mark.skipif(nvrtc.library_path() is None, reason="no NVRTC, which compiles kernels without a GPU: "
                                                         "pip install nvidia-cuda-nvrtc-cu12")
def test_every_kernel_compiles(monkeypatch):
    """For the device, with a tree whose last rank has nothing, too; in every dtype."""
    stand_in.install(monkeypatch)
    from mpitp.ops.cuda.kernel import ROUND
    compiler, done = nvrtc.Compiler(), 0
    dtypes = {"sum_words": ("float32", "float64", "int32", "int64", "bfloat16"), "trial": ("float32",),
              "gather_words": ("uint16", "int32", "int64"), "sum_shares": ("float32", "float16", "bfloat16")}
    order = peer_kernels.Order((2, 1, 0), "most((u[0] + u[1]), u[2])")
    for name, of_name in dtypes.items():
        for dtype in of_name:
            code = peer_kernels.source(name, peer_kernels.TYPES.get(dtype) or ROUND[dtype], 2, order)
            compiler.compile(code, ("--std=c++14", "--gpu-architecture=sm_90"))
            done += 1
    assert done == 12 and set(dtypes) == set(peer_kernels.BODIES)


# --- the kernels ----------------------------------------------------------------------------------------------------

LENGTHS = (1, 193, 500, 1025)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_all_reduce(world, small_peers, dtype):
    """Sums in the order of the ranks, maxima, minima; new arrays and in place; words, shares, and what is beyond."""
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert group.transport.name == ("peer" if world.size > 1 else "mpi")
        for n in LENGTHS if dtype == "float32" else (65, 1024):
            every = [(draw(r, n) * 100).astype(dtype) for r in range(world.size)]
            x, total = stand_in.array(every[world.rank]), every[0].copy()
            for other in every[1:]:
                total += other
            found = group.all_reduce(x).memory
            in_order = dtype != "float64" or 8 * n * (world.size - 1) <= peer.WORDS_BYTES
            assert same_bytes(found, total) if in_order else np.allclose(found, total)
            op = "max" if n % 2 else "min"
            assert same_bytes(group.all_reduce(x, op, out=x).memory, getattr(np, op)(every, axis=0))


@needs_compiler
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums(world, small_peers, monkeypatch, dtype, reproducible):
    """The bits of NumPy's sum in the order of ranks or tree, rounded once."""
    with mpitp.TensorParallelGroup(device="gpu", reproducible=reproducible) as group:
        for n in (1, 700):
            for size in (40, 5):
                partition = group.partition(size)
                own = [draw(b, n).astype("float32") for b in range(group.blocks)]
                fold = tree.Fold(Partition(size, 1, group.blocks), 0)
                total = own[0].copy()
                for block in fold.partition.blocks_of(0):
                    fold.add(block.index, own[block.index].copy())
                for other in own[1:]:
                    total += other
                if reproducible:
                    total = tree.finish(fold.known, 0, tree.root_width(group.blocks))
                y = sum_of_blocks(group, lambda block, own=own: stand_in.array(own[block.index]), partition, (n,),
                                  compute_dtype(dtype, "gpu"))
                assert same_bytes(y.memory, total.astype(compute_dtype(dtype, "gpu")))


@needs_compiler
def test_sums_beside_what_the_device_computes(world, small_peers):
    """On a stream of their own; what comes after waits for them."""
    with mpitp.TensorParallelGroup(device="gpu") as group:
        if world.size == 1:
            return
        stand_in.default_stream.reset()
        done = []
        every = [draw(r, 300).astype("float32") for r in range(world.size)]
        total = group.sum(group.partition(8 * world.size), (300,), compute_dtype("bfloat16", "gpu"))
        total.meanwhile(done.append, 1)
        total.add(next(iter(group.partition(8 * world.size).blocks_of(group.rank))), stand_in.array(every[world.rank]))
        y = total.all_reduce()
        assert done == [1] and same_bytes(y.memory, sum(every[1:], every[0]).astype(y.dtype))
        side = group.transport.side_stream
        assert stand_in.default_stream.waited == [side] and side.waited == [stand_in.default_stream]
        stand_in.default_stream.reset()
        pending = group.begin_all_reduce(stand_in.array(every[world.rank]))
        group.all_reduce(stand_in.array(np.ones(3, "float32")))
        assert stand_in.default_stream.waited == [side]         # it uses the same slots
        assert same_bytes(pending.wait().memory, sum(every[1:], every[0]))


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "int64"])
@pytest.mark.parametrize("counts", [(3, 0, 2, 5), (0, 0, 0, 0), (200, 1, 0, 73), (700, 0, 1, 0)])
def test_what_is_only_moved(world, small_peers, counts, dtype):
    counts, P, r = list(counts)[:world.size], world.size, world.rank
    with mpitp.TensorParallelGroup(device="gpu") as group:
        carrier, whole = group.transport, (draw(1, sum(counts)) * 50).astype(dtype)
        whole = whole.view("uint16") if dtype == "float16" else whole
        bounds = np.concatenate([[0], np.cumsum(counts)])
        mine = stand_in.array(whole[bounds[r]:bounds[r + 1]])
        received = stand_in.empty((sum(counts),), whole.dtype)
        carrier.all_gather(mine, received, counts)
        assert same_bytes(received.memory, whole)
        received = stand_in.empty((sum(counts),), whole.dtype)
        carrier.gather(mine, received if r == P - 1 else None, counts, P - 1)
        assert r < P - 1 or same_bytes(received.memory, whole)
        x = stand_in.array(whole if r == P - 1 else 0 * whole)
        carrier.broadcast(x, P - 1)
        assert same_bytes(x.memory, whole)
        if dtype != "float16":
            part = stand_in.empty((counts[r],), whole.dtype)
            carrier.reduce_scatter(stand_in.array((r + 1) * whole), part, counts, "max")
            assert same_bytes(part.memory, np.maximum(whole, P * whole)[bounds[r]:bounds[r + 1]])


@needs_compiler
def test_many_sums_with_delays(world, small_peers):
    """Of random lengths, in words and shares and gathers, while the ranks fall behind each other at random."""
    common, own = np.random.default_rng(5), np.random.default_rng(world.rank)
    with mpitp.TensorParallelGroup(device="gpu") as group:
        for turn in range(15):
            n, kind = int(common.integers(1, 700)), int(common.integers(3))
            every = [np.random.default_rng([turn, r]).standard_normal(n).astype("float32") for r in range(world.size)]
            if own.random() < 0.2:
                time.sleep(own.random() * 0.02)
            x = stand_in.array(every[world.rank])
            if kind == 2:
                received = stand_in.empty((world.size * n,), "float32")
                group.transport.all_gather(x, received, [n] * world.size)
                assert same_bytes(received.memory, np.concatenate(every))
            else:
                assert same_bytes(group.all_reduce(x, out=x).memory, sum(every[1:], every[0]))


@needs_compiler
def test_a_rank_that_does_not_come(world, small_peers, monkeypatch):
    """The kernel gives up, the next call of the device raises, and a line says why."""
    if world.size == 1:
        return
    monkeypatch.setenv("MPITP_PEER_SECONDS", "0.2")
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert peer_memory.gave_up() is None
        for n in (3, 300):
            if world.rank == 0:
                with pytest.raises(host_kernels.LaunchFailure):
                    group.transport.all_reduce(stand_in.array(np.ones(n, "float32")), "sum")
                assert "found no answer of another rank's GPU within 0.2 s" in peer_memory.gave_up()
        world.Barrier()


# --- the choice -----------------------------------------------------------------------------------------------------

@needs_compiler
def test_groups_of_the_same_ranks_share_their_memory(world, small_peers):
    with mpitp.TensorParallelGroup(device="gpu") as group, group.subgroup(0) as part:
        assert world.size == 1 or part.transport.peers is group.transport.peers
        assert group.transport.records and (world.size == 1 or "nccl carries what is longer" in group.transport.how)


@needs_compiler
def test_gpus_that_cannot(world, small_peers, monkeypatch):
    """One line says why, and another transport is taken; exit 2 where this one was asked for by name."""
    if world.size == 1:
        return
    last = world.rank == world.size - 1

    def refused(message):
        monkeypatch.setattr(peer_memory, "_peers", {})
        with mpitp.TensorParallelGroup(device="gpu") as group:
            assert group.transport.name == "nccl" and re.search(f"not peer: {message}", group.transport.how)
        with pytest.raises(InputError, match=f"found {message}.*, expected GPUs that write to each other"):
            mpitp.TensorParallelGroup(device="gpu", transport="peer")

    def forbidden(*arguments):
        raise RuntimeError("cudaErrorNotSupported")
    with monkeypatch.context() as patch:                        # of a container, on one rank
        patch.setattr(stand_in.runtime, "ipcOpenMemHandle" if last else "deviceSynchronize",
                      forbidden if last else stand_in.runtime.deviceSynchronize)
        refused(f"memory that GPUs cannot share .rank {world.size - 1}: RuntimeError: cudaErrorNotSupported")
    with monkeypatch.context() as patch:
        patch.setattr(peer_memory, "TRIAL_PATIENCE", 0.2)
        if last:                                                # its buffer is not the one that others write to
            patch.setattr(stand_in.runtime, "ipcOpenMemHandle",
                          lambda handle, flags: stand_in.runtime.malloc(peer_kernels.memory_bytes(world.size)))
        refused("memory that GPUs cannot share .rank 0: nothing of rank")
    with monkeypatch.context() as patch:
        patch.setattr(stand_in.runtime, "getDeviceProperties",
                      lambda number: {"uuid": b"of %d" % world.rank, "name": b"H100" if last else b"H200"})
        refused(r"GPUs of different kinds \(H100, H200\)")
    with monkeypatch.context() as patch:
        patch.setattr(binding, "_first_device", None)
        patch.setattr(stand_in.runtime, "uuids", [b"%d" % i for i in range(world.size)])
        patch.setattr(stand_in.runtime, "deviceCanAccessPeer", lambda one, other: False)
        refused("GPUs without peer access")


@needs_compiler
def test_ranks_that_share_a_gpu(world, small_peers, monkeypatch):
    """Only where it is asked for by name: kernels of two processes take turns there."""
    if world.size == 1:
        return
    monkeypatch.setattr(choose, "_printed_reasons", set())
    monkeypatch.setattr(stand_in.runtime, "uuids", [b"the one"])
    with mpitp.TensorParallelGroup(device="gpu", share_gpu=True) as group:
        assert group.transport.name == "staged" and "not peer: ranks that share a GPU" in group.transport.how
    with mpitp.TensorParallelGroup(device="gpu", share_gpu=True, transport="peer") as group:
        assert group.transport.name == "peer" and group.transport.beyond.name == "staged"
        assert group.all_reduce(stand_in.array(np.ones(5, "float32"))).memory.tolist() == [world.size] * 5


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_time_limit_that_is_none(monkeypatch, text):
    monkeypatch.setenv("MPITP_PEER_SECONDS", text)
    with pytest.raises(InputError, match=f"found MPITP_PEER_SECONDS={text}, expected seconds"):
        peer_memory.patience()
