"""A function of device arrays, recorded once as a CUDA graph and replayed: what it costs is what the GPU does.

For a token through many small layers, most of the time is Python's: some 6 us a kernel, which take the GPU 2.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array, DeviceArray
from ..errors import require
from ..layers.embedding import token_ids

if TYPE_CHECKING:
    from ..comm.group import TensorParallelGroup
    from ..layers.decoder import Decoder
    from .kv import KeyValues


class Captured:
    """A Captured is a function of arrays on a GPU, recorded as a CUDA graph; calling it replays the graph.

    Parameters
    ----------
    group : TensorParallelGroup
        On a GPU, of one rank or with transport peer or nccl: MPI works on the host, which a graph cannot.
    function : function
        Of arrays to an array, or to a tuple of them. It must start kernels only: products of one row qualify, or of a
        few rows in float32 (mpitp/ops/cuda/few_rows.py); others go through cuBLAS, which CuPy refuses to record.
    *arrays : array
        Of the shapes and dtypes that the function will be called with.

    Raises
    ------
    InputError
        For a group that cannot be recorded.

    Notes
    -----
    The constructor is collective. It calls the function twice, to compile what it needs and to record it. The
    function's collectives enter the ledger then, not when they are replayed. Arrays that the function makes lie in a
    memory pool of the graph's own, from which no other array is taken.
    """

    def __init__(self, group: TensorParallelGroup, function: Callable[..., DeviceArray | tuple[DeviceArray, ...]],
                 *arrays: DeviceArray) -> None:
        require(group.device == "gpu", f"device {group.device!r}", "'gpu', to record a CUDA graph")
        require(group.transport.records, f"transport {group.transport.name!r}",
                "'peer' or 'nccl', or one rank, to record a CUDA graph")
        self.cuda = group.xp.cuda
        self.inputs = [x.copy() for x in arrays]
        self.pool, stream = self.cuda.MemoryPool(), self.cuda.Stream(non_blocking=True)
        self.cuda.get_current_stream().synchronize()
        with self.cuda.using_allocator(self.pool.malloc), stream:
            function(*self.inputs)              # what it allocates is in the pool now: recording must not allocate
            stream.synchronize()
            stream.begin_capture()
            self.outputs = function(*self.inputs)
            self.graph = stream.end_capture()

    def __call__(self, *arrays: Array | DeviceArray) -> DeviceArray | tuple[DeviceArray, ...]:
        """Return what function(*arrays) returns, in arrays that the next call overwrites.

        Arrays of the host go to the device. Without arrays the last ones are taken, as the function has left them.
        """
        for held, x in zip(self.inputs, arrays):
            if isinstance(x, np.ndarray):
                held.set(x)
            else:
                held[...] = x
        self.graph.launch(self.cuda.get_current_stream())
        return self.outputs


class CapturedToken:
    """A CapturedToken is Decoder.extend by one token of each sequence, recorded.

    The positions that it continues at lie on the device.

    Parameters
    ----------
    model : Decoder
        One of which can_record is true.
    kv : KeyValues
        The keys and values that every call continues.
    """

    def __init__(self, model: Decoder, kv: KeyValues) -> None:
        self.model, self.kv = model, kv
        self.captured = Captured(model.group, self.continue_kv, model.group.xp.zeros((len(kv.lengths), 1), np.int64))
        kv.set_lengths(kv.lengths)              # the call that compiled did not count; what it wrote is overwritten

    def continue_kv(self, ids: DeviceArray) -> DeviceArray:
        """Compute the logits of one more token of each sequence: what is recorded."""
        logits = self.model.continued(ids, self.kv)
        self.kv.starts += 1
        return logits

    def __call__(self, ids: Array) -> DeviceArray:
        """Return what extend(ids, kv) returns, in an array that the next call overwrites."""
        self.kv.require_room(ids.shape)
        logits = self.captured(token_ids(ids, self.model.embedding.vocab_size))
        self.kv.lengths += 1
        return logits


class CapturedChoice:
    """A CapturedChoice is a token of each sequence and the choice of the next one, recorded together.

    Parameters
    ----------
    model : Decoder
        One of which can_record is true.
    kv : KeyValues
        The keys and values that every call continues.
    choose : Choice
        Of the tokens, with temperature 0.
    """

    def __init__(self, model: Decoder, kv: KeyValues, choose: Any) -> None:
        self.model, self.kv, self.choose = model, kv, choose
        self.started = False
        self.captured = Captured(model.group, self.following, model.group.xp.zeros(len(kv.lengths), np.int64))
        kv.set_lengths(kv.lengths)              # the call that compiled did not count; what it wrote is overwritten

    def following(self, ids: DeviceArray) -> DeviceArray:
        """Compute the tokens (B,) that follow: what is recorded."""
        logits = self.model.continued(ids[:, None], self.kv)
        self.kv.starts += 1
        ids[...] = self.choose.greatest(logits)     # where the next replay reads them
        return ids

    def __call__(self, tokens: np.ndarray, step: int = 0) -> np.ndarray:
        """Return the tokens (B,) that follow `tokens`, which after the first call are those of the call before."""
        self.kv.require_room((len(tokens), 1))
        chosen: Any = self.captured() if self.started else self.captured(tokens)
        self.started = True
        self.kv.lengths += 1
        return self.choose.checked(chosen.get())


def can_record(model: Decoder, batch: int) -> bool:
    """Return whether a graph may hold what a token of each of `batch` sequences takes.

    That needs a transport without MPI, and kernels of mpitp/ops/cuda alone: products of one row, or of a few that are
    read in vectors.
    """
    group = model.group
    if group.device != "gpu" or not group.transport.records:
        return False
    if batch == 1:
        return True
    from ..ops.cuda.few_rows import MOST
    in_vectors = all(w.ndim < 2 or w.shape[1] % 4 == 0 for w in model.weights.values())
    return batch <= MOST and model.dtype == np.float32 and in_vectors and not group.reproducible
