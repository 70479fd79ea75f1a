"""Write down what each rank of a tensor-parallel run holds, for `python -m mpitp judge`. One file, to be copied.

It needs NumPy alone, and takes arrays of any framework that has `__array__` or `__dlpack__`, BF16 among them. The
format is that of docs/judge.md: a folder with `run.json`, and a safetensors file of each phase and rank.

    recorder = Recorder("dump", rank, ranks, "mlp", {"hidden_size": 10, "ffn_hidden_size": 41, "activation": "relu"})
    recorder.reference("up.weight", up)                 # whole, as the checkpoint has it: rank 0's are kept
    recorder.forward("x", x)                            # the same on every rank
    recorder.forward("y", y)
    recorder.backward("y", dy)                          # the gradient of y
    recorder.backward("up.weight", d_up, axis=0)        # this rank's rows, ranks in order
    recorder.save()
"""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCHEMA = "mpitp.dump/1"
PHASES = ("reference", "weights", "forward", "backward", "previous")
# NumPy's names of dtypes, and those of the files.
STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
          "bool": "BOOL"}


class Recorder:
    """A recorder keeps copies of one rank's tensors and writes them to a folder that all ranks share.

    Parameters
    ----------
    folder : path
        Where the dump goes. It is made if it is not there.
    rank, ranks : int
        This rank, and how many there are.
    kind : str
        What was computed: "column_linear", "row_linear", "mlp", "attention", "norm", "embedding", "loss", "block",
        "decoder" or "gradient_norm".
    config : dict or dataclass, optional
        The layer in the terms of `mpitp.DecoderConfig`; those that the kind does not need may be left out.
    options : dict, optional
        What is no part of the architecture: "label_smoothing", "ignore_index", "loss_scale", "layer".
    accumulate : str
        The dtype in which products and sums of 16-bit numbers are added up.
    grid : dict, optional
        The ranks by the name of the axis; None: {"tensor": ranks}.

    Raises
    ------
    ValueError
        `rank` is none of the ranks.
    """

    def __init__(self, folder: str | os.PathLike, rank: int, ranks: int, kind: str, config: Any = None, *,
                 options: Mapping[str, Any] | None = None, accumulate: str = "float32",
                 grid: Mapping[str, int] | None = None) -> None:
        if not 0 <= rank < ranks:
            raise ValueError(f"found rank {rank}, expected one of 0 to {ranks - 1}")
        self.folder, self.rank, self.ranks = os.fspath(folder), rank, ranks
        given = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else \
            dict(config or {})
        self.run: dict[str, Any] = {"schema": SCHEMA, "ranks": ranks, "grid": dict(grid or {"tensor": ranks}),
                                    "kind": kind, "config": given, "options": dict(options or {}),
                                    "accumulate": accumulate}
        self.layouts: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, dict[str, tuple[str, np.ndarray]]] = {}

    # --- what is recorded ------------------------------------------------------------------------------------------

    def reference(self, name: str, array: Any) -> None:
        """Record a whole weight, as all ranks together are meant to have it. Rank 0's is kept.

        Parameters
        ----------
        name : str
            Such as "up.weight", [out, in].
        array : array
        """
        if self.rank == 0:
            self.record("reference", name, array)

    def weight(self, name: str, array: Any, axis: int | None = None, ranges: Sequence | None = None) -> None:
        """Record this rank's slice of a weight, which is compared with the whole one where there is a `reference`.

        Parameters
        ----------
        name : str
        array : array
        axis, ranges
            As those of `record`.
        """
        self.record("weights", name, array, axis, ranges)

    def forward(self, name: str, array: Any, axis: int | None = None, ranges: Sequence | None = None,
                partial: bool = False) -> None:
        """Record a tensor of the forward pass: "x", "y", or one between.

        Parameters
        ----------
        name : str
        array : array
        axis, ranges, partial
            As those of `record`.
        """
        self.record("forward", name, array, axis, ranges, partial)

    def backward(self, name: str, array: Any, axis: int | None = None, ranges: Sequence | None = None,
                 partial: bool = False) -> None:
        """Record the gradient of a tensor or weight of this name; "dx" is another word for "x", "dy" for "y".

        Parameters
        ----------
        name : str
        array : array
        axis, ranges, partial
            As those of `record`.
        """
        self.record("backward", {"dx": "x", "dy": "y"}.get(name, name), array, axis, ranges, partial)

    def record(self, phase: str, name: str, array: Any, axis: int | None = None, ranges: Sequence | None = None,
               partial: bool = False) -> None:
        """Record a tensor of any phase; a copy is kept. Every rank records the same names, an empty slice among them.

        Parameters
        ----------
        phase : str
            "reference", "weights", "forward", "backward", or "previous": gradients of the step before.
        name : str
        array : array
            What this rank holds.
        axis : int, optional
            The axis along which the ranks' slices lie. None: every rank has all of it.
        ranges : sequence, optional
            For each rank its [start, stop], or a list of several, along the axis in the whole tensor; ranks may have
            copies of one range. None: the slices follow each other in the order of the ranks.
        partial : bool
            Whether the ranks hold summands in place of the sum.

        Raises
        ------
        ValueError
            A name that was recorded before in this phase, a dtype that the files do not have, no such phase, or an
            axis of a partial sum.
        """
        if phase not in PHASES:
            raise ValueError(f"found phase {phase!r}, expected one of {', '.join(PHASES)}")
        if partial and axis is not None:
            raise ValueError(f"found {name!r} partial and split, expected one of the two")
        of_phase = self.tensors.setdefault(phase, {})
        if name in of_phase:
            raise ValueError(f"found {name!r} twice in {phase}, expected every name once")
        of_phase[name] = to_numpy(array)
        layout: dict[str, Any] = {"layout": "partial" if partial else "replicated" if axis is None else "split"}
        if axis is not None:
            layout["axis"] = int(axis)
            layout["ranges"] = None if ranges is None else [np.asarray(one, dtype=int).tolist() for one in ranges]
        self.layouts.setdefault(phase, {})[name] = layout

    # --- how it is written -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write this rank's files, and on rank 0 `run.json`. No communication: the dump is whole when all returned."""
        os.makedirs(self.folder, exist_ok=True)
        for phase, tensors in self.tensors.items():
            write_safetensors(os.path.join(self.folder, f"{phase}-{self.rank}.safetensors"), tensors)
        if self.rank == 0:
            with open(os.path.join(self.folder, "run.json"), "w", encoding="utf-8") as file:
                json.dump({**self.run, "tensors": self.layouts}, file, indent=1)
                file.write("\n")


