"""Whether all ranks read the same folder. Paths may differ between hosts, contents may not: other weights of the same
shapes on one rank give another text, without an error."""
from __future__ import annotations

import hashlib
import os

from .safetensors import Checkpoint, SafetensorsFile

DOCUMENTS = ("config.json", "generation_config.json", "model.safetensors.index.json", "state.json")
SAMPLES, SAMPLE = 2048, 64      # pieces of a folder, and bytes of each, that are compared unless all bytes are
PIECE = 1 << 20                 # bytes that are read at a time where all are


def fingerprint(checkpoint: Checkpoint, every_byte: bool = False) -> dict[str, str]:
    """Return {file name: its size and a digest} of what all ranks read of a checkpoint folder.

    Parameters
    ----------
    checkpoint : Checkpoint
    every_byte : bool, optional
        Digest all bytes of all files. Otherwise of a weight file its header, and SAMPLE bytes in the middle of each of
        its tensors, of up to SAMPLES tensors of the folder: enough to tell other weights, not a bit that flipped.

    Returns
    -------
    dict
        Texts, for a message.
    """
    found = {}
    for name in DOCUMENTS:
        path = os.path.join(checkpoint.folder, name)
        if os.path.isfile(path):
            found[name] = of_bytes(path)
    step = 1 + sum(len(file.tensors) for file in checkpoint.files.values()) // SAMPLES
    for name, file in checkpoint.files.items():
        found[name] = of_bytes(file.path) if every_byte else of_samples(file, step)
    return found


def of_bytes(path: str) -> str:
    """Return the size of a file and a digest of its bytes."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            size += len(piece)
    return text_of(size, digest.hexdigest())


def of_samples(file: SafetensorsFile, step: int) -> str:
    """Return the size of a weight file, and a digest of its header and of a piece of every step-th of its tensors."""
    digest, size = hashlib.sha256(), os.path.getsize(file.path)
    bounds = sorted((begin, end) for *_, begin, end in file.tensors.values())
    with open(file.path, "rb") as opened:
        digest.update(opened.read(bounds[0][0] if bounds else size))
        for begin, end in bounds[::step]:
            opened.seek(begin + max(0, end - begin - SAMPLE) // 2)
            digest.update(opened.read(min(SAMPLE, end - begin)))
    return text_of(size, digest.hexdigest())


def text_of(size: int, digest: str) -> str:
    """Return the text that messages show."""
    return f"{size} bytes, SHA-256 {digest[:16]}"
