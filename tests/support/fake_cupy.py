"""As much of CuPy as the group uses, on host memory, strict about what a device is strict about.

Arrays are no NumPy arrays and give nobody their bytes but by get() and, as CuPy's do, by __cuda_array_interface__.
Work is queued on a stream: MPI that reads a buffer before the stream is synchronised is found out, and so is a
copy from host memory that nobody waited for.
"""
import ctypes
from types import SimpleNamespace

import numpy as np
from mpi4py import MPI


class Stream:
    def __init__(self, non_blocking=False):
        self.reset()

    def reset(self):
        self.kernels_pending, self.copies, self.mistakes, self.synchronised, self.waited = False, [], [], 0, []

    def synchronize(self):
        self.finish_copies()
        self.kernels_pending = False
        self.synchronised += 1

    def finish_copies(self):
        for copy in self.copies:
            copy()
        self.copies = []

    ptr = property(id)

    def record(self):
        return Event(self)

    def wait_event(self, event):
        self.waited.append(event.stream)

    def __enter__(self):
        streams.append(self)

    def __exit__(self, *_):
        streams.pop()


class Event:
    def __init__(self, stream):
        self.stream = stream

    def synchronize(self):
        self.stream.synchronize()


stream = Stream()
streams = [stream]      # the last one is current


class Library:
    """NCCL, of ranks that are all of MPI's world: at once, behind what its stream was told before, as NCCL would."""
    available = True
    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_INT32, NCCL_INT64, NCCL_FLOAT16 = "float32", "float64", "int32", "int64", "uint16"
    NCCL_SUM, NCCL_MAX, NCCL_MIN = MPI.SUM, MPI.MAX, MPI.MIN
    queue, closed = None, 0

    def get_unique_id(self):
        return (1, -2, 3)

    def groupStart(self):
        self.queue = []

    def groupEnd(self):
        MPI.Request.Waitall([start() for start in self.queue])
        self.queue = None

    class NcclCommunicator:
        def __init__(self, size, identity, rank):
            assert identity == (1, -2, 3) and size == MPI.COMM_WORLD.size
            self.comm = MPI.COMM_WORLD.Split(0, rank)

        def allReduce(self, send, receive, count, kind, operation, where):
            values = at(send, count, kind, where)
            assert send == receive and count
            self.comm.Allreduce(MPI.IN_PLACE, values, operation)

        def allGather(self, send, receive, count, kind, where):
            self.comm.Allgather(at(send, count, kind, where), at(receive, count * self.comm.size, kind, where))

        def reduceScatter(self, send, receive, count, kind, operation, where):
            self.comm.Reduce_scatter_block(at(send, count * self.comm.size, kind, where),
                                           at(receive, count, kind, where), operation)

        def reduce(self, send, receive, count, kind, operation, root, where):
            target = at(receive, count, kind, where) if self.comm.rank == root else None
            self.comm.Reduce(at(send, count, kind, where), target, operation, root)

        def broadcast(self, send, receive, count, kind, root, where):
            self.comm.Bcast(at(receive, count, kind, where), root)

        def send(self, pointer, count, kind, peer, where):
            nccl.queue.append(lambda: self.comm.Isend(at(pointer, count, kind, where), peer))

        def recv(self, pointer, count, kind, peer, where):
            nccl.queue.append(lambda: self.comm.Irecv(at(pointer, count, kind, where), peer))

        def destroy(self):
            self.comm.Free()
            nccl.closed += 1


nccl = Library()


def at(pointer, count, kind, where):
    """The numbers at an address, once the stream that asks has got there."""
    assert where == streams[-1].ptr
    streams[-1].finish_copies()
    size = count * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), kind)


class runtime:
    uuids = [b"own of rank %d" % MPI.COMM_WORLD.rank]       # of the devices that this process sees

    @classmethod
    def getDeviceCount(cls):
        return len(cls.uuids)

    @classmethod
    def getDeviceProperties(cls, number):
        return {"uuid": cls.uuids[number], "name": b"Stand-in"}


class Device:
    current = None

    def __init__(self, number):
        self.number = number

    def use(self):
        Device.current = self.number


class cublas:
    CUBLAS_DEFAULT_MATH, mode = 0, None

    @classmethod
    def setMathMode(cls, handle, mode):
        cls.mode = mode


class cuda:
    runtime, Device, cublas, nccl, Stream = runtime, Device, cublas, nccl, Stream

    class device:
        @staticmethod
        def get_cublas_handle():
            return 1

    @staticmethod
    def get_current_stream():
        return streams[-1]


def kernel(result):
    stream.kernels_pending = True
    return ndarray(result)


def values(x):
    return x._values if isinstance(x, ndarray) else x


class ndarray:
    def __init__(self, array):
        self._values = array

    shape = property(lambda self: self._values.shape)
    dtype = property(lambda self: self._values.dtype)
    size = property(lambda self: self._values.size)
    ndim = property(lambda self: self._values.ndim)
    nbytes = property(lambda self: self._values.nbytes)
    itemsize = property(lambda self: self._values.itemsize)
    flags = property(lambda self: self._values.flags)

    def __len__(self):
        return len(self._values)

    def __array__(self, *arguments, **options):
        raise TypeError("implicit conversion to a host array")          # as CuPy's says

    @property
    def __cuda_array_interface__(self):
        if stream.kernels_pending or stream.copies:
            stream.mistakes.append("a buffer was handed out before the stream was synchronised")
        return {**self._values.__array_interface__, "version": 3}

    def __getitem__(self, key):
        return ndarray(self._values[key] if not isinstance(key, int) else self._values[key, ...])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __setitem__(self, key, value):
        if not isinstance(value, (ndarray, int, float)):
            raise TypeError(f"a device array cannot be set to {type(value).__name__}")
        self._values[key] = values(value)
        stream.kernels_pending = True

    def __iadd__(self, other):
        self._values += values(other)
        stream.kernels_pending = True
        return self

    def reshape(self, *shape):
        return ndarray(self._values.reshape(*shape))

    def view(self, dtype):
        return ndarray(self._values.view(dtype))

    def astype(self, dtype, **options):
        return kernel(self._values.astype(dtype, **options))

    def copy(self):
        return kernel(self._values.copy())

    data = property(lambda self: SimpleNamespace(ptr=self._values.ctypes.data))

    def get(self, out, stream=None, blocking=True):
        (stream or streams[-1]).synchronize()
        assert type(out) is np.ndarray
        out[...] = self._values
        return out

    def set(self, host, stream=None):
        stream = stream or streams[-1]
        assert type(host) is np.ndarray and host.shape == self.shape and host.dtype == self.dtype
        stream.copies.append(lambda: np.copyto(self._values, host))     # later, as cudaMemcpyAsync


float32 = np.float32


def array(x, order="K"):
    return kernel(np.array(values(x), order=order))


asarray = array


def empty(shape, dtype):
    return ndarray(np.full(shape, 77, dtype))


def zeros(shape, dtype):
    return kernel(np.zeros(shape, dtype))


def concatenate(arrays):
    return kernel(np.concatenate([values(x) for x in arrays]))


def moveaxis(x, source, destination):
    return ndarray(np.moveaxis(values(x), source, destination))


def ascontiguousarray(x):
    return kernel(np.ascontiguousarray(values(x)))
