"""The command line as a newcomer meets it: help that fits and lists everything, examples that run, tables that fit."""
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import make_tiny_checkpoints as tiny
from judge_host import Host
from mpitp import commands
from mpitp.commands import COMMANDS, WIDTH
from spmd import job, job_environment, mpirun

pytestmark = pytest.mark.launcher
EXAMPLES = [(name, line) for name, command in COMMANDS.items() for line, _ in command.examples]


def help_of(*words, columns=300):
    done = subprocess.run([sys.executable, "-m", "mpitp", *words, "--help"], text=True, capture_output=True,
                          timeout=300, env=job_environment(COLUMNS=str(columns)))
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def widest(text):
    return max(text.splitlines(), key=len)


def test_help_lists_every_command_with_one_line_each():
    lines = help_of().splitlines()
    assert all(f"  {name:<10}{command.summary}" in lines for name, command in COMMANDS.items())
    files = Path(commands.__file__).parent.glob("*.py")
    assert set(COMMANDS) == {file.stem for file in files if "\ndef run(arguments" in file.read_text()} - {"verify_all"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_ends_with_two_examples(name):
    text = help_of(name)
    assert len(widest(text)) <= WIDTH, widest(text)
    end = text[text.index("\nexamples:\n"):].splitlines()[2:]
    (first, of_first), (second, of_second) = COMMANDS[name].examples
    assert [line.strip() for line in end] == [first, of_first, second, of_second]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the examples name: a tiny checkpoint, a text, token ids, a dump of a right run, a trained one."""
    folder = tmp_path_factory.mktemp("examples")
    tiny.write(folder / "my-model", tiny.load("gemma3_text"))
    (folder / "book.txt").write_text(400 * "once upon a time there was a row of a matrix ")
    (folder / "ids.txt").write_text(" ".join(str(i % 37) for i in range(60)))
    done = job(1, "-m", "mpitp", "train", "--hidden-size", 24, "--num-attention-heads", 3, "--num-layers", 1,
               "--seq-length", 8, "--train-iters", 3, "--out", folder / "my-run")
    assert done.returncode == 0, done.stderr
    Host(folder / "my-dump", 2, "mlp", {"activation": "relu"}).mlp(6, 9)
    return folder


def add_tokenizer(folder):
    """Write a tokenizer of letters and the space, which are within the 37 tokens of the tiny model."""
    tokenizers = pytest.importorskip("tokenizers")
    parts = "abcdefghijklmnopqrstuvwxyz "
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({part: i for i, part in enumerate(parts)}, []))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name, line", EXAMPLES, ids=[line.split("mpitp ")[1] for _, line in EXAMPLES])
def test_examples_run_and_their_tables_fit(folder, tmp_path, name, line, ranks):
    """Each example on 1 and on 2 ranks; files that it writes go to a folder of its own."""
    if name == "scale" and ranks > 1:
        pytest.skip("it starts the ranks itself")
    if "--prompt" in line or "--text" in line:
        add_tokenizer(folder / "my-model")
    words = shlex.split(line)
    words = words[words.index("-m"):]
    assert words[:3] == ["-m", "mpitp", name]
    for given in ("my-model", "my-dump", "my-run", "book.txt", "ids.txt"):
        (tmp_path / given).symlink_to(folder / given)
    done = job(ranks, *words, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 or name == "doctor", done.stdout + done.stderr
    table = done.stdout.split("\n\n", 1)[1] if name == "generate" else done.stdout     # without the text itself
    assert len(widest(table)) <= WIDTH, widest(table)
    assert done.stderr == ""
    for written in (word for word in words if word.endswith(".json")):
        assert json.loads((tmp_path / written).read_text())["schema"] == f"mpitp.{name}/1"


# --- progress ----------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from mpitp.commands.progress import Progress, is_watched, progress
class Written:
    text = ""
    def __init__(self, stream):
        self.stream = stream
    def __getattr__(self, name):
        return getattr(self.stream, name)
    def write(self, text):
        Written.text += text
        return self.stream.write(text)
def seconds(least, words):
    time.sleep(least)
    while is_watched() and words not in Written.text:       # on a busy machine the bar comes later
        time.sleep(0.02)
sys.stderr = Written(sys.stderr)
with Progress("nothing to see"):
    pass
print("tqdm" in sys.modules)
with Progress("loading", 2) as bar:
    seconds(1.2, "loading")
    bar.advance("checking")
    seconds(1.1, "checking  1/2" if sys.modules.get("tqdm") else "loading")
print(list(progress(range(3), 3, "windows")))
"""


def in_a_terminal(*arguments, stdout=True, stderr=True, command=(sys.executable,), **environment):
    """(what Python, or mpirun, writes to a pseudo-terminal, to pipes) where its streams are the one or the other."""
    ours, theirs = os.openpty()
    stdout, stderr = (theirs if terminal else subprocess.PIPE for terminal in (stdout, stderr))
    process = subprocess.Popen([*command, *arguments], text=True, env=job_environment(**environment), stdout=stdout,
                               stderr=stderr)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:                         # Linux: all who could write are gone
        pass
    os.close(ours)
    pipes = [stream for stream in process.communicate(timeout=300) if stream]
    assert process.returncode == 0, shown
    return shown.decode(), "".join(pipes)


def test_a_bar_in_a_terminal():
    """It comes after a second, names what runs, and leaves no trace; tqdm is not imported for what is short."""
    pytest.importorskip("tqdm")
    shown, _ = in_a_terminal("-c", SLOW)
    assert shown.startswith("False\r\n") and "\rloading  0/2 " in shown and "\rchecking  1/2 " in shown
    assert shown.rstrip().split("\r")[-1] == "[0, 1, 2]" and "nothing" not in shown and "windows" not in shown
    assert all(len(line) <= WIDTH for line in shown.split("\r"))


def test_a_line_without_tqdm():
    shown, _ = in_a_terminal("-c", "import sys; sys.modules['tqdm'] = None\n" + SLOW)
    assert shown.count("loading ...\r\n") == 1 and shown.count("\r") == shown.count("\r\n")


@pytest.mark.parametrize("streams, environment", [
    (dict(stdout=False), {}), (dict(stderr=False), {}),     # the second: rank 0 of Open MPI, with output to a file
    ({}, dict(MPITP_PROGRESS="0"))])
def test_no_bar_in_logs(streams, environment):
    shown, piped = in_a_terminal("-c", SLOW, **streams, **environment)
    assert "loading" not in shown + piped and "[0, 1, 2]" in shown + piped


def test_the_variable_decides_for_ranks_whose_streams_are_pipes():
    """Rank 0 alone; the bar is wiped out before the table."""
    pytest.importorskip("tqdm")
    for wanted in ("0", "1"):
        done = job(2, "-c", SLOW, environment=dict(MPITP_PROGRESS=wanted))
        assert done.returncode == 0 and done.stderr.count("checking  1/2") == int(wanted), done.stderr


@pytest.mark.parametrize("stdout, stderr", [(True, True), (False, True), (True, False)])
def test_the_streams_of_mpirun_decide_where_those_of_ranks_are_pipes(stdout, stderr):
    pytest.importorskip("tqdm")
    shown, piped = in_a_terminal("-c", SLOW, stdout=stdout, stderr=stderr, command=(*mpirun(2), sys.executable))
    assert ("checking  1/2" in shown) == (stdout and stderr)
    assert "checking" not in piped and "[0, 1, 2]" in shown + piped


def test_training_in_a_terminal_moves_one_line_and_in_a_log_none():
    small = shlex.split("-m mpitp train --train-iters 3 --hidden-size 16 --num-layers 1 --eval-interval 3")
    assert "\rstep      2/3" in in_a_terminal(*small)[0]
    shown, _ = in_a_terminal(*small, stderr=False)          # Open MPI's rank 0 with output to a file
    assert "\rstep" not in shown.replace("\r\n", "\n") and "step      2/3" in shown


PRINTED = """
import sys
from mpitp.commands import run_command
from mpitp.commands.progress import Progress

def enter(bar):
    print(bar.what, "of", bar.total, file=sys.stderr)
    return bar

def advance(bar, what=None):
    print(bar.what, "is through", file=sys.stderr)

Progress.__enter__, Progress.advance = enter, advance
run_command(sys.argv[1:])
"""


@pytest.mark.parametrize("line, shown", [
    ("verify --hidden-size 16", ["over the ranks of 4", "forward and backward over the ranks is through"]),
    ("verify --all", ["decoder, GPT-2's kind is through"]),
    ("bench allreduce matmul --max-bytes 64 --hidden-size 16 --rounds 1", ["bench of 2", "bench matmul is through"]),
    ("score --model my-model --ids-file ids.txt --window 8 --stride 8", ["loading my-model of None", "windows of 8"]),
    ("generate --model my-model --ids 1,2 --ids 3 --max-new-tokens 5", ["loading my-model of None", "tokens of 5"])])
def test_what_may_take_long_has_a_bar(folder, line, shown):
    done = job(1, "-c", PRINTED, *shlex.split(line), cwd=folder)
    assert done.returncode == 0 and all(text in done.stderr for text in shown), done.stderr
    assert "windows is through\n" * 8 in done.stderr or "score" not in line


def test_paths_are_named_and_may_differ():
    """Every option whose value is a file or folder is known as one, so that ranks are not compared by it."""
    found = set()
    for name in COMMANDS:
        parser = commands.command_parser(name, importlib.import_module(f"mpitp.commands.{name}"))
        for action in parser._actions:
            if any(word in str(action.metavar) for word in ("FILE", "DIR", "DUMP", "RUN")):
                found.add(action.dest)
    assert found == set(commands.PATHS)
