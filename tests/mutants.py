"""A mutation test: small mistakes are planted in mpitp/, one at a time, and the tests that run the line must notice.

    python tests/mutants.py cover --workers 2               once: which test runs which line, on 1 rank and on 2
    python tests/mutants.py run --seed 1 --count 300        plant that many, chosen by the seed; goes on where it ended
    python tests/mutants.py report --seed 1                 the score, and the survivors without a reason

Mutants are chosen from all of mpitp/ but the GPU's kernels. The tests of a mutant are those that ran its line
(coverage.py with the test as its context, also in the jobs that a test starts): in a session of one rank, then of two,
then those that start jobs; those of the module's own file first, then the quickest of each file. It is caught when a
session fails, or a test takes many times as long as it did. Tests that fail without any mutant are left out by `cover`;
what caught mutants is run again without any at the end, and must pass (--check). Where there are as many cores as
workers, each has one to itself: no worker makes the tests of another slow.
Results are JSON lines in build/mutants/; docs/mutants.md has the survivors, each with its reason. Needs `coverage`.

Why not a library: mutmut (3.8) imports the program once and forks a process for each mutant, which an initialised MPI
does not survive; cosmic-ray (8.7) can run `mpirun -n P pytest`, but always the same command, whatever the mutant.
"""
import argparse
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from multiprocessing import Pool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from mutations import mutations             # noqa: E402 (the folder above)

WORK = ROOT / "build" / "mutants"
LEFT_OUT = ("mpitp/ops/cuda/", "mpitp/comm/gpu/peer_kernels.py")         # kernels: sources of another language
NEVER = ("tests/test_packaging.py", "tests/test_run_sh.py", "tests/test_cluster.py")    # not about the numbers
# name: (ranks, options of pytest, most tests, most seconds of them) in the order in which they are tried
SESSIONS = {"one": (1, ["-m", "not launcher"], 800, 70), "two": (2, [], 200, 40),
            "jobs": (1, ["-m", "launcher"], 40, 90)}
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
    return {**os.environ, "PYTHONPATH": f"{tree}:{tree}/tests/support", "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            # compiled once: half of a short session would be that
            "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(WORK / "compiled" / Path(tree).name), **more}


def launcher(ranks, worker, workers):
    """mpirun, on a core of this worker's own where there are enough."""
    beside, cores = Path(sys.prefix) / "bin" / "mpirun", sorted(os.sched_getaffinity(0))
    alone = ["taskset", "-c", str(cores[worker])] if workers <= len(cores) and shutil.which("taskset") else []
    return [*alone, str(beside) if beside.exists() else "mpirun", "-n", str(ranks)]


def in_threads(work, workers):
    """Call work(worker) in a thread each, and wait for all."""
    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- which test runs which line -------------------------------------------------------------------------------------

def cover(arguments):
    """Run each file of tests once for each session, with coverage, and keep what it found."""
    shutil.rmtree(WORK / "coverage", ignore_errors=True)
    (WORK / "coverage").mkdir(parents=True)
    (WORK / "coveragerc").write_text(COVERAGE.format(root=ROOT))
    waiting, ends = queue.SimpleQueue(), time.monotonic() + arguments.minutes * 60
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda file: -file.stat().st_size)
    files = [f"tests/{file.name}" for file in files if f"tests/{file.name}" not in NEVER]
    with_jobs = [file for file in files if "launcher" in (ROOT / file).read_text() and "jobs" in arguments.sessions]
    of_jobs = in_fours(collected(with_jobs)) if with_jobs else ()
    for tests in [*of_jobs, *([file] for file in files)]:                               # the longest first
        for name in {"jobs"} if "::" in tests[0] else {"one", "two"} & set(arguments.sessions):
            waiting.put((name, tests, WORK / "coverage" / f"{name}-{waiting.qsize()}"))

    def work(worker):
        while time.monotonic() < ends:
            try:
                cover_some(*waiting.get_nowait(), worker, arguments.workers, ends)
            except queue.Empty:
                return
            except subprocess.TimeoutExpired as error:
                print(f"left out, time is up: {error.cmd[-1]}", flush=True)
    in_threads(work, arguments.workers)
    with Pool(arguments.workers) as pool:
        for name in arguments.sessions:
            combine(name, pool)


