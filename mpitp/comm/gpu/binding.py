"""Which GPU a rank computes on, and whether another rank has it too."""
from dataclasses import dataclass

from mpi4py import MPI

from ...errors import InputError, require
from .. import agreement

TF32_TENSOR_OP_MATH = 3     # of cublasMath_t; CuPy has no name for it


@dataclass(frozen=True)
class Gpu:
    """number : of the device among those that this process sees; uuid : of the hardware; name : of its model."""
    number: int
    uuid: str
    name: str
    shared: bool        # with another rank


def bind(comm, cupy, number, share, tf32):
    """Make one GPU this rank's own, and set how it multiplies float32. Collective over comm. Returns Gpu.

    A launcher may show every rank all GPUs of the node, or each rank one: so it is the rank's number on its node modulo
    those visible, and whether two ranks share one shows in its UUID alone.

    Parameters
    ----------
    number : of the device, None: the rank's number among those of its node, modulo the devices visible
    share : whether several ranks may have one GPU
    tf32 : whether cuBLAS rounds the factors of float32 products to 10 bits on the way into the tensor cores; a setting
        of this process, as torch's allow_tf32
    """
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    found = []

    def take():
        found.append(take_device(cupy, node.rank if number is None else number, number is None, tf32))
        return "taken"                          # each its own: nothing to agree on but that all have one
    try:
        agreement.require_everywhere(comm, "whether every rank has a GPU", take)
        number, uuid, name = found[0]
        holders = [rank for rank, other in node.allgather((comm.rank, uuid)) if other == uuid]
    finally:
        node.Free()

    def look():
        if len(holders) > 1 and not share:
            raise InputError(f"found ranks {', '.join(map(str, holders))} on one GPU, {name} {uuid}, expected a GPU a "
                             f"rank: fewer ranks, or share_gpu=True (--share-gpu, MPITP_SHARE_GPU=1)")
        return "own GPU"
    agreement.require_everywhere(comm, "whether every rank has a GPU of its own", look)
    return Gpu(number, uuid, name, len(holders) > 1)


def take_device(cupy, number, modulo, tf32):
    """Make it current. Returns (number, UUID, name)."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:                  # CuPy's own, without a driver
        raise InputError(f"found no GPU ({error}), expected one for device 'gpu'") from None
    require(count > 0, "no GPU", "one for device 'gpu'")
    if modulo:
        number %= count
    require(0 <= number < count, f"gpu {number}", f"0 to {count - 1}, of the GPUs that this process sees")
    cupy.cuda.Device(number).use()
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    cublas = cupy.cuda.cublas
    cublas.setMathMode(cupy.cuda.device.get_cublas_handle(),
                       TF32_TENSOR_OP_MATH if tf32 else cublas.CUBLAS_DEFAULT_MATH)
    name = properties["name"]
    return number, properties["uuid"].hex(), name.decode() if isinstance(name, bytes) else name
