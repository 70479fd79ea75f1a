"""Faults x commands x ranks x MPIs: every row ends within its limit, names the guilty rank, and loses no file.

    python tests/faults.py                                                  every row with this Python's MPI
    python tests/faults.py --python A/bin/python B/bin/python --write       those of two, into docs/faults.md

tests/test_rank_faults.py runs some of the rows.
"""
import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

from spmd import job_environment  # noqa: E402

DOCUMENT = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HOST = re.escape(socket.gethostname())
STALL = 3               # seconds, MPITP_STALL_LIMIT of the rows
AT_ONCE, AFTER_LEFT, AFTER_STALL = 20, 24, 30   # seconds of a row, the start of Python on a busy machine included

TRAIN = ["train", "--hidden-size", "16", "--num-layers", "1", "--seq-length", "16", "--micro-batch-size", "1",
         "--data", str(ROOT / "README.md"), "--train-iters", "6", "--eval-batches", "1"]
FROM_MODEL = ["train", "--data", str(ROOT / "README.md"), "--train-iters", "2"]
COMMANDS = {
    "verify": ["verify", "--hidden-size", "32"],
    "train": TRAIN,
    "generate": ["generate", "--model", "a", "--ids", "1,2,3", "--max-new-tokens", "6"],
    "score": ["score", "--model", "a", "--ids-file", "ids.txt", "--window", "8"],
    "bench": ["bench", "ffn", "--hidden-size", "16", "--rounds", "2"],
    "doctor": ["doctor"],
    "train, data-parallel": [*TRAIN, "--data-parallel", "2"],
    "train, sequence-parallel": [*TRAIN, "--sequence-parallel", "--recompute", "block"],
    "generate, bfloat16": ["generate", "--model", "bf16", "--ids", "1,2,3", "--max-new-tokens", "6",
                           "--weights", "bfloat16"],
    "generate, chat": ["generate", "--model", "chat", "--chat", "--messages", "messages.json", "--max-new-tokens", "6"],
    "export": ["export", "run", "exported", "--family", "llama"],
    "plan": ["plan", "--model", "a", "-n", "1,2"],
    "inspect": ["inspect", "a"],
    "scale": ["scale", "ffn", "--ranks", "1"],
}


@dataclass(frozen=True)
class Row:
    """A fault of one rank in a command or a program, and how that has to end.

    Parameters
    ----------
    fault, command : str
    rank : int
        The guilty one; -1: both differ.
    starts : tuple of (environment, arguments of Python), one a rank
    words : str
        A pattern of what is said.
    limit : float
        Seconds.
    is_good : bool
        Whether the job must end with 0 instead.
    hosts : int
        How many there seem to be: with 2, each rank is on one of its own, as MPICH's launcher can have it.
    """
    fault: str
    command: str
    rank: int
    starts: tuple
    words: str
    limit: float = AT_ONCE
    is_good: bool = False
    hosts: int = 1


@dataclass
class Outcome:
    """How a row ended with one MPI."""
    row: Row
    mpi: str
    seconds: float
    status: int
    line: str
    problems: list = field(default_factory=list)

    @property
    def is_late(self):
        """Whether it took too long, and nothing else is wrong."""
        return bool(self.problems) and all(problem.startswith("took") for problem in self.problems)


def start(*words, **environment):
    """(environment, arguments of Python) of one rank that runs a command."""
    return environment, ("-m", "mpitp", *words)


def differing(fault, command, words, *options, rank=1, others=(), limit=AT_ONCE, **environment):
    """A row of a command that one rank of two gets other options or variables for; `others`: the other's options."""
    good, bad = start(*COMMANDS[command], *others), start(*COMMANDS[command], *options, **environment)
    return Row(fault, command, rank, (good, bad) if rank == 1 else (bad, good), words, limit)


