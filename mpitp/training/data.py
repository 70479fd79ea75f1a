"""Tokens to train on: the bytes of a file, or token ids; windows of them by addressed numbers.

Every rank reads the file, and all have the same windows without communication.
"""
from __future__ import annotations

import codecs
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator

import numpy as np

from ..checkpoints.json_files import require_file
from ..errors import InputError, require, require_positive
from ..sharding import rng
from .token_file import TokenFile, pieces, windows

STANDARD_BYTES = 1 << 22        # of the standard library's sources
HELD_OUT = 20                   # one part in so many, at the end, is for validation
IGNORED = -100                  # a target that does not count
DTYPES = ("uint8", "uint16", "uint32")
# llm.c's files (github.com/karpathy/llm.c, dev/data/data_common.py): (magic number, version) of a header of 256 int32.
HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
HEADER_WORDS = 256
SAMPLE, FEWEST = 1 << 16, 512   # bytes that look_like_words compares, at most and at least
DISTINCT = 0.05                 # more than chance makes of the histograms' difference


class Tokens:
    """The tokens of a text, and the windows of it that training and validation see.

    Parameters
    ----------
    path : str or None
        A file, whose bytes are the tokens; a .npy file of integers; a file of llm.c, by its magic number. None: the
        sources of Python's standard library, the first 4 MiB.
    vocab_size : int
        Of the model; every token is below.
    seq_length : int
        S, tokens of a window. A window has S + 1: each is predicted from those before it.
    seed : int
        Of the windows.
    dtype : str, optional
        Of a file without a header, such as nanoGPT's: "uint8" (None), "uint16" or "uint32", little-endian.
    ids : (N,) array of int, optional
        What a tokenizer made of the file, which is not read then.

    Attributes
    ----------
    are_bytes : bool
        Whether token i is byte i, as far as is known: not of a .npy file, whatever its integers are.

    Raises
    ------
    InputError
        For a file that cannot be read or is too short, and for a token outside of the vocabulary.
    """

    def __init__(self, path: str | None, vocab_size: int, seq_length: int, seed: int, dtype: str | None = None,
                 ids: np.ndarray | None = None):
        require_positive(seq_length=seq_length)
        self.name = "the standard library's sources" if path is None else os.fspath(path)
        self.tokens: np.ndarray | TokenFile = ids if ids is not None else read_tokens(path, dtype)
        self.are_bytes = ids is None and self.tokens.dtype == np.uint8 and not self.name.endswith(".npy")
        self.seq_length, self.seed = seq_length, seed
        self.held_out = max(len(self.tokens) // HELD_OUT, seq_length + 1)
        needed = 2 * (seq_length + 1)
        if len(self.tokens) < needed:
            raise InputError(f"{self.name}: found {len(self.tokens)} tokens, expected at least {needed}: a window of "
                             f"{seq_length} + 1 to train on and one to validate on")
        self.require_below(vocab_size)
        self.training, self.validation = self.tokens[:-self.held_out], self.tokens[-self.held_out:]

    def require_below(self, vocab_size: int) -> None:
        """Raise InputError for the first token outside of the vocabulary."""
        at = 0
        for piece in pieces(self.tokens):
            if int(piece.max()) >= vocab_size or int(piece.min()) < 0:
                first = int(np.argmax((piece >= vocab_size) | (piece < 0)))
                raise InputError(f"{self.name}: found token {piece[first]} at position {at + first}, expected 0 to "
                                 f"{vocab_size - 1}, below the vocabulary's size")
            at += len(piece)

    def batch(self, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets (size, S) of batch `number`: windows anywhere in the training part.

        A batch is those of the smaller ones that it consists of: what a step sees does not depend on how it is cut.
        """
        words = rng.words(rng.key(self.seed, "training.windows"), number * size, (number + 1) * size)
        starts = words % np.uint64(len(self.training) - self.seq_length)
        return self.windows(self.training, starts.astype(np.int64))

    def validation_batches(self, size: int, batches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield inputs and targets of windows that are spread over the held-out part, the same ones each time."""
        most = len(self.validation) - self.seq_length - 1
        count = max(1, min(size * batches, most // self.seq_length + 1))
        starts = np.linspace(0, most, count).astype(np.int64)
        for at in range(0, count, size):
            yield self.windows(self.validation, starts[at:at + size])

    def windows(self, tokens: np.ndarray | TokenFile, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets (windows, S) of the windows that begin there."""
        found = windows(tokens, starts, self.seq_length + 1)
        return found[:, :-1], found[:, 1:]

    def fingerprint(self) -> str:
        """Return what tells these tokens from others."""
        checksum = 0
        for piece in pieces(self.tokens):
            checksum = zlib.crc32(piece.data, checksum)
        return f"{len(self.tokens)} tokens, CRC-32 {checksum:08x}"


def read_tokens(path: str | None, dtype: str | None) -> np.ndarray | TokenFile:
    """Return the tokens of a file, or the standard library's sources."""
    return standard_library() if path is None else read(path, dtype)


def read(path: str, dtype: str | None = None) -> TokenFile:
    """Return the tokens of a file, as Tokens describes it. Raises InputError where they cannot be read."""
    require(dtype is None or dtype in DTYPES, f"data dtype {dtype!r}", f"one of {', '.join(DTYPES)}, or None")
    require_file(path, "a file to train on")
    try:
        if os.fspath(path).endswith(".npy"):
            require(dtype is None, f"data dtype {dtype!r} for {path}", "none: a .npy file says its own")
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(tokens, np.memmap):
                raise InputError(f"{path}: found an archive of arrays, expected a .npy file of integers")
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise InputError(f"{path}: found {tokens.dtype} of shape {tokens.shape}, expected integers in one axis")
            return TokenFile(path, tokens.dtype, tokens.offset, len(tokens))    # no byte of the map is touched
        header = np.fromfile(path, "<i4", HEADER_WORDS)
        if dtype != "uint8" and len(header) == HEADER_WORDS and tuple(header[:2]) in HEADERS:
            return with_header(path, header, dtype)
        return words(path, np.dtype(dtype or "uint8"))
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file to train on") from None
    except InputError:
        raise
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: found {error}, expected a .npy file of integers") from None


def holds_ids(path: str, dtype: str | None) -> bool:
    """Return whether a file has token ids in place of text: by the dtype that is named, its ending, or its header."""
    if dtype is not None or os.fspath(path).endswith(".npy"):
        return True
    try:
        header = np.fromfile(path, "<i4", HEADER_WORDS)
    except OSError:                             # whoever reads it says so
        return False
    return len(header) == HEADER_WORDS and tuple(header[:2]) in HEADERS


def with_header(path: str, header: np.ndarray, dtype: str | None) -> TokenFile:
    """Return the tokens behind the 256 words of a header: magic number, version, how many tokens follow."""
    found = HEADERS[tuple(header[:2])]
    require(dtype in (None, found), f"data dtype {dtype!r} for {path}",
            f"{found}, as the magic number {header[0]} says")
    tokens = words(path, np.dtype(found), header.nbytes)
    if len(tokens) != header[2]:
        raise InputError(f"{path}: found {len(tokens)} tokens behind the header, expected {header[2]}, as it says")
    return tokens


def words(path: str, dtype: np.dtype, start: int = 0) -> TokenFile:
    """Return the rest of a file as little-endian integers."""
    size = os.path.getsize(path) - start
    if size % dtype.itemsize:
        raise InputError(f"{path}: found {size} bytes of tokens, expected a multiple of {dtype.itemsize}, as "
                         f"{dtype} has")
    return TokenFile(path, dtype.newbyteorder("<"), start, size // dtype.itemsize)


def look_like_words(tokens: np.ndarray | TokenFile) -> bool:
    """Return whether bytes look like halves of 16-bit integers: those at even and odd places differ in kind.

    Half the sum of the differences between the two histograms is 1 where they have no byte in common, and near what
    chance makes of it where they are of one kind (measured: random bytes 0.05 of 65,536; ids by Zipf's law 0.81). Text
    is never taken for integers: columns of a table may stand at even places, too.
    """
    sample = np.asarray(tokens[:SAMPLE])
    if tokens.dtype != np.uint8 or len(sample) < FEWEST or is_text(sample.tobytes()):
        return False
    even, odd = (np.bincount(part, minlength=256) / len(part) for part in (sample[::2], sample[1::2]))
    p = (even + odd) / 2
    chance = float(np.sqrt(4 * p * (1 - p) / (np.pi * len(sample) / 2)).sum()) / 2
    return float(np.abs(even - odd).sum()) / 2 > chance + DISTINCT


def is_text(sample: bytes) -> bool:
    """Return whether bytes are UTF-8 without control characters, but for a character that the end cuts."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return False
    return not any(character < " " and character not in "\t\n\r\f" for character in text)


def standard_library() -> np.ndarray:
    """Read the .py files of the standard library's folder by name, one after the other, up to STANDARD_BYTES."""
    folder, parts, size = sysconfig.get_path("stdlib"), [], 0
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and size < STANDARD_BYTES:
            with open(os.path.join(folder, name), "rb") as file:
                parts.append(np.frombuffer(file.read(STANDARD_BYTES - size), np.uint8))
            size += len(parts[-1])
    if not parts:
        raise InputError(f"{folder}: found no .py file, expected the standard library's sources: name a file (--data)")
    return np.concatenate(parts)


def order_2_bits(training: np.ndarray | TokenFile, validation: np.ndarray | TokenFile,
                 vocab_size: int = 256) -> float:
    """Bits a token of a model that counts which token follows each pair: the baseline that a network must beat.

    P(c | a b) = (count(a b c) + alpha P(c | b)) / (count(a b) + alpha), and P(c | b) in the same way from P(c); alpha
    is the best of a few for the validation part itself, which is generous to the baseline.
    """
    V, best, training, validation = vocab_size, math.inf, np.asarray(training), np.asarray(validation)
    a, b, c = (training[i:len(training) - 2 + i].astype(np.int64) for i in range(3))
    x, y, z = (validation[i:len(validation) - 2 + i].astype(np.int64) for i in range(3))
    of_three, of_pair = np.bincount((a * V + b) * V + c, minlength=V ** 3), np.bincount(a * V + b, minlength=V ** 2)
    of_two, of_first = np.bincount(b * V + c, minlength=V ** 2), np.bincount(b, minlength=V)
    of_one = (np.bincount(c, minlength=V) + 1) / (len(c) + V)
    for alpha in (0.1, 0.3, 1, 3, 10, 30, 100):
        p = of_one[z]
        p = (of_two[y * V + z] + alpha * p) / (of_first[y] + alpha)
        p = (of_three[(x * V + y) * V + z] + alpha * p) / (of_pair[x * V + y] + alpha)
        best = min(best, float(-np.log2(p).mean()))
    return best
