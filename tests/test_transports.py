"""Which transport a group takes, which GPU a rank takes, and what is done while ranks add up: on a stand-in CuPy."""
from types import SimpleNamespace

import numpy as np
import pytest
import stand_in

import mpitp
from mpitp import InputError
from mpitp.comm import guard
from mpitp.comm.gpu import binding, choose as transport, nccl, staged
from mpitp.comm.gpu.binding import TF32_TENSOR_OP_MATH
from mpitp.comm.gpu.nccl import NcclTransport
from mpitp.comm.gpu.peer import PeerTransport
from spmd import draw, same_bytes, sum_of_blocks

NO_NCCL = "a CuPy without NCCL"


@pytest.fixture(autouse=True)
def stand_in_for_cupy(monkeypatch):
    stand_in.install(monkeypatch)
    monkeypatch.setattr(transport, "_printed_reasons", {"asked for"})
    for name in ("MPITP_TRANSPORT", "MPITP_SHARE_GPU", "MPITP_CUDA_AWARE"):
        monkeypatch.delenv(name, raising=False)


# --- the choice -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked, size, aware, seconds, no_nccl, name, why", [
    ("auto", 2, True, 1e-4, None, "mpi", "how, 16 MiB in 0.10 ms"),
    ("auto", 2, True, 1e-4, NO_NCCL, "mpi", "how, 16 MiB in 0.10 ms"),
    ("auto", 2, True, 23e-3, None, "nccl", "takes 23 ms for 16 MiB on the device"),
    ("auto", 2, True, 23e-3, NO_NCCL, "staged", "goes through the host; a CuPy without NCCL"),
    ("auto", 2, False, None, None, "nccl", "does not take device buffers"),
    ("auto", 2, False, None, NO_NCCL, "staged", "does not take device buffers (how); a CuPy without NCCL"),
    ("auto", 1, False, None, NO_NCCL, "mpi", "nothing travels"),
    ("mpi", 2, True, None, None, "mpi", "asked for"), ("mpi", 1, False, None, NO_NCCL, "mpi", "asked for"),
    ("nccl", 2, True, None, None, "nccl", "asked for"), ("staged", 2, True, None, None, "staged", "asked for"),
    ("mpi", 2, False, None, None, None,
     "found an MPI that does not take device buffers (how), expected a CUDA-aware one"),
    ("nccl", 2, True, None, NO_NCCL, None, "found a CuPy without NCCL, expected NCCL for transport 'nccl'"),
    ("peer", 2, True, None, None, None, "found no way, expected GPUs that write to each other for transport 'peer'"),
    ("peer", 1, False, None, None, "peer", "nothing travels")])
def test_decision(asked, size, aware, seconds, no_nccl, name, why):
    found, how, problem, beyond = transport.decide(asked, size, aware, "how", seconds, no_nccl, "no way")
    assert found == (name or "") and why in (how or problem) and bool(found) == bool(how) != bool(problem)
    assert ("not peer: no way" in how) == (asked == "auto" and size > 1) and not beyond


@pytest.mark.parametrize("asked, aware, seconds, no_nccl, beyond", [
    ("auto", False, None, None, "nccl"), ("auto", True, 1e-4, None, "nccl"), ("auto", True, 1e-4, NO_NCCL, "mpi"),
    ("auto", False, None, NO_NCCL, "staged"), ("peer", True, None, NO_NCCL, "mpi"),
    ("peer", False, None, NO_NCCL, "staged")])
def test_decision_for_peer(asked, aware, seconds, no_nccl, beyond):
    """Before all others, wherever it can be had; one of them carries what is longer."""
    found = transport.decide(asked, 2, aware, "how", seconds, no_nccl, None)
    assert found.name == "peer" and found.beyond == beyond and f"{beyond} carries what is longer" in found.how


def test_auto(world, monkeypatch, capfd):
    """By what MPI says of itself, and by what one all-reduce takes."""
    monkeypatch.setenv("MPITP_CUDA_AWARE", "0")
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert group.transport.name == ("nccl" if world.size > 1 else "mpi")
    monkeypatch.setenv("MPITP_CUDA_AWARE", "1")
    timed = transport.timed_all_reduce
    monkeypatch.setattr(transport, "timed_all_reduce", lambda *arguments: min(1e-3, timed(*arguments)))
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert group.transport.name == "mpi" and (world.size == 1 or "16 MiB in" in group.transport.how)
    monkeypatch.setattr(transport, "timed_all_reduce", lambda *_: 1.0)
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert group.transport.name == ("nccl" if world.size > 1 else "mpi")
    monkeypatch.setenv("MPITP_TRANSPORT", "staged")
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert group.transport.name == "staged" and group.transport.how == "asked for"
    assert capfd.readouterr().err == ""


