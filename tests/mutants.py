"""A mutation test: small mistakes are planted in mpitp/, one at a time, and the tests that run the line must notice.

    python tests/mutants.py cover                           once: which test runs which line, on 1 rank and on 2
    python tests/mutants.py run --seed 1 --count 300        plant that many, chosen by the seed; goes on where it ended
    python tests/mutants.py report --seed 1                 the score, and the survivors without a reason

Mutants are chosen from all of mpitp/ but the GPU's kernels. The tests of a mutant are those that ran its line
(coverage.py with the test as its context, also in the jobs that a test starts): in a session of one rank, then of two,
then those that start jobs; those of the module's own file first, then the quickest of each file. It is caught when a
session fails, or is not over after many times as long as its tests took. What caught mutants is run again without any
at the end, and must pass (--check).
Results are JSON lines in build/mutants/; docs/mutants.md has the survivors, each with its reason. Needs `coverage`.

Why not a library: mutmut (3.8) imports the program once and forks a process for each mutant, which an initialised MPI
does not survive; cosmic-ray (8.7) can run `mpirun -n P pytest`, but always the same command, whatever the mutant.
"""
import argparse
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from mutations import mutations             # noqa: E402 (the folder above)

WORK = ROOT / "build" / "mutants"
LEFT_OUT = ("mpitp/ops/cuda/", "mpitp/comm/gpu/peer_kernels.py")         # kernels: sources of another language
NEVER = ("tests/test_packaging.py", "tests/test_run_sh.py", "tests/test_cluster.py")    # not about the numbers
# name: (ranks, options of pytest, most tests, most seconds of them) in the order in which they are tried
SESSIONS = {"one": (1, ["-m", "not launcher"], 160, 60), "two": (2, [], 60, 40),
            "jobs": (1, ["-m", "launcher"], 12, 60)}
COVERAGE = """[run]
parallel = true
source = {root}/mpitp
omit = */ops/cuda/*
data_file = ${{MPITP_COVERAGE}}
context = ${{MPITP_TEST-}}
patch = subprocess, _exit
sigterm = true
"""


def environment(tree, **more):
    """For a session of tests in a copy of the repository."""
    path = f"{tree}:{tree}/tests/support"
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            # compiled once: half of a short session would be that
            "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(WORK / "compiled" / Path(tree).name), **more}


def launcher(ranks):
    beside = Path(sys.prefix) / "bin" / "mpirun"
    return [str(beside) if beside.exists() else "mpirun", "-n", str(ranks)]


# --- which test runs which line -------------------------------------------------------------------------------------