def to_numpy(array: Any) -> tuple[str, np.ndarray]:
    """Copy an array of any framework to the host.

    Parameters
    ----------
    array : array
        Something with `__array__` or `__dlpack__`; a DTensor's local part is taken.

    Returns
    -------
    dtype : str
        By its name in safetensors files.
    copy : array
        BF16 as uint16.

    Raises
    ------
    ValueError
        A dtype that the files do not have.
    """
    for method in ("to_local", "detach", "cpu", "get"):         # of DTensor, of torch, of CuPy
        if hasattr(array, method) and not isinstance(array, (np.ndarray, np.generic, Mapping)):
            array = getattr(array, method)()
    kind = str(getattr(array, "dtype", "")).rsplit(".", 1)[-1]
    if kind == "bfloat16":
        if isinstance(array, (np.ndarray, np.generic)):
            return "BF16", np.array(array).view(np.uint16)
        wide = array.float() if hasattr(array, "float") else array.astype("float32")    # exact: it is a longer BF16
        return "BF16", (np.array(wide, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    copy = np.array(array if hasattr(array, "__array__") or not hasattr(array, "__dlpack__") else np.from_dlpack(array))
    if copy.dtype.name not in STORED:
        raise ValueError(f"found dtype {copy.dtype}, expected one of {', '.join(STORED)}")
    return STORED[copy.dtype.name], copy.astype(copy.dtype.newbyteorder("<"), order="C", copy=False)


def write_safetensors(path: str, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """Write {name: (dtype, array)} to a file: the header's length in 8 bytes, the header in JSON, the numbers."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
