"""As much of CuPy as the group uses, on host memory, strict about what a device is strict about.

Arrays are no NumPy arrays and give nobody their bytes but by get() and, as CuPy's do, by __cuda_array_interface__.
Work is queued on a stream: MPI that reads a buffer before the stream is synchronised is found out, and so is a
copy from host memory that nobody waited for.
"""
import numpy as np


class Stream:
    def __init__(self):
        self.reset()

    def reset(self):
        self.kernels_pending, self.copies, self.mistakes, self.synchronised = False, [], [], 0

    def synchronize(self):
        for copy in self.copies:
            copy()
        self.kernels_pending, self.copies = False, []
        self.synchronised += 1


stream = Stream()


class cuda:
    @staticmethod
    def get_current_stream():
        return stream


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

    def get(self, out):
        stream.synchronize()
        assert type(out) is np.ndarray
        out[...] = self._values
        return out

    def set(self, host):
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