def collected(files):
    """The tests of files that start jobs."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--color=no", "-m", "launcher", *files]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment(ROOT))
    return [line for line in done.stdout.splitlines() if "::" in line]


def in_fours(tests):
    """Tests of one file, at most four together: a session of a whole file would take minutes."""
    for _, of_file in itertools.groupby(tests, key=lambda test: test.split("::")[0]):
        of_file = list(of_file)
        yield from (of_file[first:first + 4] for first in range(0, len(of_file), 4))


def cover_some(name, tests, folder, worker, workers, ends):
    """Run tests, or files, in a session; where one ends it, once more without that one."""
    ranks, options, *_ = SESSIONS[name]
    left_out = []
    for _ in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        command = [*launcher(ranks, worker, workers), sys.executable, "-m", "coverage", "run",
                   f"--rcfile={WORK}/coveragerc", "-m", "pytest", "-q", "--color=no", "-p", "contexts", *options,
                   *(f"--deselect={test}" for test in left_out), *tests]
        its = environment(ROOT, MPITP_COVERAGE=str(folder / "of"), MPITP_SECONDS=str(folder / "seconds.json"),
                          TMPDIR=str(folder / "tmp"))
        done = subprocess.run(command, cwd=ROOT, env=its, text=True, capture_output=True, errors="replace",
                              timeout=max(1, ends - time.monotonic()))
        failed = failures(done.stdout + done.stderr)
        for test in failed:
            print(f"left out, fails without a mutant: {name} {test}", flush=True)
        if ranks == 1 or not set(failed) - set(left_out):
            break
        left_out += failed
    if done.returncode not in (0, 1, 5):
        print(f"{name} {tests}: status {done.returncode}\n{(done.stdout + done.stderr)[-600:]}", flush=True)
    shutil.rmtree(folder / "tmp", ignore_errors=True)


def failures(text):
    """The tests that pytest, or end_job() of conftest.py, says have failed."""
    lines = text.splitlines()
    hits = [line.split(" ", 1)[1].split(" - ")[0] for line in lines
            if line.startswith(("FAILED ", "ERROR ")) and "::" in line]
    hits += [after.strip() for line, after in zip(lines, lines[1:]) if line.startswith("=====") and " of " in line
             and "rank" in line and "::" in after]
    return list(dict.fromkeys(hits))


def lines_of(part):
    """{file: {line: tests}} of one process's data."""
    from coverage import CoverageData
    data, found = CoverageData(basename=str(part)), {}
    try:
        data.read()
        for file in data.measured_files():
            # "static|dynamic" where a process has both
            found[os.path.relpath(file, ROOT)] = {
                line: {name for context in contexts for name in (context, context.split("|")[0]) if name}
                for line, contexts in data.contexts_by_lineno(file).items()}
    except Exception as error:                  # of a job that was killed while it wrote
        return f"{part}: {error}"
    return found


def combine(name, pool):
    """Write lines-NAME.json: {"tests": {test: seconds}, "lines": {file: {line: [places in tests]}}}."""
    seconds = {}
    for file in sorted((WORK / "coverage").glob(f"{name}-*/seconds.json")):
        seconds.update(json.loads(file.read_text()))
    place = {test: i for i, test in enumerate(seconds)}
    lines = defaultdict(lambda: defaultdict(set))
    for found in pool.imap_unordered(lines_of, sorted((WORK / "coverage").glob(f"{name}-*/of.*"))):
        if isinstance(found, str):
            print(found, file=sys.stderr)
            continue
        for file, of_file in found.items():
            for line, tests in of_file.items():
                lines[file][line].update(place[test] for test in tests if test in place)
    (WORK / f"lines-{name}.json").write_text(json.dumps({"tests": seconds, "lines": {
        file: {line: sorted(tests) for line, tests in of_file.items() if tests} for file, of_file in lines.items()}}))
    print(f"{name}: {len(seconds)} tests, {sum(seconds.values()):.0f} seconds, {len(lines)} files", flush=True)


class Chooser:
    """Which tests a mutant meets."""

    def __init__(self):
        self.of = {name: json.loads((WORK / f"lines-{name}.json").read_text()) for name in SESSIONS
                   if (WORK / f"lines-{name}.json").exists()}

        self.unseen = set()             # mutants whose lines no test is known to run

    def tests(self, name, mutation, most, limit):
        """The tests of a session that run the lines of a mutation, those most worth their time first."""
        seconds, of_file = self.of[name]["tests"], self.of[name]["lines"].get(mutation.file, {})
        names = list(seconds)
        lines = range(mutation.lines[0], mutation.lines[1] + 1)
        if not mutation.function or mutation.body:      # run at import: who runs the function, or anything of the file
            lines = range(mutation.body[0], mutation.body[1] + 1) if mutation.body else map(int, of_file)
        found = {names[place] for line in lines for place in of_file.get(str(line), ())}
        if not found and name == "jobs" and mutation.key in self.unseen:
            # what a killed process ran is lost: then the tests of jobs that ran anything of the file
            found = {names[place] for tests in of_file.values() for place in tests}
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

class TimeIsUp(Exception):
    """The run ends here; what was being tried has no result."""


