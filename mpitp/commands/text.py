"""Between text and token ids: the tokenizer of a checkpoint folder, prompts on every rank, text as it comes."""
import json
import os

import numpy as np

from ..errors import InputError, require

UNFINISHED = "\N{REPLACEMENT CHARACTER}"        # what decodes from the first bytes of a character alone
MOST_BYTES = 4                                  # of a character in UTF-8, each of which may be a token


def load_tokenizer(folder):
    """The tokenizer of tokenizer.json. Raises InputError without that file, or without the library."""
    path = os.path.join(folder, "tokenizer.json")
    require(os.path.isfile(path), f"no {path}", "the tokenizer of the checkpoint, or ids in place of text: --ids")
    try:
        from tokenizers import Tokenizer        # late: a large vocabulary takes a second
    except ImportError:
        raise InputError("found no tokenizers, expected it for text: pip install 'mpitp[text]', or ids") from None
    try:
        return Tokenizer.from_file(path)
    except Exception as error:                  # the library raises nothing narrower
        raise InputError(f"{path}: found {str(error).splitlines()[0]}, expected a tokenizer") from None


def end_tokens(folder):
    """The ids that end a text: eos_token_id, one or several, of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8") as file:
                    found = json.load(file).get("eos_token_id")
            except (ValueError, AttributeError, RecursionError):
                raise InputError(f"{path}: found no JSON object, expected one") from None
            if found is not None:
                found = found if isinstance(found, list) else [found]
                good = all(isinstance(i, int) and not isinstance(i, bool) for i in found)
                require(good, f"eos_token_id {found} in {path}", "token ids")
                return found
    return []


def parse_ids(text):
    """"1,2,3", or with spaces or lines between, as a list of integers."""
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"found ids {text[:60]!r}, expected integers with commas between") from None


def read_text(path):
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: found bytes that are not UTF-8 at {error.start}, expected text") from None
    except OSError as error:
        raise InputError(f"{path}: found {error.strerror}, expected a file") from None


def give_to_all(group, prompts):
    """Prompts of rank 0, lists of ids, on every rank: ids (B, S), padded with 0, and lengths (B,). Two broadcasts."""
    xp = group.xp
    shape = np.zeros(2, np.int64) if prompts is None else np.array([len(prompts), 1 + max(map(len, prompts))])
    B, width = group.broadcast(xp.asarray(shape)).tolist()
    rows = np.zeros((B, width), np.int64)                       # the first column: lengths
    for row, prompt in zip(rows, prompts or ()):
        row[0], row[1:1 + len(prompt)] = len(prompt), prompt
    rows = group.broadcast(xp.asarray(rows))
    rows = rows if isinstance(rows, np.ndarray) else rows.get()
    return rows[:, 1:], rows[:, 0]


class TextStream:
    """Text of a token at a time.

    A token may be a part of a character, and a space may depend on what stands before. So each is decoded behind a few
    that were given out already, and held back while a character is unfinished.
    """

    def __init__(self, decode, prompt):
        self.decode, self.ids = decode, list(prompt)
        self.start, self.done = max(0, len(prompt) - 2 * MOST_BYTES), len(prompt)      # of the ids in sight, given out

    def push(self, token):
        """The text that is complete with this token, often empty for a part of a character."""
        self.ids.append(int(token))
        before, now = self.decode(self.ids[self.start:self.done]), self.decode(self.ids[self.start:])
        if now.endswith(UNFINISHED) and len(self.ids) - self.done < MOST_BYTES:
            return ""
        self.start, self.done = self.done, len(self.ids)
        return now[len(before):]

    def rest(self):
        """What was held back and will not be completed."""
        before, now = self.decode(self.ids[self.start:self.done]), self.decode(self.ids[self.start:])
        self.done = len(self.ids)
        return now[len(before):]