def test_groups_of_the_same_ranks_share_a_communicator(world, monkeypatch):
    """It takes NCCL half a second to make one. On another device it is another one."""
    monkeypatch.setattr(nccl, "_communicators", {})
    before = stand_in.nccl.made
    for _ in range(2):
        with mpitp.TensorParallelGroup(device="gpu", transport="nccl") as group, group.subgroup(0) as part:
            assert world.size == 1 or part.transport.comm is group.transport.comm
    assert stand_in.nccl.made - before == (world.size > 1)
    if world.size > 1:
        monkeypatch.setattr(stand_in.runtime, "getDevice", lambda: 1)
        NcclTransport(world, stand_in, "another device")
        assert stand_in.nccl.made - before == 2


def test_a_group_of_one_rank_stays_on_the_device_of_its_process(world, monkeypatch):
    """It has rank 0 there; on device 0 it would compute beside the arrays of the first group, on another GPU."""
    monkeypatch.setattr(binding, "_first_device", None)
    monkeypatch.setattr(stand_in.runtime, "uuids", [b"%d" % i for i in range(world.size)])
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert group.gpu.number == world.rank
        own = world.Split(world.rank)
        with mpitp.TensorParallelGroup(own, device="gpu") as alone:
            assert alone.gpu.number == world.rank == stand_in.Device.current
        own.Free()


@pytest.mark.parametrize("arguments, message", [
    (dict(device="gpu", transport="tcp"), "found transport 'tcp', expected one of auto, mpi, nccl, staged, peer"),
    (dict(transport="nccl"), "found transport 'nccl' on device 'cpu', expected 'mpi'"),
    (dict(tf32=True), "found tf32 on device 'cpu', expected device 'gpu'"),
    (dict(device="gpu", gpu=3), "found gpu 3, expected 0 to 0, of the GPUs that this process sees")])
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        mpitp.TensorParallelGroup(**arguments)


def test_transports_that_cannot_be_had(world, monkeypatch):
    if world.size == 1:
        return                                  # one rank may have any
    monkeypatch.setenv("MPITP_CUDA_AWARE", "0")
    with pytest.raises(InputError, match="found an MPI that does not take device buffers"):
        mpitp.TensorParallelGroup(device="gpu", transport="mpi")
    if world.rank == world.size - 1:            # one rank is enough
        monkeypatch.setattr(stand_in.nccl, "available", False)
    with pytest.raises(InputError, match="found a CuPy without NCCL"):
        mpitp.TensorParallelGroup(device="gpu", transport="nccl")


# --- a GPU a rank ---------------------------------------------------------------------------------------------------

def test_one_gpu_a_rank(world, monkeypatch):
    """Every rank sees all GPUs of the node, or one of its own."""
    monkeypatch.setattr(binding, "_first_device", None)
    monkeypatch.setattr(stand_in.runtime, "uuids", [b"%d" % i for i in range(world.size + 1)])
    with mpitp.TensorParallelGroup(device="gpu", tf32=True) as group:
        assert stand_in.Device.current == world.rank and not group.gpu.shared
        assert stand_in.cublas.mode == TF32_TENSOR_OP_MATH
        with group.subgroup(0, key=-group.rank) as reversed_ranks:      # another number, the same GPU
            assert reversed_ranks.gpu == group.gpu
    monkeypatch.setattr(binding, "_first_device", None)
    monkeypatch.setattr(stand_in.runtime, "uuids", [b"own of %d" % world.rank])
    with mpitp.TensorParallelGroup(device="gpu") as group:
        assert stand_in.Device.current == 0 and group.gpu.uuid == (b"own of %d" % world.rank).hex()
        assert stand_in.cublas.mode == stand_in.cublas.CUBLAS_DEFAULT_MATH


