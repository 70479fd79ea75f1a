"""The device: what the MPI library says of CUDA, how it is overridden, and both GPU transports on a stand-in CuPy."""
import ctypes
import sys

import numpy as np
import pytest
import stand_in

import mpitp
from mpitp import InputError
from mpitp.comm.gpu import aware as device, choose as transport
from mpitp.comm.mpi import MpiTransport
from mpitp.comm.gpu.staged import StagedTransport
from spmd import draw, job, same_bytes, sum_of_blocks

# --- what the MPI says ---------------------------------------------------------------------------------------


def test_the_real_library_answers(world, monkeypatch):
    monkeypatch.delenv("MPITP_CUDA_AWARE", raising=False)
    aware, how = device.cuda_aware(world)
    assert aware in (True, False) and ("mpi_memory_alloc_kinds" in how or "support" in how)
    assert device.cuda_aware_everywhere(world) == (aware, how)


@pytest.mark.parametrize("value, aware", [("0", False), ("1", True)])
def test_override(world, monkeypatch, value, aware):
    monkeypatch.setenv("MPITP_CUDA_AWARE", value)
    assert device.cuda_aware(world) == (aware, f"MPITP_CUDA_AWARE={value}")


@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_a_bad_override(world, monkeypatch, value):
    monkeypatch.setenv("MPITP_CUDA_AWARE", value)
    with pytest.raises(InputError, match=f"found MPITP_CUDA_AWARE='{value}', expected 0 or 1"):
        device.cuda_aware(world)


class Library:
    """A shared library with the functions that a CUDA-aware MPI has."""
    def __init__(self, monkeypatch, **functions):
        vars(self).update(functions)
        monkeypatch.setattr(device.ctypes, "CDLL", lambda path: self)
        monkeypatch.delenv("MPITP_CUDA_AWARE", raising=False)


def gpu_query(answer, status=0):
    def query(kind, found):
        assert kind == 0
        found._obj.value = answer
        return status
    return query


class Comm:
    """A communicator with an info object."""
    def __init__(self, kinds):
        self.kinds = kinds

    def Get_info(self):
        return self

    def get(self, key):
        assert key == "mpi_memory_alloc_kinds"
        return self.kinds

    def Free(self):
        pass


def test_each_way_to_say_it(monkeypatch):
    assert ctypes.CDLL is device.ctypes.CDLL
    Library(monkeypatch, MPIX_Query_cuda_support=lambda: 1)
    assert device.cuda_aware(Comm(None)) == (True, "MPIX_Query_cuda_support() = 1")
    Library(monkeypatch, MPIX_Query_cuda_support=lambda: 0, MPIX_GPU_query_support=gpu_query(1))
    assert device.cuda_aware(Comm(None)) == (True, "MPIX_GPU_query_support(CUDA) = 1")
    Library(monkeypatch, MPIX_GPU_query_support=gpu_query(1, status=5))         # it failed: what it left is no answer
    assert device.cuda_aware(Comm(None)) == (False, "MPIX_GPU_query_support(CUDA) = 0; no mpi_memory_alloc_kinds")
    Library(monkeypatch)
    assert device.cuda_aware(Comm("mpi,system,cuda")) == (True, "mpi_memory_alloc_kinds = mpi,system,cuda")
    assert device.cuda_aware(Comm("mpi,system")) == (False, "mpi_memory_alloc_kinds = mpi,system")
    assert device.cuda_aware(Comm(None)) == (False, "no mpi_memory_alloc_kinds")


@pytest.mark.parametrize("kinds, takes", [
    ("cuda", True), ("system, cuda", True), ("system,cuda:device", True), ("cuda:host", False),
    ("cuda:host:device", True),
    ("cuda:managed", False), ("cudax", False), ("rocm:device", False), ("", False)])
def test_memory_kinds(kinds, takes):
    assert device.takes_device(kinds) == takes


def test_ranks_that_answer_differently(world, monkeypatch):
    if world.size == 1:
        pytest.skip("one rank agrees with itself")
    monkeypatch.setenv("MPITP_CUDA_AWARE", "1" if world.rank == 0 else "0")
    with pytest.raises(InputError, match=r"disagree on whether MPI takes device buffers: rank 0: True .*: False"):
        device.cuda_aware_everywhere(world)
    monkeypatch.setenv("MPITP_CUDA_AWARE", "1" if world.rank == 0 else "maybe")
    with pytest.raises(InputError, match="found MPITP_CUDA_AWARE='maybe'"):
        device.cuda_aware_everywhere(world)


# --- without CuPy ----------------------------------------------------------------------------------------------

def test_a_missing_cupy(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InputError, match=r"found no CuPy \(.*\), expected one for device 'gpu': "
                                         r"pip install 'mpitp\[cuda12\]' or 'mpitp\[cuda13\]'"):
        mpitp.TensorParallelGroup(device="gpu")


# --- both transports on a stand-in ---------------------------------------------------------------------------------

@pytest.fixture
def stand_in_for_cupy(monkeypatch):
    """CuPy's stand-in in its place, with a GPU of its own for each rank."""
    stand_in.install(monkeypatch)
    monkeypatch.setattr(transport, "_printed_reasons", set())


@pytest.fixture(params=["staged", "mpi", "nccl"])
def gpu_group(world, stand_in_for_cupy, monkeypatch, request):
    monkeypatch.setenv("MPITP_CUDA_AWARE", "1" if request.param == "mpi" else "0")
    group = mpitp.TensorParallelGroup(device="gpu", check=True, transport=request.param)
    assert group.transport.name == group.ledger.transport == request.param
    yield group
    group.close()


def on_device(x):
    return stand_in.array(x)


