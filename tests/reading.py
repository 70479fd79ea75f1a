"""How much there is to read: `python tests/reading.py` prints it, tests/test_reading.py holds it to its limits.

Lines are lines of files, docstrings and comments among them: what a reader scrolls through.
"""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

# What a student reads in one sitting, and functions of one more file.
FIRST_SITTING = ["examples/by_hand.py", "mpitp/sharding/partition.py", "mpitp/layers/products.py",
                 "mpitp/layers/mlp.py", "mpitp/comm/sums.py"]
ALL_REDUCE = ("mpitp/comm/mpi.py", ["all_reduce"])

LIMITS = {"first sitting": 600, "imported": 2100, "calls": 30, "files": 8, "reading list": 3500}

# What importing ParallelMLP and the group loads of mpitp.
IMPORTED = """
import json, sys, mpitp
if mpitp.ParallelMLP and mpitp.TensorParallelGroup:
    print(json.dumps([module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "mpitp"]))
"""
# The second forward of the README's 10 -> 40 -> 10, so that imports are done.
CALLS = """
import json, os, sys, numpy, mpitp
home, calls = os.path.dirname(mpitp.__file__), []

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_filename.startswith(home):
        calls.append((os.path.relpath(frame.f_code.co_filename, home), frame.f_code.co_name))

with mpitp.TensorParallelGroup(reproducible=sys.argv[1] == "reproducible") as group:
    mlp = mpitp.ParallelMLP(group, hidden_size=10, ffn_hidden_size=40, bias=False)
    x = numpy.ones((1, 5, 10), dtype=numpy.float32)
    mlp.forward(x)
    sys.setprofile(note)
    mlp.forward(x)
    sys.setprofile(None)
    if group.rank == 0:
        print(json.dumps(calls))
"""


def lines(name):
    """The lines of a file; FileNotFoundError says which one."""
    return len((ROOT / name).read_text().splitlines())


def function_lines(name, functions):
    """{name: lines} of the functions of these names in a file, methods among them."""
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(ast.parse((ROOT / name).read_text()))
            if isinstance(node, ast.FunctionDef) and node.name in functions}


def first_sitting():
    """{what: lines}."""
    name, functions = ALL_REDUCE
    sizes = {file: lines(file) for file in FIRST_SITTING}
    sizes.update({f"{name}, {function}": count for function, count in function_lines(name, functions).items()})
    return sizes


def python(ranks, program, *arguments):
    """What rank 0 prints, as JSON."""
    from spmd import job
    done = job(ranks, "-c", program, *arguments)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout)


def imported():
    """{file of mpitp: lines} of what the group and ParallelMLP import."""
    return {os.path.relpath(file, ROOT): lines(file) for file in python(1, IMPORTED)}


def calls(mode):
    """[(file, function), ...] of the Python calls of one forward on two ranks, in order."""
    return [tuple(call) for call in python(2, CALLS, mode)]


def summary(path):
    """(calls, files, changes of file) of such a list."""
    return len(path), len({file for file, _ in path}), sum(a[0] != b[0] for a, b in zip(path, path[1:]))


def reading_list():
    """{file: lines} of the files that the README's section "Reading list" links to."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## Reading list\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    if not section:
        raise SystemExit('found no section "## Reading list" in README.md')
    links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", section[1])
    return {name: lines(name) for name in dict.fromkeys(links) if not (ROOT / name).is_dir() and name.endswith(".py")}


def show(title, sizes, limit):
    total = sum(sizes.values())
    print(f"\n{title}: {total} lines in {len(sizes)} places, limit {limit}{'' if total <= limit else '  ABOVE IT'}")
    for name, count in sizes.items():
        print(f"{count:6d}  {name}")


def main():
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    print(f"mpitp at {commit.strip() or 'no commit'}")
    for title, find in (("first sitting", first_sitting), ("imported", imported), ("reading list", reading_list)):
        try:
            show(title, find(), LIMITS[title])
        except FileNotFoundError as error:
            print(f"\n{title}: found no {os.path.relpath(error.filename, ROOT)}")
    for mode in ("ordinary", "reproducible"):
        path = calls(mode)
        print("\none forward 10 -> 40 -> 10 on two ranks, {}: {} calls in {} files, {} changes of file".format(
            mode, *summary(path)) + (f"; limit {LIMITS['calls']} in {LIMITS['files']}" if mode == "ordinary" else ""))
        if mode == "ordinary":
            for file, function in path:
                print(f"        {file:28s} {function}")


if __name__ == "__main__":
    main()
