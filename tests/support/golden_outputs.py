"""What is computed from fixed inputs without a measurement: plans, pictures, defaults, as plain lists and numbers.

    python tests/support/golden_outputs.py      write tests/data/golden_outputs.json anew; look through its diff

tests/test_golden_outputs.py compares them: a number of a plan or of a picture has no other oracle.
"""
import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "data" / "golden_outputs.json"
MODEL = ["--hidden-size", "96", "--num-layers", "3", "--num-attention-heads", "6", "--num-query-groups", "2",
         "--vocab-size", "1003"]
PLANS = {
    "laptop": [*MODEL, "-n", "1,2,3", "--machine", "laptop", "--tokens", "48", "--max-new-tokens", "5"],
    "block again": [*MODEL, "-n", "2,4", "--machine", "infiniband", "--train", "--recompute", "block",
                    "--gradient-accumulation", "2", "--tokens", "64"],
    "attention again, rows": [*MODEL, "-n", "2,6", "--machine", "ethernet-10g", "--train", "--recompute", "attention",
                              "--sequence-parallel", "--gather-again", "--data-parallel", "2", "--tokens", "64"],
    "rows": [*MODEL, "-n", "4", "--machine", "infiniband", "--train", "--sequence-parallel", "--tokens", "64"],
    "float64": [*MODEL, "-n", "2", "--machine", "laptop", "--dtype", "float64", "--batch", "3"],
    "GPUs": ["--hidden-size", "4096", "--num-layers", "32", "--num-attention-heads", "32", "--vocab-size", "32000",
             "--machine", "h100x8", "--dtype", "bfloat16", "--tokens", "512"],
}
OF_FAMILIES = ("gemma3_text", "gpt2", "phi", "olmo2", "gpt_bigcode", "cohere")


def plans(folder):
    """{name: what `plan --json` writes}, the long lists of arrays and messages by a hash."""
    import make_tiny_checkpoints as tiny
    from mpitp.commands import Parser
    from mpitp.commands import plan as command
    found = {}
    for name, words in [*PLANS.items(), *((family, ["--config", str(folder / f"{family}.json"), "-n", "1,3",
                                                    "--tokens", "12", "--max-new-tokens", "3", "--machine",
                                                     "laptop"])
                                          for family in OF_FAMILIES)]:
        if name in OF_FAMILIES:
            (folder / name).mkdir()
            tiny.write(folder / name, tiny.load(name))
            (folder / f"{name}.json").write_text((folder / name / "config.json").read_text())
        parser = Parser()
        command.add_arguments(parser)
        command.run(parser.parse_args([*words, "--json", str(folder / "plan.json")]))
        said = json.loads((folder / "plan.json").read_text())
        found[name] = {key: said[key] for key in ("parameters", "host_memory_bytes", "device")}
        for job in said["jobs"]:
            for of in job["of_ranks"]:
                for key in ("tensors", "messages"):
                    of[key] = hashlib.sha256(json.dumps(of[key]).encode()).hexdigest()[:16]
            found[name][job["kind"]] = rounded(job)
    return found


def defaults():
    """{class: {field: default}} of what a user may leave out."""
    import mpitp
    from mpitp.attention_config import AttentionConfig
    from mpitp.training.loop import Settings
    classes = [mpitp.DecoderConfig, AttentionConfig, Settings]
    return {kind.__name__: {field.name: repr(field.default) for field in dataclasses.fields(kind)
                            if field.default is not dataclasses.MISSING} for kind in classes}


# --- pictures -------------------------------------------------------------------------------------------------------

def report(ranks, seconds):
    """A report of bench as --json writes it, as far as it is drawn."""
    def row(bench, case, factor, **more):
        return {"bench": bench, "case": case, "median_seconds": seconds * factor, "bytes": 0, "flops": 0,
                "flops_per_second": 0, "bytes_per_second": 0, **more}
    rows = [row("allreduce", case, factor * size, bytes=size) for case, factor in (("in place", 1e-9), ("out", 2e-9))
            for size in (64, 4096, 1 << 20)]
    rows += [row("matmul", "products forward", 0.5, flops_per_second=3e11), row("matmul", "products", 1,
             flops_per_second=2e11), row("matmul", "read", 1, bytes_per_second=5e10)]
    rows += [row("ffn", "forward", 1.0, flops=4e9), row("ffn", "forward, backward", 3.0, flops=12e9),
             row("ffn", "one token", 0.1)]
    rows += [row("block", "forward", 2.0), row("block", "both", 5.0)]
    return {"ranks": ranks, "rows": rows, "hidden_size": 64, "ffn_hidden_size": 256, "tokens": 32, "dtype": "float32",
            "mpitp": "0", "mpi": "an MPI", "machine": "a machine"}