def same(device_array, expected):
    return isinstance(device_array, stand_in.ndarray) and same_bytes(device_array.memory, expected)


def settled(group):
    """Nothing is left under way, and nothing was read too early."""
    stream = stand_in.default_stream
    alone = group.size == 1 or group.transport.name == "nccl"           # which need not wait for anything
    return not stream.copies and not stream.mistakes and (alone or stream.synchronised > 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "float16"])
@pytest.mark.parametrize("message_bytes", [1 << 30, 64])
def test_every_collective_on_a_device(gpu_group, dtype, message_bytes):
    group, P = gpu_group, gpu_group.size
    group.transport.message_bytes = message_bytes
    everyone = [np.round(draw(r, 6, 7) * 4).astype(dtype) for r in range(P)]
    total, mine = sum(everyone[1:], everyone[0]), everyone[group.rank]
    partition = group.partition(7)
    x, part = on_device(mine), on_device(everyone[0][:, partition.range(group.rank)])

    def check(y, expected):
        assert same(y, expected) and settled(group)
        stand_in.default_stream.reset()

    check(group.all_reduce(x), total)
    assert same(x, mine)
    check(group.all_reduce(on_device(mine), "max"), np.max(everyone, axis=0))
    in_place = on_device(mine)
    assert group.all_reduce(in_place, out=in_place) is in_place
    check(in_place, total)
    check(group.begin_all_reduce(x).wait(), total)
    check(group.all_gather(part, partition), everyone[0])
    check(group.reduce_scatter(x, partition), np.ascontiguousarray(total[:, partition.range(group.rank)]))
    check(group.broadcast(x, P - 1), everyone[-1])
    gathered = group.gather(part, partition)
    assert (gathered is None) == (group.rank != 0)
    if group.rank == 0:
        check(gathered, everyone[0])


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_sum_on_a_device(gpu_group, reproducible):
    name = gpu_group.transport.name
    with mpitp.TensorParallelGroup(device="gpu", reproducible=reproducible, blocks=4, transport=name) as group:
        leaves = [np.round(draw(b, 3, 5) * 4).astype("float32") for b in range(group.blocks)]
        stand_in.default_stream.reset()
        y = sum_of_blocks(group, lambda block: on_device(leaves[block.index]), group.partition(40), (3, 5), "float32")
        assert same(y, sum(leaves[1:], leaves[0])) and settled(group)


def test_arrays_of_the_other_device(gpu_group, world):
    with pytest.raises(InputError, match=r"all_reduce: found numpy\.ndarray, expected an array of cupy"):
        gpu_group.all_reduce(np.ones(3))
    with pytest.raises(InputError, match="found out"):
        gpu_group.all_reduce(on_device(np.ones(3)), out=np.ones(3))
    with mpitp.TensorParallelGroup() as group:
        with pytest.raises(InputError, match=r"found cupy\.ndarray, expected an array of numpy \(the group's device"):
            group.all_reduce(on_device(np.ones(3)))


def test_staging_is_said_once_by_rank_0(world, stand_in_for_cupy, monkeypatch, capfd):
    monkeypatch.setenv("MPITP_CUDA_AWARE", "0")
    monkeypatch.setattr(stand_in.nccl, "available", False)
    for _ in range(2):
        with mpitp.TensorParallelGroup(device="gpu") as group:
            group.subgroup(group.rank).close()
    assert capfd.readouterr().err.count("staging through host memory") == (world.rank == 0 and world.size > 1)


# --- the tester, tested ---------------------------------------------------------------------------------------------

def test_a_transport_that_does_not_synchronise_is_seen(world):
    stand_in.default_stream.reset()
    MpiTransport(world).all_reduce(on_device(np.ones(3)), "sum")
    assert stand_in.default_stream.mistakes
    stand_in.default_stream.reset()
    hasty = StagedTransport(world, lambda: None, "in a test", pinned_like=lambda x: np.empty(x.shape, x.dtype))
    hasty.all_reduce(on_device(np.ones(3)), "sum")
    assert stand_in.default_stream.copies


# --- the suite on a device ------------------------------------------------------------------------------------------

@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.any_mpi
@pytest.mark.parametrize("ranks, name, parts", [
    (1, "auto", "layers kv decoder_dense half"), (2, "nccl", "layers kv decoder_dense half"), (2, "mpi", "kv half"),
    (2, "staged", "kv half")])
def test_the_suite_on_a_stand_in(ranks, name, parts):
    """As on a GPU, where CI has none: layers, losses, keys and values on arrays that refuse NumPy's; and what a whole
    decoder asks of the other transports."""
    files = [f"tests/test_{part}.py" for part in parts.split()]
    done = job(ranks, "-m", "pytest", "-q", *files, "--device", "stand-in", "--transport", name, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout and "failed" not in done.stdout, done.stdout + done.stderr


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.any_mpi
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.weekly)])
def test_the_same_bits_on_a_stand_in(every):
    """In 16-bit types, too: on one rank as on three."""
    one, three = (job(ranks, "tests/hashes.py", "--device", "stand-in", "--every", every, timeout=600)
                  for ranks in (1, 3))
    assert one.returncode == three.returncode == 0, one.stderr + three.stderr
    assert one.stdout == three.stdout and sum("bfloat16" in line for line in one.stdout.splitlines()) > 500 // every


@pytest.mark.launcher
@pytest.mark.any_mpi
def test_what_cublas_is_told():
    """Transposed or not, pitch, gaps between matrices, copies: for arrays that lie in memory in many ways."""
    done = job(1, "tests/support/layout_job.py")
    assert done.returncode == 0 and int(done.stdout.split()[0]) > 1000, done.stdout + done.stderr
