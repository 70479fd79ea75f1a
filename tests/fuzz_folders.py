"""Damaged and hostile folders without end: python tests/fuzz_folders.py --minutes 10 [--seed N] [--keep FOLDER]

A case is a recipe: a tiny checkpoint or step folder, and changes to its files. Each is tried in a process of its own,
which must end as load_model or resume may end: the weights that the format's own library reads, or one InputError of
one line that prints; never a crash, and at no cost before the refusal beyond 2 s and ten times the folder's bytes plus
64 MiB. Recipes that do not are kept as JSON; tests/data/fuzz holds such as once did not, and test_fuzz.py tries them.
"""
import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

import make_tiny_checkpoints as tiny

import mpitp
from mpitp.checkpoints import steps
from mpitp.checkpoints.families.layout import View
from mpitp.config import DecoderConfig
from mpitp.errors import printable
from mpitp.training.data import Tokens
from mpitp.training.loop import Trainer
from mpitp.training.resume import resume
from mpitp.training.settings import Settings

CORPUS = Path(__file__).parent / "data" / "fuzz"
SECONDS, TIMES, PLUS = 2, 10, 64 << 20
HANGS = 20              # seconds of wall clock
BASES = sorted(tiny.CASES) + ["steps"] * 12
NASTY = [None, True, False, 0, -1, 1, 2, 3, 7, 1 << 16, 1 << 31, 1 << 40, 1 << 62, 10 ** 30, -1 << 63, 0.0, -0.5,
         1e-300, 1e300, 1.5, "", "x",
         "a\n\x1b[31mmpitp: fine", "../..", "\ud800", [], [0], [[]] * 5, {}, {"a": 1}, [1, 2, 3],
         {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "yarn", "factor": 1e-300},
         {"rope_type": "llama3", "factor": 1}, {"type": "longrope", "factor": 2}, {"rope_type": "dynamic", "factor": 0}]
SIZES = [0, 1, 2, 37, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 59]
TEXTS = ["", "{", "[]", "null", "[" * 100_000, '{"a": ' * 2000, "1" * 10_000, '"x"', "\ufeff{}", '{"a": 1, "a": 2}',
         "NaN", "{" + ", ".join(f'"{i}": []' for i in range(200_000)) + "}", '{"a": [' + "0," * 3_000_000 + "0]}",
         "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"]
NOTHING_TO_CHANGE = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError,
                     RecursionError)
MOST = 1 << 26          # bytes of a file that is changed once more
KINDS = ["pipe", "zero", "folder", "loop", "gone", "sparse"]


# --- recipes ---------------------------------------------------------------------------------------------------

def draw(dice):
    """A recipe."""
    base = dice.choice(BASES)
    recipe = {"base": base, "shards": dice.choice([1, 1, 3]) if base != "steps" else 1, "changes": []}
    kinds = ["key", "key", "key", "rope", "tensor", "tensor", "flip", "flip", "cut", "name", "text", "special", "where",
             "layers", "twice"]
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        recipe["changes"].append([dice.choice(kinds), dice.randrange(1 << 30), dice.randrange(1 << 30),
                                  dice.randrange(1 << 30)])
    return recipe


def pick(items, number):
    """One of some items, by a number of the recipe."""
    return items[number % len(items)]


def make(recipe, folder, whole_steps):
    """Write the folder of a recipe."""
    if recipe["base"] == "steps":
        shutil.copytree(whole_steps, folder)
    else:
        tiny.write(folder, tiny.load(recipe["base"]), shards=recipe["shards"])
    for change in recipe["changes"]:
        with contextlib.suppress(*NOTHING_TO_CHANGE):       # an earlier change has left nothing that fits
            CHANGES[change[0]](folder, *change[1:])


def files_of(folder, ending=""):
    return sorted(path for path in folder.rglob("*" + ending)
                  if path.is_file() and not path.is_symlink() and path.stat().st_size < MOST)


def change_json(path, change):
    if not path.is_file() or path.stat().st_size >= MOST:
        return                                  # a pipe by now, or 64 GiB of nothing
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def change_key(folder, a, b, c):
    path = pick([path for path in files_of(folder, ".json") if "index" not in path.name], a)
    values = json.loads(path.read_text())
    inside = [values, *(value for value in values.values() if isinstance(value, dict))]
    where = pick(inside, b) if a % 3 == 0 else values
    where[pick(sorted(where), b)] = pick(NASTY, c)
    path.write_text(json.dumps(values))


