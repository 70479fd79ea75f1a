"""The tables of README.md and docs/ that are made: of benchmarks/results/*.json, and of the source (walk.py,
families_table.py).

    python docs/figures.py              write every table anew
    python docs/figures.py --check      exit with 1 if a page shows another table than is made

A table stands between <!-- figures: NAME --> and <!-- end of figures -->; NAME is a key of TABLES.
"""
import json
import re
import sys
import textwrap
from pathlib import Path
from collections.abc import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent))
import families_table
import walk

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.S)

ROWS = {    # name in a result file, without its kind: name in a table
    "products": "bare products (the limit)",
    "read": "a plain read of the weights (the limit)",
    "mpitp": "**mpitp**",
    "reproducible": "mpitp, reproducible",
    "any cut": "mpitp, reproducible, any grid and any cut",
    "torch gloo": "torch + gloo",
    "dense NumPy": "dense NumPy",
    "dense torch": "dense torch",
    "torch eager": "torch eager",
    "torch fused": "torch eager with its fused AdamW",
}


def result(name: str) -> dict:
    """Return the result file benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are aligned left, the others right."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with three digits, or all of its whole ones."""
    return f"{seconds * 1e3:#.3g}".rstrip(".") if seconds < 0.9995 else f"{seconds * 1e3:.0f}"


def where(found: dict) -> str:
    """Return one line that names the machine, the libraries, and the command of a result file."""
    torch = f", torch {found['torch']}" if "torch" in found else ""
    command = f" `{found['command']}`" if "command" in found else ""
    return f"{found['machine']}, {found['mpi']}{torch}.{command}"


def interleaved(name: str) -> str:
    """Return the table of a benchmark whose rows ran in turn: times, ratio to the limit, ratio of the other."""
    found = result(name)
    base = found["base"]
    over_this = base.replace(" ", "_") + "_over_this"
    rows = []
    for full_name, row in found["rows"].items():
        known = ROWS[full_name.removesuffix(f" {row['kind']}")]
        times = [milliseconds(row[f"{which}_seconds"]) for which in ("median", "least", "most")]
        rows.append([row["kind"], known, *times, f"{row['over_limit']:.2f}", f"{row[over_this]:.2f}"])
    limit = "over torch eager" if base == "torch eager" else "over the limit"
    return table(["", "", "ms", "fastest", "slowest", limit, f"{base} over this"], rows, left=2) + f"\n\n{where(found)}"


def decode() -> str:
    """Return the table of Gemma 3 270M against transformers on torch."""
    found = result("decode-n2")
    rows = []
    for part in ("prefill", "decode", "first token from ids", "first token from text"):
        mine, other = found["rows"][f"mpitp {part}"], found["rows"][f"torch {part}"]
        what = {"prefill": "a prompt of 128 tokens", "decode": "a token"}.get(part, f"process start to {part}")
        starts = ", ".join(milliseconds(seconds) for seconds in mine["of_starts_seconds"])
        rows.append([what, f"{milliseconds(mine['median_seconds'])} ({starts})", milliseconds(other["median_seconds"]),
                     f"{found['torch_over_mpitp'][part]:.2f}"])
    return table(["", "mpitp, ms (of each start)", "transformers, ms", "transformers over mpitp"], rows) + \
        f"\n\nA token comes at {found['decode_rate_over_bare']:.0%} of the rate at which the same process runs the " \
        f"bare matrix-vector products of all weights; {found['communication_share']:.1%} of its time is " \
        f"communication. {of_prefill(found)}{found['starts']} starts of each program; {where(found)}" + \
        kept_weights(found)


def of_prefill(found: dict) -> str:
    """Return the sentence on the prompt and its bare products; empty where those were not timed."""
    return f"The prompt takes {found['prefill_over_bare']:.2f} times its bare products. " \
        if "prefill_over_bare" in found else ""