def test_shared_gpus(world, monkeypatch):
    """Ranks that share one are found by its UUID, whatever number they know it by; allowed when asked."""
    monkeypatch.setenv("MPITP_CUDA_AWARE", "0")
    monkeypatch.setattr(stand_in.runtime, "uuids", [b"the one"])
    if world.size == 1:
        mpitp.TensorParallelGroup(device="gpu").close()
        return
    ranks = ", ".join(map(str, range(world.size)))
    line = f"found ranks {ranks} on one GPU, Stand-in {b'the one'.hex()}, expected a GPU a rank"
    with pytest.raises(InputError, match=line):
        mpitp.TensorParallelGroup(device="gpu")
    with mpitp.TensorParallelGroup(device="gpu", share_gpu=True) as group:
        assert group.gpu.shared and group.transport.name == "staged" and "share a GPU" in group.transport.how
    monkeypatch.setenv("MPITP_SHARE_GPU", "1")
    mpitp.TensorParallelGroup(device="gpu").close()
    with pytest.raises(InputError, match=r"found ranks that share a GPU \(Stand-in\), which NCCL refuses"):
        mpitp.TensorParallelGroup(device="gpu", transport="nccl")


def test_no_gpu(world, monkeypatch):
    """On one rank: none of them goes on."""
    if world.rank == 0:
        monkeypatch.setattr(stand_in.runtime, "uuids", [])
    with pytest.raises(InputError, match="found no GPU, expected one for device 'gpu'"):
        mpitp.TensorParallelGroup(device="gpu")

    def no_driver():
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
    monkeypatch.setattr(stand_in.runtime, "getDeviceCount", no_driver)
    with pytest.raises(InputError, match=r"found no GPU \(cudaErrorNoDevice.*\), expected one"):
        mpitp.TensorParallelGroup(device="gpu")


# --- the end ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["nccl", "peer"])
def test_close_waits_for_what_is_pending(name):
    """What the ranks share stays for the next group, and may still be written to."""
    closed = []
    if name == "nccl":
        transport = object.__new__(NcclTransport)
        transport.cupy = stand_in.cupy
    else:
        transport = object.__new__(PeerTransport)
        transport.peers = SimpleNamespace(cupy=stand_in.cupy)
        transport.beyond = SimpleNamespace(close=lambda: closed.append(stand_in.default_stream.synchronised))
    stand_in.default_stream.reset()
    transport.close()
    assert stand_in.default_stream.synchronised == 1 and closed in ([], [1])


# --- what is done meanwhile -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["nccl", "staged"])
@pytest.mark.parametrize("reproducible", [False, True])
def test_meanwhile(world, name, reproducible):
    """Work is done once a sum has begun where the transport can add up meanwhile, else at once; each once, in order."""
    with mpitp.TensorParallelGroup(device="gpu", transport=name, reproducible=reproducible) as group:
        assert group.overlaps == (name == "nccl" and world.size > 1 and not reproducible)
        done, own = [], [draw(r, 5).astype("float32") for r in range(group.blocks)]
        begun = []
        begin = group.transport.begin_all_reduce
        group.transport.begin_all_reduce = lambda *arguments: (begun.append(1), begin(*arguments))[1]

        def work(block):
            done.append((block.index, len(begun), len(stand_in.default_stream.waited)))
        stand_in.default_stream.reset()
        partition = group.partition(4 * group.blocks)
        total = group.sum(partition, (5,), "float32")
        for block in partition.blocks_of(group.rank):
            total.meanwhile(work, block)
            total.add(block, stand_in.array(own[block.index]))
        y = total.all_reduce()
        assert [index for index, _, _ in done] == [block.index for block in partition.blocks_of(group.rank)]
        assert all(len_begun == group.overlaps for _, len_begun, _ in done)
        assert all(waited == 0 for _, _, waited in done)    # before this stream waits for the sum
        if group.overlaps:
            assert stand_in.default_stream.waited == [group.transport.side_stream]     # which it does afterwards
            assert group.transport.side_stream.waited == [stand_in.default_stream]     # as that did for the summands
        expected = own[0]
        if not reproducible:
            for other in own[1:]:
                expected = expected + other
            assert np.allclose(y.memory, expected, rtol=1e-6)
    assert group.ledger.counts().total() == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("reproducible", [False, True])
def test_sums_of_16_bit_are_rounded_once(world, dtype, reproducible):
    with mpitp.TensorParallelGroup(device="gpu", transport="nccl", reproducible=reproducible, blocks=4) as group:
        own = [np.float32([1, 2049 * b, 1e-4]) for b in range(group.blocks)]         # 2049 is no float16
        partition = group.partition(4 * group.blocks)
        y = sum_of_blocks(group, lambda block: stand_in.array(own[block.index]), partition, (3,), dtype)
        total = own[0]
        for leaf in own[1:]:
            total = total + leaf
        assert same_bytes(y.memory, total.astype(dtype))
        (key, entry), = group.ledger.data.items()
        assert key == ("all_reduce", 3, dtype)
        assert reproducible or entry.wire_bytes == 2 * 12 * (world.size - 1) // world.size
        with pytest.raises(InputError, match="expected a C-contiguous float32"):
            sum_of_blocks(group, lambda block: stand_in.array(np.ones(3, "float64")), group.partition(64), (3,), dtype)