def cover(arguments):
    """Run the suite once for each session, with coverage, and keep what it found."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "coveragerc").write_text(COVERAGE.format(root=ROOT))
    for name, (ranks, options, *_) in SESSIONS.items():
        folder = WORK / f"coverage-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command = [*launcher(ranks), sys.executable, "-m", "coverage", "run", f"--rcfile={WORK}/coveragerc", "-m",
                   "pytest", "-q", "-p", "contexts", *options, *(f"--ignore={file}" for file in NEVER), "tests"]
        subprocess.run(command, cwd=ROOT, env=environment(
            ROOT, MPITP_COVERAGE=str(folder / "of"), MPITP_SECONDS=str(WORK / f"seconds-{name}.json")))
        combine(name, folder, ROOT)


def combine(name, folder, tree):
    """Write lines-NAME.json: {"tests": {test: seconds}, "lines": {file: {line: [places in tests]}}}."""
    from coverage import CoverageData
    whole = CoverageData(basename=str(folder / "whole"))
    for part in sorted(folder.glob("of.*")):
        found = CoverageData(basename=str(part))
        try:
            found.read()
            whole.update(found)
        except Exception as error:                  # of a job that was killed while it wrote
            print(f"{part.name}: {error}", file=sys.stderr)
    seconds = json.loads((WORK / f"seconds-{name}.json").read_text())
    place = {test: i for i, test in enumerate(seconds)}
    lines = {}
    for file in whole.measured_files():
        of_line = whole.contexts_by_lineno(file)
        # "static|dynamic" where a process has both
        of_file = {str(line): sorted({place[test] for context in tests for test in context.split("|")[:1] + [context]
                                      if test in place}) for line, tests in of_line.items()}
        lines[os.path.relpath(file, tree)] = {line: tests for line, tests in of_file.items() if tests}
    (WORK / f"lines-{name}.json").write_text(json.dumps({"tests": seconds, "lines": lines}))


class Chooser:
    """Which tests a mutant meets."""

    def __init__(self):
        self.of = {name: json.loads((WORK / f"lines-{name}.json").read_text()) for name in SESSIONS
                   if (WORK / f"lines-{name}.json").exists()}

    def tests(self, name, mutation, most, limit):
        """The tests of a session that run the lines of a mutation, those most worth their time first."""
        seconds, of_file = self.of[name]["tests"], self.of[name]["lines"].get(mutation.file, {})
        names = list(seconds)
        lines = range(mutation.lines[0], mutation.lines[1] + 1)
        if not mutation.function or mutation.body:      # run at import: who runs the function, or anything of the file
            lines = range(mutation.body[0], mutation.body[1] + 1) if mutation.body else map(int, of_file)
        found = {names[place] for line in lines for place in of_file.get(str(line), ())}
        by_file, chosen, total = defaultdict(list), [], 0.0
        for test in sorted(found, key=lambda test: (seconds[test], test)):
            by_file[test.split("::")[0]].append(test)
        # those of the file that is named after the module, then one of each file after the other
        own = f"tests/test_{Path(mutation.file).stem}"
        rounds = [test for file, tests in by_file.items() if file.startswith(own) for test in tests]
        rounds += [test for turn in range(max(map(len, by_file.values()), default=0))
                   for tests in by_file.values() for test in tests[turn:turn + 1]]
        for test in dict.fromkeys(rounds):
            if len(chosen) < most and (total + seconds[test] <= limit or not chosen):
                chosen.append(test)
                total += seconds[test]
        return chosen, total, len(found)


# --- one mutant -----------------------------------------------------------------------------------------------------

def session(tree, ranks, tests, seconds):
    """Run tests. Returns None where they pass, else the test that failed, or "time"."""
    limit = int(120 + 10 * seconds)                     # generous: only what hangs meets it
    command = [*launcher(ranks), sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--color=no", *tests]
    running = subprocess.Popen(command, cwd=tree, env=environment(tree, MPIEXEC_TIMEOUT=str(limit)), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               errors="replace")
    try:
        text, _ = running.communicate(timeout=limit + 30)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
        return "time"
    if running.returncode in (0, 5):
        return None
    hits = [line.split(" ", 1)[1].split(" - ")[0] for line in text.splitlines()
            if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    hits += [line.strip() for line in text.splitlines() if line.strip() in tests]       # as end_job() says it
    return hits[0] if hits else "time" if "time" in text.lower()[-400:] else text[-200:]


def try_mutant(tree, mutation, chooser, all_tests):
    """Plant a mutation in a copy of the tree. Returns what is written of it."""
    began, path = time.monotonic(), Path(tree) / mutation.file
    text = path.read_text()
    number = text.count("\n", 0, mutation.begin)
    row = {"key": mutation.key, "file": mutation.file, "line": number + 1, "function": mutation.function,
           "kind": mutation.kind, "was": text.splitlines()[number].strip(),
           "now": mutation.apply(text).splitlines()[number].strip(), "result": "not covered", "tests": 0, "of": 0}
    path.write_text(mutation.apply(text))
    try:
        for name, (ranks, _, most, limit) in SESSIONS.items():
            if name not in chooser.of:
                continue
            tests, seconds, of = chooser.tests(name, mutation, *((10 ** 6, 10 ** 6) if all_tests else (most, limit)))
            row["tests"], row["of"] = row["tests"] + len(tests), row["of"] + of
            if not tests:
                continue
            row["result"] = "survived"
            by = session(tree, ranks, tests, seconds)
            if by:
                row.update(result="caught", by=by, ranks=ranks)
                break
    finally:
        path.write_text(text)
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def candidates():
    """All mutations of mpitp/ but the kernels, in order."""
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "mpitp").rglob("*.py"))]
    return [found for file in files if not file.startswith(LEFT_OUT)
            for found in mutations(file, (ROOT / file).read_text())]


def copy_tree(name):
    tree = WORK / f"tree-{name}"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(
        ".git", "build", "__pycache__", ".venv*", "*.egg-info", ".mypy_cache", ".ruff_cache"))
    return tree


def read_rows(path):
    """The results so far, the last of each mutant."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["key"]: row for row in map(json.loads, lines)}