def disagreements():
    """Rows of ranks that do not mean the same."""
    for command, flag, value in (
            ("verify", "--seed", "7"), ("verify", "--dtype", "float64"), ("train", "--seed", "7"),
            ("train", "--weight-decay", "0.5"), ("train", "--eval-interval", "1"), ("train", "--hidden-size", "32"),
            ("generate", "--max-new-tokens", "9"), ("generate", "--temperature", "0.5"), ("generate", "--seed", "3"),
            ("score", "--window", "4"), ("bench", "--rounds", "3"), ("bench", "--reproducible", None),
            ("train", "--data-parallel", "2"), ("train", "--sequence-parallel", None),
            ("train", "--recompute", "block"), ("train, data-parallel", "--clip-grad", "0"),
            ("generate", "--weights", "bfloat16"), ("generate, chat", "--top-k", "3"),
            ("export", "--dtype", "bfloat16"), ("export", "--family", "qwen2"),
            ("plan", "--tokens", "9"), ("inspect", "--weights", "bfloat16"), ("scale", "--rounds", "3")):
        given = [flag] if value is None else [flag, value]
        for rank in (0, 1):
            yield differing(f"another {flag}", command, f"the ranks disagree on {flag}: rank 0: .*; rank 1: ", *given,
                            rank=rank)
    yield differing("--resume on it alone", "train", "the ranks disagree on --resume", "--resume", "--out", "out",
                    others=("--out", "out"))
    yield differing("--json on it alone", "doctor", "the ranks disagree on --json: rank 0: not given; rank 1: given",
                    "--json", "doctor.json")
    for rank in (0, 1):
        yield differing("an unknown option", "verify", f"rank {rank} on {HOST}: unrecognized arguments: --sed 7",
                        "--sed", "7", rank=rank)
    yield Row("another command", "generate", 1, (start(*COMMANDS["generate"]), start(*COMMANDS["score"])),
              "the ranks disagree on the command: rank 0: generate; rank 1: score")
    yield differing("another MPITP_TRANSPORT", "verify", "the ranks disagree on MPITP_TRANSPORT",
                    MPITP_TRANSPORT="mpi")
    yield differing("another MPITP_STALL_LIMIT", "verify", "the ranks disagree on .*MPITP_STALL_LIMIT=77",
                    MPITP_STALL_LIMIT="77")


def files():
    """Rows of ranks that do not read the same, or cannot."""
    of_model = {"generate": COMMANDS["generate"], "score": COMMANDS["score"],
                "verify": ["verify", "--model", "a"]}
    for command, words in of_model.items():
        for folder, found in (("b", "the ranks disagree on model.safetensors: rank 0: .*; rank 1: "),
                              ("e", "the ranks disagree on generation_config.json: rank 0: .*; rank 1: "),
                              ("nowhere", f"rank 1 on {HOST}: nowhere: found no such folder")):
            other = [folder if word == "a" else word for word in words]
            yield Row({"b": "other weights", "e": "another generation_config.json", "nowhere": "no folder"}[folder],
                      command, 1, (start(*words), start(*other)), found)
        flipped = ["c" if word == "a" else word for word in words]
        yield Row("a flipped bit, --verify-weights", command, 1,
                  (start(*words, "--verify-weights"), start(*flipped, "--verify-weights")),
                  "the ranks disagree on model.safetensors")
    for command, words in (("export", COMMANDS["export"]),
                           ("train", [*FROM_MODEL, "--model", "run/step-00000006"])):
        for folder, found in (("run2", "the ranks disagree on state.json: rank 0: .*; rank 1: "),
                              ("nowhere", f"rank 1 on {HOST}: nowhere.*: found no such")):
            other = [word.replace("run", folder, 1) if word.startswith("run") else word for word in words]
            yield Row("another run" if folder == "run2" else "no run", command, 1, (start(*words), start(*other)),
                      found)
    yield Row("another step folder", "train, data-parallel", 1, tuple(
        start(*COMMANDS["train, data-parallel"], "--resume", "--out", folder, "--train-iters", "9") for folder in
        ("half", "half2")), r"the ranks disagree on whether half/step-\d+ is whole: rank 0: whole; rank 1: .*checksum")
    for name, found in ((str(ROOT / "CHANGELOG.md"), "the ranks disagree on the data: rank 0: .* tokens"),
                        ("nowhere", f"rank 1 on {HOST}: nowhere: found No such file")):
        other = [name if word == str(ROOT / "README.md") else word for word in TRAIN]
        yield Row("other data" if found.startswith("the") else "no data", "train", 1, (start(*TRAIN), start(*other)),
                  found)