def change_rope(folder, a, b, c):
    names = ["rope_parameters", "rope_scaling"]
    kind = pick(["default", "linear", "llama3", "yarn", "dynamic", "longrope", "su", "proportional"], a)
    keys = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    keys[pick([*keys, "mscale", "mscale_all_dim", "attention_factor", "beta_fast", "beta_slow", "truncate",
               "partial_rotary_factor"], b)] = pick(NASTY, c)
    change_json(folder / "config.json", lambda values: values.update({pick(names, b // 64): keys}))


def headers(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + size]), content[8 + size:]


def write_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_tensor(folder, a, b, c):
    path = pick(files_of(folder, ".safetensors"), a)
    header, data = headers(path)
    entry = header[pick(sorted(set(header) - {"__metadata__"}), b)]
    field = pick(["dtype", "shape", "data_offsets", "empty"], c)
    if field == "dtype":
        entry["dtype"] = pick(["F64", "BF16", "I8", "F8_E4M3", "BOOL", None, 3], a)
    elif field == "shape":
        entry["shape"] = pick([[pick(SIZES, a)], [0, pick(SIZES, a)], [1 << 30, 1 << 29], entry["shape"][::-1], "x",
                               [-1], [1.0], [1] * 40, []], b)
    elif field == "data_offsets":
        entry["data_offsets"] = pick([[0, pick(SIZES, a)], [pick(SIZES, a), 0], [1], "x", None, [-1, 3]], b)
    else:
        entry["shape"], entry["data_offsets"] = [0, pick(SIZES, a)], [entry["data_offsets"][0]] * 2
    write_header(path, header, data)


def change_flip(folder, a, b, c):
    path = pick(files_of(folder), a)
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" and c % 3 else len(content)
    content[b % min(size, len(content))] ^= 1 << c % 8
    path.write_bytes(bytes(content))


def change_cut(folder, a, b, c):
    path = pick(files_of(folder), a)
    os.truncate(path, b % (path.stat().st_size + 1))


def change_name(folder, a, b, c):
    path = pick(files_of(folder, ".safetensors"), a)
    header, data = headers(path)
    new = pick(["", "x", "a\nmpitp: every check holds", "\x1b[2J", "\u202e", "n" * 100_000, "__metadata__",
                pick(sorted(header), c)], c)
    old = pick(sorted(set(header) - {"__metadata__"}), b)
    write_header(path, {new if name == old else name: entry for name, entry in header.items()}, data)


def change_text(folder, a, b, c):
    pick(files_of(folder), a).write_text(pick(TEXTS, b))


def change_special(folder, a, b, c):
    path, kind = pick(files_of(folder), a), pick(KINDS, b)
    if kind == "sparse":
        return os.truncate(path, 1 << 36)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to({"zero": "/dev/zero", "loop": path.name}[kind])


def change_where(folder, a, b, c):
    def change(values):
        where = values["weight_map"]
        others = [*where.values(), "../x", "/dev/zero", "config.json", "", 3, None, "a\nb"]
        where[pick(sorted(where), a)] = pick(others, b)
    change_json(pick(files_of(folder, ".index.json"), a), change)


def change_layers(folder, a, b, c):
    """Many small or empty tensors, and as many layers."""
    path = pick(files_of(folder, ".safetensors"), a)
    header, data = headers(path)
    for i in range(pick([100, 3000, 20_000], b)):
        shape = pick([[0], [0, 1 << 40], [0, 0]], c)
        header[f"model.layers.{i}.x.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    write_header(path, header, data)
    if (folder / "config.json").exists():
        change_json(folder / "config.json", lambda values: values.update(
            {key: pick([100, 3000, 20_000], b) for key in ("num_hidden_layers", "n_layer") if key in values}
            | ({"hidden_size": pick([20, 1 << 16], c), "vocab_size": 37} if c % 2 else {})))


def change_twice(folder, a, b, c):
    path = pick(files_of(folder, ".json"), a)
    text = path.read_text()
    key = pick(sorted(json.loads(text)), b)
    path.write_text(text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(pick(NASTY, c))}}}")


CHANGES = {name.removeprefix("change_"): function for name, function in list(globals().items())
           if name.startswith("change_") and name != "change_json"}


# --- one case ----------------------------------------------------------------------------------------------------

def trainer(group, folder):
    """A run of 4 steps in a folder, saved at 2 and at 4."""
    config = DecoderConfig(27, 20, 2, 5, 1, activation="silu", gated=True, normalization="rmsnorm")
    settings = Settings(micro_batch_size=1, train_iters=4, lr_decay_iters=4, save_interval=2, eval_batches=1)
    text = Path(folder).parent / "text"
    text.write_bytes(bytes(i * i % 27 for i in range(300)))
    return Trainer(group, config, Tokens(text, 27, 5, 0), settings, folder=str(folder), say=lambda line: None)


def outcome(group, folder, is_run):
    """Load it or resume from it: what was refused, "" where nothing was. Raises AssertionError for other weights."""
    warnings.simplefilter("ignore")
    try:
        if is_run:
            made = trainer(group, folder)
            made.settings = Settings(**{**made.settings.__dict__, "train_iters": 5})
            resume(made)
            return ""
        model = mpitp.load_model(folder, group)
    except mpitp.InputError as error:
        text = str(error)
        assert text == printable(text) and len(text) < 3000 and "found" in text and "expected" in text, text
        return text
    from safetensors.numpy import load_file
    stored = {}
    for name in model.folder.checkpoint.files:
        stored.update(load_file(folder / name))
    for name, spec in model.specs.items():
        layout = model.folder.layouts[name]
        expected = View({name: InMemory(stored[name]) for name in layout.names}, layout)[spec.window(group.place)]
        assert model.weights[name].tobytes() == expected.tobytes(), name
    return ""


class InMemory:
    """What View reads from: an array of the reference library."""

    def __init__(self, array):
        self.array, self.dtype = array, "F32"

    def read(self, window, out):
        out[...] = self.array[window].astype("f")


def stored_bytes(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def attempt(group, recipe, whole_steps):
    """Try a recipe in a process of its own. Returns (finding or "", what was refused)."""
    with tempfile.TemporaryDirectory(prefix="mpitp-fuzz-") as parent:
        folder = Path(parent) / "case"
        make(recipe, folder, whole_steps)
        allowed = TIMES * stored_bytes(folder) + PLUS
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                signal.alarm(HANGS)
                # A forked process counts the pages of its parent as its own: only what comes on top is its cost.
                before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, time.process_time()
                try:
                    refused, finding = outcome(group, folder, recipe["base"] == "steps"), ""
                except BaseException:
                    refused, finding = "", traceback.format_exc()
                took = time.process_time() - started
                cost = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
                if not finding and refused and took > SECONDS:
                    finding = f"{took:.1f} s before the refusal: {refused[:200]}"
                if not finding and cost > allowed:
                    finding = f"{cost >> 20} MiB of {allowed >> 20}: {refused[:200]}"
                os.write(writer, json.dumps([finding[-4000:], refused[:500]]).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        if not said:
            return f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended without a word", ""
        return tuple(json.loads(said))


def make_steps(group, folder):
    """The folder of a run, from which those of recipes are copied."""
    folder.mkdir(parents=True)
    trainer(group, folder).run()
    assert steps.steps(str(folder)) == [2, 4]
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where recipes with a finding go")
    arguments = parser.parse_args()
    dice, started, tried, refused, kinds = random.Random(arguments.seed), time.monotonic(), 0, 0, {}
    with mpitp.TensorParallelGroup() as group, tempfile.TemporaryDirectory() as scratch:
        whole = make_steps(group, Path(scratch) / "run" / "whole")
        while time.monotonic() - started < 60 * arguments.minutes:
            recipe = draw(dice)
            finding, text = attempt(group, recipe, whole)
            tried, refused = tried + 1, refused + bool(text)
            if finding:
                last = finding.strip().splitlines()[-1]
                kinds.setdefault(last[:60], []).append(recipe)
                if len(kinds[last[:60]]) == 1:
                    arguments.keep.mkdir(exist_ok=True)
                    name = arguments.keep / f"{arguments.seed}-{tried}.json"
                    name.write_text(json.dumps({**recipe, "finding": finding}, indent=1) + "\n")
                    print(f"{name}: {last[:300]}", flush=True)
    found = sum(map(len, kinds.values()))
    print(f"{tried} folders in {time.monotonic() - started:.0f} s: {refused} refused, {tried - refused - found} "
          f"loaded, {found} findings of {len(kinds)} kinds")
    return 1 if found else 0


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
