"""Which GPU a rank computes on, and whether another rank has it too."""
from dataclasses import dataclass
from functools import partial
from types import ModuleType

from mpi4py import MPI

from ...errors import InputError, require
from .. import agreement

TF32_TENSOR_OP_MATH = 3     # of cublasMath_t; CuPy has no name for it
_first_device: int | None = None        # of this process: its later groups, of fewer ranks too, stay on it


@dataclass(frozen=True)
class Gpu:
    """A Gpu is the device that a rank computes on.

    Attributes
    ----------
    number : int
        Of the device, among those that this process sees.
    uuid : str
        Of the hardware.
    name : str
        Of its model.
    shared : bool
        Whether another rank has it too.
    """
    number: int
    uuid: str
    name: str
    shared: bool


def bind(comm: MPI.Comm, cupy: ModuleType, number: int | None, share: bool, tf32: bool) -> Gpu:
    """Make one GPU this rank's own, and set how it multiplies float32. Collective.

    A launcher may show every rank all GPUs of the node, or each rank one: so the default is the rank's number on its
    node modulo the devices visible, and only their UUIDs show whether two ranks share one. A group that a process makes
    later stays on the device of the first: its rank there may be another, and its arrays are not.

    Parameters
    ----------
    comm : mpi4py communicator
    cupy : module
    number : int or None
        Of the device; None for the default.
    share : bool
        Whether several ranks may have one GPU.
    tf32 : bool
        Whether cuBLAS rounds the factors of float32 products to 10 bits on their way into the tensor cores. It is a
        setting of this process, as torch's allow_tf32.

    Raises
    ------
    InputError
        On every rank, where a rank has no GPU or no such GPU, or shares one that it may not share.
    """
    global _first_device
    number = _first_device if number is None else number
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    try:
        device_of_rank = partial(device_number, cupy, number, node.rank)
        agreement.require_everywhere(comm, "whether every rank has a GPU", lambda: str(device_of_rank() >= 0))
        number = device_of_rank()
        uuid, name = use_device(cupy, number, tf32)
        holders = [rank for rank, other in node.allgather((comm.rank, uuid)) if other == uuid]
    finally:
        node.Free()
    _first_device = number if _first_device is None else _first_device
    gpu = Gpu(number, uuid, name, shared=len(holders) > 1)
    agreement.require_everywhere(comm, "whether every rank has a GPU of its own",
                                 lambda: require_own(gpu, holders, share))
    return gpu


def device_number(cupy: ModuleType, number: int | None, rank_on_node: int) -> int:
    """Find the number of a rank's device. Raises InputError where there is no such device."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:                  # CuPy's own, without a driver
        raise InputError(f"found no GPU ({error}), expected one for device 'gpu'") from None
    require(count > 0, "no GPU", "one for device 'gpu'")
    if number is None:
        return rank_on_node % count
    require(0 <= number < count, f"gpu {number}", f"0 to {count - 1}, of the GPUs that this process sees")
    return number


def use_device(cupy: ModuleType, number: int, tf32: bool) -> tuple[str, str]:
    """Make a device current, and set its cuBLAS. Returns its UUID and the name of its model."""
    cupy.cuda.Device(number).use()
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    cublas = cupy.cuda.cublas
    cublas.setMathMode(cupy.cuda.device.get_cublas_handle(),
                       TF32_TENSOR_OP_MATH if tf32 else cublas.CUBLAS_DEFAULT_MATH)
    name = properties["name"]
    return properties["uuid"].hex(), name.decode() if isinstance(name, bytes) else name


def require_own(gpu: Gpu, holders: list[int], share: bool) -> str:
    """Raise InputError where a GPU has several holders that may not share it, else return one text."""
    if gpu.shared and not share:
        ranks = ", ".join(map(str, holders))
        raise InputError(f"found ranks {ranks} on one GPU, {gpu.name} {gpu.uuid}, expected a GPU a rank: "
                         "fewer ranks, or share_gpu=True (--share-gpu, MPITP_SHARE_GPU=1)")
    return "own GPU"