ENDS = {        # fault: (what is said, limit); RANK is the guilty one
    "is stopped": (r"not there: rank RANK of 2 on HOST \(process \d+\) has given no sign of life .*\(stopped\)",
                   AFTER_STALL),
    "spins": (r"not there: rank RANK of 2 on HOST \(process \d+\) is at .*faulty.py:\d+ in spin", AFTER_STALL),
    "sleeps": (r"not there: rank RANK of 2 on HOST \(process \d+\) is at .*faulty.py:\d+ in ", AFTER_STALL),
    "raises": ("rank RANK of 2 ends the job, on HOST: Traceback(.|\n)*RuntimeError: boom", AT_ONCE),
    "has no memory": ("rank RANK of 2 ends the job, on HOST: Traceback(.|\n)*MemoryError", AT_ONCE),
    "is interrupted": ("rank RANK of 2 ends the job, on HOST: interrupted", AT_ONCE),
    "finds bad input": ("rank RANK of 2.* on HOST: (Traceback)?(.|\n)*found a, expected b", AT_ONCE),
    "exits with 0": (r"not there: rank RANK of 2 on HOST \(process \d+\) has left the program", AFTER_LEFT),
    "exits with 3": ("rank RANK of 2 ends the job, on HOST: Traceback(.|\n)*SystemExit: 3", AT_ONCE),
    "is killed": ("(Killed|signal 9|SIGKILL|EXIT CODE: 9)", AT_ONCE),
    "crashes": ("(Segmentation fault|signal 11|EXIT CODE: 139)", AT_ONCE),
    "does another collective": (r"not there: rank RANK of 2 on HOST \(process \d+\) is inside of broadcast 5 float64",
                                AFTER_STALL),
    "returns early": (r"not there: rank RANK of 2 on HOST \(process \d+\) has left the program", AFTER_LEFT),
    "closes the group": (r"not there: rank RANK of 2 on HOST \(process \d+\) has closed the group", AFTER_LEFT),
    "fails in a thread": ("rank RANK of 2 ends the job, on HOST: Traceback(.|\n)*RuntimeError: boom", AT_ONCE),
    "computes in a thread": ("rank RANK of 2 ends the job, on HOST: Traceback(.|\n)*found a collective in another "
                             "thread", AT_ONCE),
}
IN_COMMANDS = ("is stopped", "spins", "raises", "exits with 0", "is killed")
IN_PROGRAMS = tuple(ENDS)
NEWER = {"train, data-parallel": 5, "train, sequence-parallel": "control:2", "generate, bfloat16": 5,
         "generate, chat": 5, "export": "control:2"}        # and the place where they fail


def ends():
    """Rows of ranks that fail while others wait for them."""
    for command in ("verify", "train", "generate", "score", "bench", *NEWER):
        for fault in IN_COMMANDS:
            for rank in (0, 1):
                yield failing(fault, command, COMMANDS[command], rank, NEWER.get(command, 5))
    for program in ("with", "bare", "guarded"):
        for fault in IN_PROGRAMS:
            if (fault, program) not in (("returns early", "with"), ("returns early", "guarded"),
                                        ("exits with 3", "bare")):
                yield failing(fault, program, [program], 1, 3)
    yield Row("exits with 3", "bare", 1, failing("exits with 3", "bare", ["bare"], 1, 3).starts,
              "not there: rank 1 of 2 .* has left the program", AFTER_LEFT)
    yield from early()
    program = "import mpitp, numpy as np\nwith mpitp.TensorParallelGroup(check=True) as group:\n    " \
              "group.subgroup(0) if group.rank else group.all_reduce(np.ones(3))"
    yield Row("makes a subgroup alone, check=True", "with", 1, 2 * (({}, ("-c", program)),),
              r"the ranks disagree on a collective: rank 0: all_reduce sum float64 \(3,\); rank 1: subgroup")


def early():
    """Rows of ranks that fail before their first group is made, while the others wait there."""
    ends = {"exits with 0": "sys.exit(0)", "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
            "spins": "while True: pass"}
    said = rf"rank 0 of 2 on {HOST} waits for (Dup|Allreduce|allgather) .*not there: rank 1, of which nothing is known"
    group = ({}, ("-c", "import mpitp\nwith mpitp.TensorParallelGroup() as group: pass"))
    for fault, line in ends.items():
        first = f"import os, signal, sys, mpi4py.MPI, mpitp\n{line}"
        yield Row(f"{fault} before the group", "with", 1, (group, ({}, ("-c", first))), said, AFTER_STALL)
        yield Row(f"{fault} before it begins", "verify", 1, (start(*COMMANDS["verify"]), ({}, ("-c", first))), said,
                  AFTER_STALL)


def failing(fault, command, words, rank, calls, hosts=1):
    """The row of a rank that fails in place of an all-reduce."""
    said, limit = ENDS.get(fault, ("", AT_ONCE))
    arguments = (str(SUPPORT / "faulty.py"), fault, str(rank), str(calls), *words)
    return Row(fault, command, rank, 2 * (({}, arguments),),
               said.replace("RANK", str(rank)).replace("HOST", HOST), limit, hosts=hosts)