def run(arguments):
    """Try the mutants of a seed that have no result yet; with --again, the survivors once more with every test."""
    path = WORK / f"seed-{arguments.seed}.jsonl"
    done, chooser, waiting, lock = read_rows(path), Chooser(), queue.SimpleQueue(), threading.Lock()
    chosen = random.Random(arguments.seed).sample(candidates(), arguments.count)
    for mutation in chosen:
        row = done.get(mutation.key)
        if row is None or arguments.again and row["result"] != "caught" and not row.get("again"):
            waiting.put(mutation)
    total = waiting.qsize()

    def work(name):
        tree = copy_tree(f"{arguments.seed}-{name}")
        while not waiting.empty():
            try:
                mutation = waiting.get_nowait()
            except queue.Empty:
                return
            row = {**try_mutant(tree, mutation, chooser, arguments.again), "again": arguments.again}
            with lock:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{waiting.qsize():4d} of {total} left  {row['seconds']:6.1f} s  {row['result']:11s} "
                      f"{row['key']}", flush=True)
    workers = [threading.Thread(target=work, args=(name,)) for name in range(arguments.workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if arguments.check:
        check_catchers(path)
    report(arguments)


def check_catchers(path):
    """Run what caught mutants without any: a test that fails anyway has caught nothing."""
    rows, tree = read_rows(path), copy_tree("check")
    for ranks in (1, 2):
        tests = sorted({row["by"] for row in rows.values() if row.get("ranks") == ranks and "::" in row["by"]})
        failed = session(tree, ranks, tests, 600) if tests else None
        print(f"{len(tests)} catching tests on {ranks} rank{'s' if ranks > 1 else ''} without a mutant: "
              f"{failed or 'all pass'}")


# --- the score ------------------------------------------------------------------------------------------------------

def reasons():
    """{(file, the line as it was, as it is): (equivalent or real, reason)} of docs/mutants.md's table."""
    path, found = ROOT / "docs" / "mutants.md", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        cells = [cell.strip().replace(r"\|", "|") for cell in line.replace(r"\|", "\0").strip().strip("|").split("|")]
        cells = [cell.replace("\0", "|").strip("`").strip() for cell in cells]
        if len(cells) == 5 and cells[0].startswith("mpitp/"):
            found[tuple(cells[:3])] = cells[3], cells[4]
    return found


def report(arguments):
    """Print the score of a seed, and its survivors that have no reason yet."""
    rows, known = read_rows(WORK / f"seed-{arguments.seed}.jsonl").values(), reasons()
    caught = [row for row in rows if row["result"] == "caught"]
    alive = [row for row in rows if row["result"] != "caught"]
    given = [known.get((row["file"], row["was"], row["now"])) for row in alive]
    equivalent = sum(reason is not None and reason[0] == "equivalent" for reason in given)
    if rows:
        of_all, of_others = len(caught) / len(rows), len(caught) / max(1, len(rows) - equivalent)
        print(f"seed {arguments.seed}: {len(rows)} mutants, {len(caught)} caught ({of_all:.1%} of all, {of_others:.1%} "
              f"of those that are not equivalent), {len(alive)} survive, {equivalent} of them equivalent")
    for row, reason in zip(alive, given):
        if reason is None:
            print(f"| {row['file']} | `{row['was']}` | `{row['now']}` | | {row['function']}, line {row['line']}, "
                  f"{row['result']}, {row['tests']} of {row['of']} tests |")


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("cover", "run", "report"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run: survivors once more, with every test of their lines")
    parser.add_argument("--check", action="store_true", help="run: at the end, what caught mutants without any")
    arguments = parser.parse_args(words)
    {"cover": cover, "run": run, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