@pytest.mark.parametrize("P_counts", [(3, 0, 2, 5), (0, 0, 0, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["mpi", "nccl", "staged"])
def test_uneven_and_empty_parts(world, monkeypatch, name, P_counts):
    monkeypatch.setenv("MPITP_CUDA_AWARE", "1")
    counts, P, r = list(P_counts * world.size)[:world.size], world.size, world.rank
    with mpitp.TensorParallelGroup(device="gpu", transport=name) as group:
        carrier, whole = group.transport, draw(1, sum(counts)).astype("float32")
        bounds = np.concatenate([[0], np.cumsum(counts)])
        mine = stand_in.array(whole[bounds[r]:bounds[r + 1]])
        received = stand_in.empty((sum(counts),), "float32")
        carrier.all_gather(mine, received, counts)
        assert same_bytes(settled(received), whole)
        received = stand_in.empty((sum(counts),), "float32")
        carrier.gather(mine, received if r == P - 1 else None, counts, P - 1)
        assert r < P - 1 or same_bytes(settled(received), whole)
        part = stand_in.empty((counts[r],), "float32")
        carrier.reduce_scatter(stand_in.array(np.float32(P) * whole), part, counts, "max")
        assert same_bytes(settled(part), np.float32(P) * whole[bounds[r]:bounds[r + 1]])
        received = stand_in.empty((P * counts[r],), "float32")
        carrier.all_to_all(stand_in.array(whole), counts, received, [counts[r]] * P)
        assert same_bytes(settled(received), np.tile(whole[bounds[r]:bounds[r + 1]], P))


def settled(x):
    stand_in.default_stream.finish_copies()
    return x.memory


def test_large_sums_are_staged_in_messages(world, monkeypatch):
    monkeypatch.setattr(staged, "STAGE_BYTES", 64)
    with mpitp.TensorParallelGroup(device="gpu", transport="staged") as group:
        x = stand_in.array(np.arange(100, dtype="float32") * (world.rank + 1))
        group.all_reduce(x, out=x)
        assert same_bytes(x.memory, np.arange(100, dtype="float32") * sum(range(1, world.size + 1)))
        assert not stand_in.default_stream.copies and not stand_in.default_stream.mistakes


# --- memory that does not suffice -----------------------------------------------------------------------------------

class OutOfMemoryError(MemoryError):
    """As CuPy's."""
    _size, _total, _limit = 5 << 30, 3 << 30, 0


def test_out_of_memory_is_one_line(world, monkeypatch, capfd):
    """What was asked for and what was free, exit 1, no traceback."""
    monkeypatch.setattr(stand_in.runtime, "memGetInfo", lambda: (1 << 30, 80 << 30), raising=False)
    monkeypatch.setattr(guard, "active", False)
    monkeypatch.setattr(guard, "watch_threads", lambda: None)
    line = "found 1.0 of 80.0 GiB of the GPU's memory free, expected 5.0 GiB for one more array " \
           "beside the 3.0 GiB of this rank\n"
    assert guard.out_of_memory(OutOfMemoryError()) == line and guard.out_of_memory(MemoryError()) is None

    def main():
        raise OutOfMemoryError("Out of memory allocating 5 GiB")
    if world.size == 1:                         # several ranks: abort() takes the same line for the traceback's place
        assert guard.guarded(main) == 1 and capfd.readouterr().err == "mpitp: " + line


# --- what may be recorded as a graph --------------------------------------------------------------------------------

def test_groups_that_cannot_be_recorded(world):
    with mpitp.TensorParallelGroup() as group:
        with pytest.raises(InputError, match="found device 'cpu', expected 'gpu', to record a CUDA graph"):
            mpitp.Captured(group, abs, np.ones(3))
    with mpitp.TensorParallelGroup(device="gpu", transport="staged") as group:
        if world.size > 1:
            with pytest.raises(InputError, match="found transport 'staged', expected 'peer' or 'nccl', or one rank"):
                mpitp.Captured(group, abs, stand_in.array(np.ones(3)))