def hosts():
    """Rows of ranks on two hosts, which see of each other what MPI carries."""
    stopped = r"not there: rank RANK of 2 on HOST \(process \d+\) has given no sign of life since .* " \
              r"\(stopped, or HOST or the network to it is down\)"
    for fault in ("is stopped", "spins", "exits with 0"):
        for rank in (0, 1):
            row = failing(fault, "train", COMMANDS["train"], rank, 5, hosts=2)
            words = stopped.replace("RANK", str(rank)).replace("HOST", HOST) if fault == "is stopped" else row.words
            yield replace(row, words=f"rank {1 - rank} of 2 on {HOST} waits for all_reduce .*{words}")
    for fault in ("raises", "finds bad input"):
        yield failing(fault, "train", COMMANDS["train"], 1, 5, hosts=2)
    yield failing("closes the group", "bare", ["bare"], 1, 3, hosts=2)
    row = failing("is stopped", "bare", ["bare"], 1, 3, hosts=2)
    below = f"import mpi4py, sys, runpy\nmpi4py.rc.thread_level = 'serialized'\nsys.argv = {list(row.starts[0][1])}\n" \
            f"sys.path.insert(0, {str(SUPPORT)!r})\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    yield replace(row, fault="is stopped, below MPI_THREAD_MULTIPLE", starts=2 * (({}, ("-c", below)),),
                  words="warning: found MPI_THREAD_SERIALIZED on several hosts, expected(.|\n)*not there: one of rank "
                        f"1 on {HOST}, or the network")
    yield replace(differing("another --seed", "train", "the ranks disagree on --seed", "--seed", "1"), hosts=2)
    yield Row("nothing", "with", -1, 2 * (({}, (str(SUPPORT / "faulty.py"), "nothing", "0", "0", "with")),),
              "^came to the end\ncame to the end\n$", is_good=True, hosts=2)


def innocent():
    """Rows of what is no fault: the job must end well."""
    fork = """if True:
        import os, time, numpy as np, mpitp
        with mpitp.TensorParallelGroup() as group:
            group.all_reduce(np.ones(3))
            if group.rank == 1:
                child = os.fork()
                if child == 0:
                    raise RuntimeError("of the child")
                os.waitpid(child, 0)
            assert group.all_reduce(np.ones(3))[0] == 2
            print("came to the end")
    """
    dropped = """if True:
        import gc, numpy as np, mpitp
        with mpitp.TensorParallelGroup() as group:
            for _ in range(20):
                group.begin_all_reduce(np.ones(300000))
                gc.collect()
                np.zeros(300000)
            assert len(group.pending) == 20
            assert group.all_reduce(np.ones(3))[0] == 2
        print("came to the end")
    """
    late = """if True:
        import time, numpy as np, mpitp
        with mpitp.TensorParallelGroup() as group:
            group.report(1)
            last = group.all_reduce(np.ones(3))[0]
        if group.rank == 0:
            time.sleep(5)
        print("came to the end")
    """
    slow = """if True:
        import time, numpy as np, mpitp
        with mpitp.TensorParallelGroup() as group:
            for _ in range(5):
                if group.rank == 0:
                    time.sleep(1.2)
                group.all_reduce(np.ones(3))
        print("came to the end")
    """
    for fault, program, limit in (("a forked child raises", fork, AT_ONCE), ("a handle is dropped", dropped, AT_ONCE),
                                  ("others leave while it goes on", late, AT_ONCE + 5),
                                  ("is slow, below the limit", slow, AT_ONCE + 6)):
        yield Row(fault, "with", int(fault.startswith("a f")), 2 * (({}, ("-c", program)),), "came to the end", limit,
                  is_good=True)
    yield replace(differing("another kind of machine", "verify", "warning: the ranks run on different kinds of machine",
                            OPENBLAS_CORETYPE="Haswell"), is_good=True)
    # Both ranks hold the one key/value head, and dot products of 96 numbers have other bits than elsewhere.
    larger = ("--hidden-size", "96", "--train-iters", "20", "--num-attention-heads", "2", "--num-query-groups", "1")
    yield differing("another kind of machine", "train", "found different weights of .* on the ranks, expected equal "
                    "copies: the ranks run on different kinds of machine", *larger, others=larger,
                    OPENBLAS_CORETYPE="Haswell")


