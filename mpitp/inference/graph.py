"""A function of device arrays, recorded once as a CUDA graph and replayed: what it costs is what the GPU does.

For a token through many small layers, most of the time is Python's: some 6 us a kernel, which take the GPU 2.
"""
import numpy as np

from ..errors import require


class Captured:
    """function(*arrays) on a GPU, replayed.

    Parameters
    ----------
    group : TensorParallelGroup on a GPU, of one rank or with the NCCL transport: MPI works on the host, which a graph
        cannot
    function : of arrays to an array, or to a tuple of them; it must start kernels only. Products of one row qualify, or
        of a few in float32 (mpitp/ops/cuda/few_rows.py); others go through cuBLAS, which CuPy refuses to record
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


class CapturedToken:
    """Decoder.extend by one token of each sequence, recorded: the positions that it continues at are on the device.

    Parameters
    ----------
    model : Decoder that can_record says can be
    kv : KeyValues, which it continues
    """

    def __init__(self, model, kv):
        def step(ids):
            logits = model.continued(ids, kv)
            kv.starts += 1
            return logits
        self.model, self.kv = model, kv
        self.captured = Captured(model.group, step, model.group.xp.zeros((len(kv.lengths), 1), np.int64))
        kv.set_lengths(kv.lengths)              # the call that compiled did not count; what it wrote is overwritten

    def __call__(self, ids):
        """As extend(ids, kv), in an array that the next call overwrites."""
        self.kv.require_room(ids.shape)
        logits = self.captured(self.model.embedding.checked(ids))
        self.kv.lengths += 1
        return logits


def can_record(model, batch):
    """Whether a token of each of so many sequences takes kernels of this model only that a graph may hold: one GPU, and
    products of one row, or of a few that are read in vectors.
    """
    group = model.group
    if group.device != "gpu" or group.size > 1:
        return False
    if batch == 1:
        return True
    from ..ops.cuda.few_rows import MOST
    in_vectors = all(w.ndim < 2 or w.shape[1] % 4 == 0 for w in model.weights.values())
    return batch <= MOST and model.dtype == np.float32 and in_vectors and not group.reproducible
