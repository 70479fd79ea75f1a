"""Tokens to train on: the bytes of a file, or token ids; windows of them by addressed numbers.

Every rank reads the file, and all have the same windows without a word to each other.
"""
import math
import os
import sysconfig
import zlib

import numpy as np

from ..sharding import rng
from ..errors import InputError, require_positive

STANDARD_BYTES = 1 << 22        # of the standard library's sources
HELD_OUT = 20                   # one part in so many, at the end, is for validation


class Tokens:
    """The tokens of a text, and the windows of it that training and validation see.

    Parameters
    ----------
    path : a file, whose bytes are the tokens; a .npy file of integers, which are; None: the sources of Python's
        standard library, the first 4 MiB
    vocab_size : of the model; every token is below
    seq_length : S, tokens of a window. A window has S + 1: each is predicted from those before it
    seed : of the windows
    """

    def __init__(self, path, vocab_size, seq_length, seed):
        require_positive(seq_length=seq_length)
        self.name = "the standard library's sources" if path is None else os.fspath(path)
        self.tokens = standard_library() if path is None else read(path)
        self.seq_length, self.seed = seq_length, seed
        self.held_out = max(len(self.tokens) // HELD_OUT, seq_length + 1)
        needed = 2 * (seq_length + 1)
        if len(self.tokens) < needed:
            raise InputError(f"{self.name}: found {len(self.tokens)} tokens, expected at least {needed}: a window of "
                             f"{seq_length} + 1 to train on and one to validate on")
        largest, smallest = int(self.tokens.max()), int(self.tokens.min())
        if largest >= vocab_size or smallest < 0:
            wrong = largest if largest >= vocab_size else smallest
            at = int(np.argmax(self.tokens == wrong))
            raise InputError(f"{self.name}: found token {wrong} at position {at}, expected 0 to {vocab_size - 1}, "
                             f"below the vocabulary's size")
        self.training, self.validation = self.tokens[:-self.held_out], self.tokens[-self.held_out:]

    def batch(self, number, size):
        """Inputs and targets (size, S) of micro-batch `number`: windows anywhere in the training part."""
        words = rng.words(rng.key(self.seed, "training.windows"), number * size, (number + 1) * size)
        starts = words % np.uint64(len(self.training) - self.seq_length)
        return self.windows(self.training, starts.astype(np.int64))

    def validation_batches(self, size, batches):
        """The same windows each time, spread over the held-out part: yield inputs and targets."""
        most = len(self.validation) - self.seq_length - 1
        count = max(1, min(size * batches, most // self.seq_length + 1))
        starts = np.linspace(0, most, count).astype(np.int64)
        for at in range(0, count, size):
            yield self.windows(self.validation, starts[at:at + size])

    def windows(self, tokens, starts):
        found = tokens[starts[:, None] + np.arange(self.seq_length + 1)].astype(np.int64)
        return found[:, :-1], found[:, 1:]

    def fingerprint(self):
        return f"{len(self.tokens)} tokens, CRC-32 {zlib.crc32(np.ascontiguousarray(self.tokens)):08x}"


def read(path):
    try:
        if os.fspath(path).endswith(".npy"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
                raise InputError(f"{path}: found {tokens.dtype} of shape {tokens.shape}, expected integers in one axis")
            return tokens
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file to train on") from None
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: found {error}, expected a .npy file of integers") from None


def standard_library():
    """The .py files of the standard library's folder by name, one after the other, up to STANDARD_BYTES."""
    folder, parts, size = sysconfig.get_path("stdlib"), [], 0
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and size < STANDARD_BYTES:
            with open(os.path.join(folder, name), "rb") as file:
                parts.append(np.frombuffer(file.read(STANDARD_BYTES - size), np.uint8))
            size += len(parts[-1])
    if not parts:
        raise InputError(f"{folder}: found no .py file, expected the standard library's sources: name a file (--data)")
    return np.concatenate(parts)


def order_2_bits(training, validation, vocab_size=256):
    """Bits a token of a model that counts what follows each pair of tokens: the baseline that a network must beat.

    P(c | a b) = (count(a b c) + alpha P(c | b)) / (count(a b) + alpha), P(c | b) likewise from P(c); alpha is the best
    of a few for the validation part itself, which is generous to the baseline.
    """
    V, best = vocab_size, math.inf
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