def rows():
    """Every row."""
    return [*disagreements(), *files(), *ends(), *hosts(), *innocent()]


# --- running them ---------------------------------------------------------------------------------------------

def prepare(folder):
    """Write what the rows read: checkpoints that differ, token ids, and a step folder that no fault may touch."""
    import ml_dtypes

    import make_tiny_checkpoints as tiny
    folder = Path(folder)
    tiny.write(folder / "a", tiny.load("gemma3_text"))
    for name in ("b", "c", "e"):
        shutil.copytree(folder / "a", folder / name)
    content = bytearray((folder / "a" / "model.safetensors").read_bytes())
    first = 8 + int.from_bytes(content[:8], "little")
    flipped = bytearray(content)
    flipped[first + 700] ^= 1
    (folder / "c" / "model.safetensors").write_bytes(flipped)
    content[first::4] = bytes(byte ^ 1 for byte in content[first::4])
    (folder / "b" / "model.safetensors").write_bytes(content)
    (folder / "e" / "generation_config.json").write_text('{"eos_token_id": 3}')
    (folder / "a" / "generation_config.json").write_text('{"eos_token_id": 5}')
    for name in ("b", "c"):
        shutil.copy(folder / "a" / "generation_config.json", folder / name)
    tiny.write(folder / "bf16", tiny.load("gemma3_text"), ml_dtypes.bfloat16)
    if tokenizer_works():
        import tokenizers
        shutil.copytree(folder / "a", folder / "chat")
        vocabulary = {word: number for number, word in enumerate(["<unk>", "hi", *"abcdefghijklmnop"])}
        model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
        tokenizers.Tokenizer(model).save(str(folder / "chat" / "tokenizer.json"))
        (folder / "chat" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "messages.json").write_text('[{"role": "user", "content": "hi"}]')
    (folder / "ids.txt").write_text(" ".join(str(i % 37) for i in range(60)))
    (folder / "out" / "step-00000002").mkdir(parents=True)
    (folder / "out" / "step-00000002" / "state.json").write_text("{}")


def tokenizer_works():
    """Whether what chats need is installed."""
    return importlib.util.find_spec("tokenizers") and importlib.util.find_spec("jinja2")


def train(folder, python):
    """Write runs that differ in their weights: two whole ones, and two that stopped at half of their steps."""
    for name, words in (("run", ()), ("run2", ("--seed", "9")), ("half", ()), ("half2", ("--seed", "9"))):
        iterations = ("--train-iters", "9", "--save-interval", "5") if name.startswith("half") else ()
        subprocess.run([python, "-m", "mpitp", *TRAIN, "--out", name, *words, *iterations], cwd=folder, check=True,
                       env=job_environment(), capture_output=True)
    half = Path(folder) / "half2"
    for name in ("half", "half2"):
        shutil.rmtree(half.with_name(name) / "step-00000009")
    shutil.copy(half.with_name("half") / "step-00000005" / "state.json", half / "step-00000005" / "state.json")


