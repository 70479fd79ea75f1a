"""A function of device arrays, recorded once as a CUDA graph and replayed: what it costs is what the GPU does.

For a token through many small layers, most of the time is Python's: some 6 us a kernel, which take the GPU 2.
"""
from .errors import require


class Captured:
    """function(*arrays) on a GPU, replayed.

    Parameters
    ----------
    group : TensorParallelGroup on a GPU, of one rank or with the NCCL transport: MPI works on the host, which a graph
        cannot
    function : of arrays to an array, or to a tuple of them; it must start kernels only. Products of one row qualify
        (mpitp/ops/cuda/linear.py has a kernel for them), those of more go through cuBLAS, which CuPy refuses to record
    arrays : of the shapes and dtypes that it will be called with

    Notes
    -----
    Collective. The function is called twice, to compile what it needs and to record it; its collectives enter the
    ledger then, not when replayed. Arrays that it makes lie in a pool of its own, so that nobody else is given them.
    Raises InputError for a group that cannot be recorded.
    """

    def __init__(self, group, function, *arrays):
        require(group.device == "gpu", f"device {group.device!r}", "'gpu', to record a CUDA graph")
        require(group.size == 1 or group.transport.name == "nccl", f"transport {group.transport.name!r}",
                "'nccl', or one rank, to record a CUDA graph")
        cuda = group.xp.cuda
        self.inputs = [x.copy() for x in arrays]
        self.pool, stream = cuda.MemoryPool(), cuda.Stream(non_blocking=True)
        cuda.get_current_stream().synchronize()
        with cuda.using_allocator(self.pool.malloc), stream:
            function(*self.inputs)              # what it allocates is in the pool now: recording must not allocate
            stream.synchronize()
            stream.begin_capture()
            self.outputs = function(*self.inputs)
            self.graph = stream.end_capture()
        self.cuda = cuda

    def __call__(self, *arrays):
        """What function(*arrays) returns, in arrays that the next call overwrites."""
        for held, x in zip(self.inputs, arrays):
            held[...] = x
        self.graph.launch(self.cuda.get_current_stream())
        return self.outputs