def kept_weights(found: dict) -> str:
    """Return the table of weights that stay in bfloat16, in the rounds of the same processes; empty where none ran."""
    if len(found.get("kinds", {})) < 2:
        return ""
    names = {"float32": "float32", "bfloat16": "bfloat16, x as it is", "bfloat16 rounded": "bfloat16, x rounded"}
    rows = []
    for kind, row in found["kinds"].items():
        times = [milliseconds(found["rows"][f"mpitp {part}{'' if kind == 'float32' else ' ' + kind}"]["median_seconds"])
                 for part in ("decode", "prefill")]
        rows.append([names[kind], times[0], f"{row['float32_over_this_decode']:.2f}", times[1],
                     f"{row['weight_bytes_over_float32']:.2f}", f"{row['loss_relative_difference']:.0e}",
                     f"{row['equal_tokens']} of {row['text_tokens']}"])
    return "\n\n" + table(["weights", "a token, ms", "float32 over this", "128 tokens, ms", "memory of weights",
                           "difference of the loss", "equal tokens"], rows) + \
        f"\n\nIn the rounds of the same processes; {found['numkong']}. The loss is that of " \
        f"{found['kinds']['float32']['loss_tokens']} tokens; the memory is a rank's."


def gpu() -> str:
    """Return the table of one GPU against torch."""
    found, rows = result("gpu-n1"), []
    for name, row in found["rows"].items():
        cases = row["cases"]
        times = [milliseconds(cases[case]["median_seconds"]) if case in cases else ""
                 for case in ("mpitp", "mpitp graph", "torch", "torch graph")]
        best = cases.get("mpitp graph", cases["mpitp"])
        limit = f"{best['limit_over_this']:.2f}" if best.get("limit_over_this") else ""
        graph = ""
        if "torch graph" in cases:
            graph = f"{cases['torch graph']['median_seconds'] / best['median_seconds']:.2f}"
        rows.append([name, *times, f"{cases['mpitp']['torch_over_this']:.2f}", graph, limit])
    return table(["milliseconds", "mpitp", "mpitp, graph", "torch", "torch, graph", "torch over mpitp",
                  "the same, graphs", "share of the limit"], rows) + \
        f"\n\n{found['gpu']}, CuPy {found['cupy']}, torch {found['torch']}, Python {found['python']}, " \
        f"{found['rounds']} rounds. `{found['command']}`"


def versions() -> str:
    """Return the table of this version against the one before."""
    found = result("versions-0.2.0-n2")
    rows = [[row["case"], milliseconds(row["now_ms"] / 1e3), milliseconds(row["before_ms"] / 1e3),
             f"{row['ratio']:.3f}"]
            for row in found["rows"]]
    now, before = found["now"], found["before"]
    return table(["", f"{now}, ms", f"{before}, ms", f"{now} over {before}"], rows) + \
        f"\n\n{found['ranks']} ranks, {found['dtype']}, medians of {found['pairs']} pairs; {where(found)}"


def pythons() -> str:
    """Return the table of the Pythons that .ci/versions has run the tests with."""
    rows = [[one["python"], one["numpy"], one["mpi4py"], f"MPICH {one['mpich']}",
             f"without those that start jobs, on {' and '.join(map(str, one['ranks']))} "
             f"rank{'' if one['ranks'] == [1] else 's'}"] for one in result("pythons")["ran"]]
    return table(["Python", "NumPy", "mpi4py", "MPI", "tests"], rows, left=5)


def runs() -> str:
    """Return the table of all runs of version 0.1.0, ratio by ratio."""
    rows = []
    for row in result("runs-0.1.0")["rows"]:
        products = ", ".join(map(str, row.get("products_ms", [])))
        beside = f" (its bare products took {products} ms)" if products else ""
        form = "{:.0%}" if row.get("unit") == "share" else "{:.2f}"
        rows.append([row["what"] + beside, ", ".join(map(form.format, row["runs"]))])
    return table(["", "runs"], rows, left=2)


def small(number: float) -> str:
    """Return an error with two decimals, or as a power of ten where it is tiny."""
    return f"{number:.2f}" if number >= 0.1 else f"{number:.0e}".replace("e-0", "e-")


def accuracy() -> str:
    """Return the table of the errors of every layer."""
    found = result("accuracy")
    head = ["", "error (dense)", *(f"of norm, P = {ranks}" if place == 0 else str(ranks)
                                   for place, ranks in enumerate(found["ranks"])), "dense"]
    rows = [[title, f"{small(row['error'])} ({small(row['error_dense'])})",
             *(f"{row['of_norm'][str(ranks)]:.1f}" for ranks in found["ranks"]), f"{row['of_norm_dense']:.1f}"]
            for title, row in found["rows"].items()]
    return table(head, rows) + f"\n\n{where(found)}"