def digest(folder):
    """What the files of a folder are, by name; locks come and go with the rows that run beside this one."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != "lock.json"}


def command_line(row, python):
    """The words that start a row with the MPI beside a Python."""
    launcher = Path(python).parent / "mpirun"
    words = [str(launcher) if launcher.exists() else "mpirun"]
    if row.hosts == 2:
        words += ["-launcher", "fork", "-hosts", "one,two", "-ppn", "1"]
    for number, (environment, arguments) in enumerate(row.starts):
        words += [":"] if number else []
        settings = [f"{name}={value}" for name, value in environment.items()]
        words += ["-n", "1", *(["env", *settings] if settings else []), python, *arguments]
    return words


def run(row, python, mpi, folder, stall=STALL):
    """Run a row, where the watchdog waits for `stall` seconds, and return its Outcome."""
    before, began = digest(folder), time.monotonic()
    environment = job_environment(MPITP_STALL_LIMIT=f"{stall:g}", MPIEXEC_TIMEOUT="60")
    try:
        # In a session of its own, which Linux gives a share of the processor of its own.
        done = subprocess.run(command_line(row, python), env=environment, cwd=folder, text=True, capture_output=True,
                              timeout=60, start_new_session=True)
        status, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, said = -1, str(error.output) + str(error.stderr)
    outcome = Outcome(row, mpi, time.monotonic() - began, status, line_of(row, said))
    if outcome.seconds > row.limit + stall - STALL:
        outcome.problems.append(f"took {outcome.seconds:.1f} s")
    if (status == 0) != row.is_good:
        outcome.problems.append(f"status {status}")
    if not re.search(row.words, said):
        outcome.problems.append("does not say it: " + said[-1200:].replace("\n", " | "))
    lost = {name for name, digest_before in before.items() if digest(folder).get(name) != digest_before}
    if lost:
        outcome.problems.append(f"lost {', '.join(sorted(lost))}")
    return outcome


def run_again_if_late(row, python, mpi, folder, stall):
    """Run a row, and once more where the machine was too busy for its limit; return the last Outcome."""
    outcome = run(row, python, mpi, folder, stall)
    is_busy = os.getloadavg()[0] > 2 * os.cpu_count()
    return run(row, python, mpi, folder, stall) if outcome.is_late and is_busy else outcome


def line_of(row, said):
    """The line that says it, without what differs from machine to machine."""
    found = re.search(row.words, said)
    if not found:
        return ""
    start = said.rfind("\n", 0, found.start()) + 1
    end = said.find("\n", found.start())
    line = said[start:end if end >= 0 else None].removeprefix("mpitp: ")
    last = said[:found.end()].rsplit("\n", 1)[-1] if "\n" in found[0] else ""
    line = f"{line} {last}" if last else line
    line = re.sub(HOST, "HOST", line).replace(str(ROOT), "").replace("|", "/")
    line = re.sub(r"since \d\d:\d\d:\d\d", "since 12:00:00", line)
    line = re.sub(r"at \d\d:\d\d:\d\d", "at 12:00:00", re.sub(r"process \d+", "process N", line))
    return line if len(line) <= 200 else f"{line[:90]} ... {line[-105:]}"


def is_possible(row, mpi):
    """Whether an MPI's launcher can start a row."""
    return row.hosts == 1 or mpi == "MPICH"


def mpi_of(python):
    """The name of the MPI of an environment."""
    program = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    return subprocess.run([python, "-c", program], text=True, capture_output=True, check=True).stdout.strip()


def table(outcomes):
    """The lines of the table in the documentation."""
    yield "| fault | in | rank | MPI, hosts | seconds | status | what is said |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for outcome in outcomes:
        row = outcome.row
        status = "0" if outcome.status == 0 else "not 0"
        verdict = "" if not outcome.problems else f"**{'; '.join(outcome.problems)[:80]}** "
        yield f"| {row.fault} | {row.command} | {row.rank} | {outcome.mpi}, {row.hosts} | {outcome.seconds:.1f} of " \
              f"{row.limit} | {status} | {verdict}{outcome.line.strip()} |"


def main():
    """Run the rows, print what fails, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="FILE", help="of environments")
    parser.add_argument("--write", action="store_true", help="write the rows of these MPIs into docs/faults.md")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose fault and command match")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="that run at a time")
    parser.add_argument("--stall", type=float, default=STALL, metavar="S", help="seconds that the watchdog waits: more "
                        f"than {STALL} where the ranks of a job take so long to start one after the other")
    arguments = parser.parse_args()
    outcomes = []
    for python in arguments.python:
        mpi = mpi_of(python)
        chosen = [row for row in rows() if is_possible(row, mpi)
                  and re.search(arguments.only, f"{row.fault}, {row.command}")]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
            prepare(folder)
            train(folder, python)
            for outcome in pool.map(lambda row: run_again_if_late(row, python, mpi, folder, arguments.stall), chosen):
                outcomes.append(outcome)
                print(f"{'ok' if not outcome.problems else 'FAILED':7s}{outcome.seconds:5.1f} s  {outcome.row.fault}, "
                      f"{outcome.row.command}, rank {outcome.row.rank}, {mpi}  {'; '.join(outcome.problems)}",
                      flush=True)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{len(outcomes)} rows, {failed} failed")
    if arguments.write:
        text = DOCUMENT.read_text()
        start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        others = [line for line in text[start:end].splitlines() if line.startswith("| ")
                  and not any(f"| {mpi}, " in line for mpi in {outcome.mpi for outcome in outcomes})][2:]
        failed += sum("**" in line for line in others)
        rows_together = len(outcomes) + len(others)
        summary = f"{rows_together} rows, of which {rows_together - failed} end as they must."
        DOCUMENT.write_text("\n".join([text[:start], "", summary, "", *table(outcomes), *others, "", text[end:]]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
