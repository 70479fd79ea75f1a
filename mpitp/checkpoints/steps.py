"""Step folders of a training run: written in place by all ranks, complete or not there, the same bytes from any P.

    OUT/step-00000200/model.safetensors       the weights
                      optimizer.safetensors   exp_avg.NAME and exp_avg_sq.NAME of each
                      state.json              step, model, settings
"""
import errno
import json
import os
import re
import shutil

from ..comm.agreement import require_everywhere
from ..arrays import on_host
from ..errors import InputError, require
from .safetensors import SafetensorsFile, read_json
from .tensor_writer import TensorWriter, create

STORED = {"float32": "F32", "float64": "F64"}
STEP = re.compile(r"step-(\d{8})$")
PARTIAL = re.compile(r"\.?step-\d{8}\.(partial|old)$")


def save(group, folder, step, files, state, keep=0):
    """Write a step folder. Collective, no data; InputError on every rank when one could not write.

    Parameters
    ----------
    folder : of the run, there already
    files : {file name: {tensor name: (spec, this rank's slice)}}
    state : what state.json holds
    keep : how many of the newest step folders stay, 0 for all

    Rank 0 makes the folder under another name and the files in their full size; every rank writes what it owns where it
    belongs, rank 0 what is replicated; when all is on disk the folder gets its name.
    """
    path = os.path.join(folder, f"step-{step:08d}")
    partial = f"{path}.partial"
    try:
        group.root_first(lambda: prepare(partial, files, state) if group.rank == 0 else None)
        require_everywhere(group.comm, "whether the checkpoint could be written", lambda: write(group, partial, files))
        group.root_first(lambda: finish(folder, partial, path, keep) if group.rank == 0 else None)
    except InputError:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def prepare(partial, files, state):
    """The folder under its first name, its files in their full size, and state.json."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        os.mkdir(partial)
        for file, tensors in files.items():
            path = os.path.join(partial, file)
            shapes = {name: (STORED[array.dtype.name], spec.shape) for name, (spec, array) in tensors.items()}
            reserve(path, create(path, shapes))
        with open(os.path.join(partial, "state.json"), "w") as out:
            json.dump(state, out, indent=1, sort_keys=True)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise InputError(f"{partial}: found {error.strerror}, expected room for a checkpoint") from None


def reserve(path, size):
    """Find out now, and not in the middle of writing, whether there is room."""
    with open(path, "r+b") as made:
        try:
            os.posix_fallocate(made.fileno(), 0, size)
        except AttributeError:                  # macOS
            pass
        except OSError as error:                # some file systems cannot say
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def write(group, partial, files):
    """Write what this rank owns; when it returns that is on disk."""
    try:
        for file, tensors in files.items():
            path = os.path.join(partial, file)
            writer = TensorWriter(path, SafetensorsFile(path).tensors)
            for name, (spec, array) in tensors.items():
                if spec.axis is None and group.rank != spec.owner():
                    continue
                window = [slice(0, n) for n in spec.shape]
                if spec.axis is not None:
                    window[spec.axis] = spec.partition(group.place).range(group.rank)
                mine = array[spec.owned(group.place)]
                writer.write(name, tuple(window), on_host(mine))
            writer.close()
    except OSError as error:
        raise InputError(f"{partial}: found {error.strerror}, expected to write it") from None
    return "written"


def finish(folder, partial, path, keep):
    """Give the folder its name after its entries are on disk; old ones lose theirs before they go."""
    sync_folder(partial)
    shutil.rmtree(path, ignore_errors=True)     # of an earlier run that this one repeats
    os.rename(partial, path)
    sync_folder(folder)
    for step in steps(folder)[:-keep] if keep else []:
        old = os.path.join(folder, f"step-{step:08d}")
        os.rename(old, f"{old}.old")
        shutil.rmtree(f"{old}.old", ignore_errors=True)


def sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def steps(folder):
    """The steps of the complete folders, in order."""
    return sorted(int(match.group(1)) for match in map(STEP.match, os.listdir(folder)) if match)


def clean(folder):
    """Remove what a run that was killed left half-written or half-removed; returns the names."""
    left = sorted(name for name in os.listdir(folder) if PARTIAL.match(name))
    for name in left:
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    return left


def read_state(folder, step):
    return read_json(os.path.join(folder, f"step-{step:08d}", "state.json"))


def load(group, folder, step, files):
    """Fill the slices that a rank holds from a step folder, whatever number of ranks wrote it.

    files : as save's. Raises InputError, on every rank and before anything is changed, unless the names and shapes fit.
    """
    path = os.path.join(folder, f"step-{step:08d}")

    def look():
        opened = {}
        for file, tensors in files.items():
            opened[file] = stored = SafetensorsFile(os.path.join(path, file))
            found = {name: (dtype, shape) for name, (dtype, shape, *_) in stored.tensors.items()}
            for name, (spec, array) in tensors.items():
                expected = STORED[array.dtype.name], tuple(spec.shape)
                require(found.get(name) == expected, f"{file}: {name} {found.get(name, 'missing')}",
                        f"{expected}: the same model and dtype")
            extra = found.keys() - tensors.keys()
            require(not extra, f"{file}: {len(extra)} unexpected tensors, {min(extra, default='')} first", "none")
        return opened

    for file, stored in group.root_first(look).items():
        for name, (spec, array) in files[file].items():
            window = spec.window(group.place)
            array[...] = group.xp.asarray(stored[name][window])