def ratios() -> str:
    """Return the six ratios of the README."""
    ffn, block, train = result("ffn-h2048-n2"), result("block-h1024-n2"), result("train-h256-n2")
    gemma = result("decode-n2")
    both = ffn["rows"]["mpitp forward+backward"]
    rows = [
        ["feed-forward block, h = 2048, forward and backward", "its bare matrix products", f"{both['over_limit']:.2f}"],
        ["the same", "torch + gloo", f"{1 / both['torch_gloo_over_this']:.2f}"],
        ["the same, one token forward", "a plain read of the weights",
         f"{ffn['rows']['mpitp one token']['over_limit']:.2f}"],
        ["decoder block, h = 1024, forward and backward", "its bare matrix products",
         f"{block['rows']['mpitp forward+backward']['over_limit']:.2f}"],
        ["training step, 3.3 million parameters", "torch eager",
         f"{1 / train['rows']['mpitp step']['torch_eager_over_this']:.2f}"],
        ["a token of Gemma 3 270M", "transformers on torch", f"{1 / gemma['torch_over_mpitp']['decode']:.2f}"]]
    return table(["time of", "over that of", "ratio"], rows, left=2) + \
        f"\n\n2 ranks of one core each, float32; {ffn['machine']}, {ffn['mpi']}, torch {ffn['torch']}."


STUBS = (       # launchers that nobody had at hand, as the tests write them; tests/test_run_sh.py
    ("PBS", "its node file, the site's mpiexec"), ("LSF", "its slots, jsrun or mpirun"),
    ("Flux and others", "MPITP_LAUNCHER, word by word"))


def clusters() -> str:
    """Return the table of launchers, MPIs and what ran: of .ci/cluster, and the stubs of the tests."""
    found = result("cluster")
    names = {"Slurm": f"Slurm {found['slurm']}", "Grid Engine": f"Grid Engine {found['grid_engine']}"}
    rows: dict[tuple[str, str], list[str]] = {}
    for ran in found["ran"]:
        if ran["ok"]:
            mpi = f"{ran['mpi']} {found['mpi'][ran['mpi']]}"
            rows.setdefault((names.get(ran["launcher"], ran["launcher"]), ran["what"]), []).append(mpi)
    lines = [[launcher, ", ".join(mpis), what, "real"] for (launcher, what), mpis in rows.items()]
    lines += [[name, "", what, "stub"] for name, what in STUBS]
    return table(["launcher", "MPI", "what ran", ""], lines, left=4)


def two_hosts() -> str:
    """Return the table of faults of one of two hosts, as .ci/cluster tried them."""
    found = result("cluster")
    lines = []
    for one in found["faults"]:
        line = re.sub(r"\b\d\d:\d\d:\d\d\b", "12:00:00", one["line"].removeprefix("mpitp: ").replace("|", "/"))
        line = re.sub(r"PID \d+", "PID N", re.sub(r" ?\^+|/home/student/mpitp/", "", line))
        guilty = line.find("not there: ")
        end = line[guilty:] if guilty > 90 else line[-105:]
        line = line if len(line) <= 200 else f"{line[:90]} ... {end[:110]}{' ...' * (len(end) > 110)}"
        lines.append([one["fault"], one["command"], f"{one['rank']} on h{one['rank'] + 1}", one["mpi"],
                      f"{one['seconds']:.1f} of {one['limit']}", "; ".join([*one["problems"], line])])
    good = sum(not one["problems"] for one in found["faults"])
    return f"{len(lines)} rows, of which {good} end as they must.\n\n" + \
        table(["fault", "in", "rank", "MPI", "seconds", "what is said"], lines, left=6)


TABLES: dict[str, Callable[[], str]] = {
    "ffn": lambda: interleaved("ffn-h2048-n2"), "block-512": lambda: interleaved("block-h512-n2"),
    "block-1024": lambda: interleaved("block-h1024-n2"), "train": lambda: interleaved("train-h256-n2"),
    "decode": decode, "gpu": gpu, "accuracy": accuracy, "ratios": ratios, "versions": versions,
    "runs": runs, "pythons": pythons,
    "walk": walk.table, "families": families_table.table, "clusters": clusters,
    "two-hosts": two_hosts}


def wrapped(text: str) -> str:
    """Return the text with the lines that do not belong to a table wrapped at 118 columns."""
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 118, break_on_hyphens=False)
                     for line in text.split("\n"))


def filled(text: str) -> str:
    """Return the text of a page with every table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}\n{wrapped(TABLES[found[2]]())}\n\n{found[3]}", text)


def main(arguments: list[str]) -> int:
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'another table than is made' if arguments else 'written anew'}")
        if not arguments:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if arguments and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
