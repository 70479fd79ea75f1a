"""Folders of a model on disk: written in place by all ranks, complete or not there, the same bytes from any number.

Rank 0 makes NAME.partial with every file in its full size; each rank writes what it owns where it belongs, rank 0 also
what is replicated; when all of it is on disk, rank 0 gives the folder its name. Checkpoints of the hub's kind
(saving.py) and step folders of a training run (steps.py) are both written so.
"""
from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..arrays import Array, on_host
from ..comm.agreement import require_everywhere
from ..comm.group import TensorParallelGroup
from ..errors import InputError, require
from ..sharding.parameters import ParameterSpec
from .families.layout import Layout
from .safetensors import SafetensorsFile
from .tensor_writer import TensorWriter, create


@dataclass(frozen=True)
class StoredSlice:
    """A rank's slice of a parameter, and the stored tensor that it belongs into.

    spec : ParameterSpec
    array : what this rank holds of the parameter
    layout : Layout, the tensor and where in it the parameter lies
    dtype : of the tensor, by its name in the file ("F32")
    """
    spec: ParameterSpec
    array: Array
    layout: Layout
    dtype: str

    def owned(self, group: TensorParallelGroup) -> Iterator[tuple[str, tuple, Array]]:
        """Yield (a stored tensor, a window of it, its values on the host) for what this rank alone writes."""
        spec = self.spec
        if spec.axis is None and group.rank != spec.owner():
            return
        window = [slice(0, n) for n in spec.shape]
        if spec.axis is not None:
            window[spec.axis] = spec.partition(group.place).range(group.rank)
        mine = self.array[spec.owned(group.place)]
        for rows, name, stored in self.layout.pieces(tuple(window)):
            values = on_host(mine[rows])
            yield name, stored, values.T if self.layout.transposed else values


def write_folder(group: TensorParallelGroup, path: str, files: Mapping[str, Iterable[StoredSlice]],
                 documents: Mapping[str, str], *, metadata: Mapping[str, str] | None = None,
                 companions: Iterable[str] = (), replace: bool = False) -> None:
    """Write a folder of safetensors files and documents, all of it or nothing.

    Parameters
    ----------
    group : TensorParallelGroup
    path : str
        The folder to make, absolute; its parent exists.
    files : {file name: StoredSlices}
        The tensors of each safetensors file, in the order in which they lie there.
    documents : {file name: text}
    metadata : {text: text}, optional
        Of every safetensors file.
    companions : paths, optional
        Files that rank 0 copies into the folder.
    replace : bool, optional
        Whether a folder of this name, or what a job that was killed left of one, gives way. Else both are refused.

    Raises
    ------
    InputError
        On every rank, when any rank cannot write. Nothing of the folder is left then.

    Notes
    -----
    Collective: two on_root and one verdict, no data.
    """
    partial = f"{path}.partial"
    group.on_root(lambda: prepare(partial, files, documents, metadata, companions, replace))
    try:
        require_everywhere(group.comm, "whether the folder could be written",
                           lambda: write_slices(group, partial, files))
        group.on_root(lambda: finish(partial, path, replace))
    except InputError:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def prepare(partial: str, files: Mapping[str, Iterable[StoredSlice]], documents: Mapping[str, str],
            metadata: Mapping[str, str] | None, companions: Iterable[str], replace: bool) -> None:
    """Make the folder under its first name: files in their full size, documents, companions. Rank 0 alone."""
    if replace:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        os.mkdir(partial)
    except OSError as error:
        raise InputError(f"{partial}: found {error.strerror}, expected to make it (what a save that ended early left "
                         f"there may be removed)") from None
    try:
        for file, slices in files.items():
            tensors = {name: (part.dtype, part.layout.stored_shape) for part in slices for name in part.layout.names}
            path = os.path.join(partial, file)
            reserve(path, create(path, tensors, metadata))
        for name, text in documents.items():
            with open(os.path.join(partial, name), "w", encoding="utf-8") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
        for source in companions:
            shutil.copyfile(source, os.path.join(partial, os.path.basename(source)))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{partial}: found {error.strerror}, expected room for a checkpoint") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def reserve(path: str, size: int) -> None:
    """Find out before anything is written whether the disk has room for a file of this many bytes."""
    with open(path, "r+b") as made:
        try:
            os.posix_fallocate(made.fileno(), 0, size)
        except AttributeError:                  # macOS
            pass
        except OSError as error:                # some file systems cannot say
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def write_slices(group: TensorParallelGroup, partial: str, files: Mapping[str, Iterable[StoredSlice]]) -> str:
    """Write what this rank owns; when it returns, that is on disk."""
    try:
        for file, slices in files.items():
            path = os.path.join(partial, file)
            writer = TensorWriter(path, SafetensorsFile(path).tensors)
            for part in slices:
                for name, window, values in part.owned(group):
                    writer.write(name, window, values)
            writer.close()
    except OSError as error:
        raise InputError(f"{partial}: found {error.strerror}, expected to write it") from None
    return "written"


def finish(partial: str, path: str, replace: bool) -> None:
    """Give the folder its name, after its entries are on disk. Rank 0 alone."""
    try:
        sync_folder(partial)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        require(not os.path.lexists(path) or is_empty(path), path, "a path where nothing is")
        os.rename(partial, path)                # which an empty folder gives way to, and no other one
        sync_folder(os.path.dirname(path))
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected to write it") from None


def is_empty(path: str) -> bool:
    """Return whether a path is an empty folder, not a link to one."""
    return os.path.isdir(path) and not os.path.islink(path) and not os.listdir(path)


def sync_folder(folder: str) -> None:
    """Wait until the names of the folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