def study():
    points = [{"kind": kind, "bench": "ffn", "case": case, "ranks": ranks, "median_seconds": 0.5 / ranks + 0.01,
               "planned_seconds": 0.4 / ranks if case == "both" else None}
              for kind in ("strong", "weak") for case in ("both", "forward") for ranks in (1, 2, 4)]
    return {"points": points, "mpitp": "0", "mpi": "an MPI", "machine": "a machine"}


def spans():
    """Two ranks: Python, a product, and a sum for which rank 0 waits two milliseconds."""
    import numpy as np

    from mpitp.timeline.places import MPI, PRODUCTS, PYTHON
    from mpitp.timeline.spans import Span
    from mpitp.timeline.waiting import Waiting
    ends = 9_000_000
    of_ranks = [[Span(PYTHON, "forward", 1_000_000, arrived, None), Span(PRODUCTS, "x @ w", 2_000_000, 4_500_000, None),
                 Span(MPI, "all_reduce", arrived, ends, None)] for arrived in (5_000_000, 7_000_000)]
    return of_ranks, Waiting(np.zeros((2, 1), int), np.array([[5e6], [7e6]]), np.full((2, 1), float(ends)))


def pictures(folder):
    """{name: what is drawn}: lines, bars, ticks, words."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    from mpitp.commands import Parser, plots
    from mpitp.commands import plan as command
    from mpitp.timeline import picture
    kept, current, close, save = {}, [], plt.close, Figure.savefig

    def keep(figure):
        kept[current[0]] = [[round(float(side), 3) for side in figure.get_size_inches()],
                            *(drawn(axis) for axis in figure.axes)]
        close(figure)
    plt.close, Figure.savefig = keep, lambda *words, **named: None      # pixels take seconds
    try:
        bits = [(1, 8.0), (2, 7.5), (3, 6.0)]
        for current[:], draw, words in (
                (["bench"], plots.draw_bench, ([report(2, 0.3), report(1, 0.5)],)),
                (["one report"], plots.draw_bench, ([report(1, 0.5)],)),
                (["scaling"], plots.draw_scaling, (study(),)),
                (["training"], plots.draw_training, (bits, [(2, 7.0), (3, 6.5)], 5.0, "a run")),
                (["timeline"], picture.draw, (*spans(), "two ranks")),
                (["training alone"], plots.draw_training, (bits, [], None, "a run"))):
            draw(str(folder / "drawn.png"), *words)
        for name in ("laptop", "attention again, rows", "GPUs"):
            current[:] = [f"plan, {name}"]
            parser = Parser()
            command.add_arguments(parser)
            command.run(parser.parse_args([*PLANS[name], "--plot", str(folder / "drawn.png")]))
    finally:
        plt.close, Figure.savefig = close, save
    return kept


def drawn(axis):
    from matplotlib.ticker import FixedLocator
    legend = axis.get_legend()
    return rounded({
        "title": axis.get_title(), "labels": [axis.get_xlabel(), axis.get_ylabel()], "limits": [*axis.get_ylim()],
        "ticks": [text.get_text() for text in axis.get_xticklabels()]
        if isinstance(axis.xaxis.get_major_locator(), FixedLocator) else [],        # others are matplotlib's choice
        "lines": [[line.get_label(), line.get_linestyle(), line.get_marker(), *map(list, line.get_data())]
                  for line in axis.lines],
        "bars": [[patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()] for patch in axis.patches],
        "spans": [[list(path.get_extents().bounds) for path in spans.get_paths()] for spans in axis.collections],
        "legend": [text.get_text() for text in legend.get_texts()] if legend else []})


def rounded(value):
    """Numbers to nine digits: another NumPy may add up in another order."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value if isinstance(value, (bool, int, str, type(None))) else float(f"{float(value):.9g}")


def main(words):
    import tempfile
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        found = {"plans": plans(Path(folder)), "pictures": pictures(Path(folder)), "defaults": defaults()}
    lines = {kind: ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in of.items())
             for kind, of in found.items()}
    FILE.write_text("{\n" + ",\n".join(f'"{kind}": {{\n{of}\n}}' for kind, of in lines.items()) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