class Worker:
    """A copy of the tree, and what mutants meet in it."""

    def __init__(self, name, arguments, chooser, ends):
        self.number, self.workers, self.chooser, self.ends = name, arguments.workers, chooser, ends
        self.all_tests = arguments.again
        self.tree = copy_tree(f"{arguments.seed}-{name}")

    def session(self, name, tests):
        """Run tests of a session. Returns None where they pass, else the test that failed, or "time"."""
        ranks, seconds = SESSIONS[name][0], self.chooser.of[name]["tests"]
        # What hangs meets these: a test ends its session by its name, and mpirun ends what has no name.
        longest = int(20 + 5 * max(seconds[test] for test in tests))
        limit = int(60 + longest + 3 * sum(seconds[test] for test in tests))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            command = [*launcher(ranks, self.number, self.workers), sys.executable, "-m", "pytest", "-q", "-x",
                       "--no-header", "--color=no", "-p", "no:cacheprovider", f"--longest={longest}", *tests]
            running = subprocess.Popen(command, cwd=self.tree, text=True, errors="replace", start_new_session=True,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                       env=environment(self.tree, MPIEXEC_TIMEOUT=str(limit), TMPDIR=folder))
            try:
                text, _ = running.communicate(timeout=max(1, min(limit + 30, self.ends - time.monotonic())))
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.communicate()
                if time.monotonic() >= self.ends:
                    raise TimeIsUp from None
                return "time"
        if running.returncode in (0, 5):
            return None
        hits = failures(text)
        return hits[0] if hits else "time" if "time" in text.lower()[-400:] else text[-200:]

    def try_mutant(self, mutation):
        """Plant a mutation in the copy. Returns what is written of it."""
        began, path = time.monotonic(), Path(self.tree) / mutation.file
        text = path.read_text()
        number = text.count("\n", 0, mutation.begin)
        row = {"key": mutation.key, "file": mutation.file, "line": number + 1, "function": mutation.function,
               "kind": mutation.kind, "was": text.splitlines()[number].strip(),
               "now": mutation.apply(text).splitlines()[number].strip(), "result": "not covered", "tests": 0, "of": 0}
        path.write_text(mutation.apply(text))
        if not any(self.chooser.tests(name, mutation, 1, 0)[2] for name in self.chooser.of):
            self.chooser.unseen.add(mutation.key)
        try:
            for name, (_, _, most, limit) in SESSIONS.items():
                if name not in self.chooser.of:
                    continue
                tests, _, of = self.chooser.tests(name, mutation, *((10 ** 6, 3 * limit) if self.all_tests
                                                                    else (most, limit)))
                row["tests"], row["of"] = row["tests"] + len(tests), row["of"] + of
                if not tests:
                    continue
                row["result"] = "survived"
                by = self.session(name, tests)
                if by:
                    row.update(result="caught", by=by, session=name)
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
    """Try the mutants of a seed that have no result yet; with --again, the survivors once more with more tests."""
    path, ends = WORK / f"seed-{arguments.seed}.jsonl", time.monotonic() + arguments.minutes * 60
    done, chooser, waiting, lock = read_rows(path), Chooser(), queue.SimpleQueue(), threading.Lock()
    chosen = random.Random(arguments.seed).sample(candidates(), arguments.count)
    for mutation in chosen:
        row = done.get(mutation.key)
        if row is None or arguments.again and row["result"] != "caught" and not row.get("again"):
            waiting.put(mutation)
    total = waiting.qsize()

    def work(name):
        worker = Worker(name, arguments, chooser, ends)
        while time.monotonic() < ends:
            try:
                row = {**worker.try_mutant(waiting.get_nowait()), "again": arguments.again}
            except (queue.Empty, TimeIsUp):
                return
            with lock:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{waiting.qsize():4d} of {total} left  {row['seconds']:6.1f} s  {row['result']:11s} "
                      f"{row['key']}", flush=True)
    in_threads(work, arguments.workers)
    if arguments.check:
        check_catchers(path, Worker(0, arguments, chooser, ends))
    report(arguments)


def check_catchers(path, worker):
    """Run what caught mutants without any: a test that fails anyway has caught nothing."""
    rows = read_rows(path).values()
    for name in SESSIONS:
        tests = sorted({row["by"] for row in rows if row.get("session") == name and "::" in row["by"]})
        failed = worker.session(name, tests) if tests else None
        print(f"{len(tests)} catching tests of session {name} without a mutant: {failed or 'all pass'}")


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
        print(f"seed {arguments.seed}: {len(rows)} of {arguments.count} mutants, {len(caught)} caught "
              f"({of_all:.1%} of all, {of_others:.1%} of those that are not equivalent), {len(alive)} survive, "
              f"{equivalent} of them equivalent")
    for kind in sorted({row["kind"] for row in rows}):
        of_kind = [row["result"] for row in rows if row["kind"] == kind]
        print(f"    {kind:10s} {len(of_kind):4d}, {of_kind.count('caught'):4d} caught")
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
    parser.add_argument("--minutes", type=float, default=10 ** 6, help="cover, run: end then, whatever is done")
    parser.add_argument("--sessions", nargs="*", default=list(SESSIONS), metavar="NAME",
                        help="cover: those of %(default)s that are recorded, the others stay as they were")
    parser.add_argument("--again", action="store_true", help="run: survivors once more, with three times as many tests")
    parser.add_argument("--check", action="store_true", help="run: at the end, what caught mutants without any")
    arguments = parser.parse_args(words)
    {"cover": cover, "run": run, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
