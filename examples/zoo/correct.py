"""Right programs: the judge may find nothing in them.

Layers of plain.py on 1 to 4 ranks, in float64, float32 and bfloat16 (products and sums in float32), with sizes that
do not divide, ranks that have nothing, key/value heads that ranks share, tied embeddings, tokens dealt over the ranks
or not.
"""
import itertools
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import plain
from plain import Setting
from problems import Program, make
from ranks import simulate

DTYPES = ("float64", "float32", "bfloat16")
RANKS = (1, 2, 3, 4)
# kind, class, the axis of tokens that ranks have of their own, whether x may be split by tokens besides
LAYERS = (
    ("mlp", plain.MLP, None, True), ("attention", plain.Attention, None, True), ("block", plain.Block, None, True),
    ("column_linear", plain.ColumnLinear, None, True), ("row_linear", plain.RowLinear, None, True),
    ("loss", plain.Loss, None, False), ("norm", plain.Norm, None, True), ("decoder", plain.Decoder, None, True),
    ("embedding", plain.Embedding, None, False), ("gradient_norm", plain.GradientNorm, None, False),
    ("mlp", plain.DataParallelMLP, 0, False), ("loss", plain.DataParallelLoss, 0, False),
)


def sizes_of(random: np.random.Generator) -> dict[str, Any]:
    """Draw sizes: odd ones, small ones, key/value heads for one, some or all query heads."""
    G = int(random.choice([1, 2, 3]))
    alibi = bool(random.random() < 0.2)
    return {"B": int(random.integers(1, 6)), "S": int(random.integers(1, 14)), "D": int(random.integers(3, 40)),
            "F": int(random.integers(1, 61)), "H": 8 if alibi else G * int(random.integers(1, 4)),
            "G": int(random.choice([1, 2, 8])) if alibi else G, "K": int(2 * random.integers(1, 9)),
            "V": int(random.integers(5, 90)), "layers": int(random.integers(1, 3)),
            "gated": bool(random.random() < 0.5), "bias": bool(random.random() < 0.7),
            "rms": bool(random.random() < 0.5), "tied": bool(random.random() < 0.5),
            "smoothing": float(random.choice([0.0, 0.1])),
            "position_embedding": "alibi" if alibi else str(random.choice(["rotary", "none"]))}


def programs(count: int, seed: int) -> Any:
    """Yield (what it is, ranks, program) of so many runs, dtypes and ranks and layers in turn."""
    random = np.random.default_rng(seed)
    combinations = itertools.cycle(itertools.product(LAYERS, DTYPES, RANKS))
    for number in range(count):
        (kind, cls, tokens, may_split), dtype, ranks = next(combinations)
        sizes = sizes_of(random)
        split = may_split and random.random() < 0.5
        setting = Setting(dtype=dtype, sequence_parallel=bool(split))
        problem = make(kind, seed=seed * 1000003 + number, setting=setting, **sizes)
        what = f"{kind}{' of its own tokens' if tokens == 0 else ''}{', tokens split' if split else ''}, {dtype}, " \
               f"{ranks} rank{'s' if ranks > 1 else ''}: {sizes}"
        yield what, ranks, Program(cls, problem, setting, "", tokens)


def main_correct(count: int, seed: int, judged: Callable[[Any], tuple[bool, str, str]], as_json: bool) -> int:
    """Run right programs and print what the judge answers. Returns 0 if it calls none wrong, and has judged all."""
    start = time.perf_counter()
    alarms: list[dict] = []
    not_judged: list[dict] = []
    kinds: Counter = Counter()
    folder = Path(tempfile.mkdtemp(prefix="mpitp-zoo-"))
    for number, (what, ranks, program) in enumerate(programs(count, seed)):
        program.folder = str(folder / str(number))
        simulate(ranks, program)
        wrong, answer, _ = judged(program.folder)
        shutil.rmtree(program.folder)
        kinds[what.split(": ")[0].rsplit(",", 2)[0]] += 1
        if answer != "right":
            (alarms if wrong else not_judged).append({"run": what, "answer": answer})
    shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    if as_json:
        print(json.dumps({"schema": "mpitp.zoo_correct/1", "runs": count, "seed": seed, "false_alarms": alarms,
                          "not_judged": not_judged, "seconds": round(seconds, 1)}, indent=1))
    else:
        print(*[f"FALSE ALARM: {one['run']}: {one['answer']}\n" for one in alarms],
              *[f"NOT JUDGED: {one['run']}: {one['answer']}\n" for one in not_judged], sep="", end="")
        print(*[f"{n:4}  {kind}" for kind, n in sorted(kinds.items())], sep="\n")
        print(f"{count} right runs, {len(alarms)} false alarms, {len(not_judged)} not judged")
        print(f"  time {seconds:.0f} s")
    return 1 if alarms or not_judged else 0
