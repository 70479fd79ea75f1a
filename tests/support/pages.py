"""README.md and the pages of docs/ as programs: their code blocks are run, and what they print is what the page shows.

A page's fenced blocks are read in order:

    ```python           run in one namespace a page; a ```text block right behind it is exactly what it prints
    ```python           with a first line `# name.py` is a program: a file of that name for the commands of the page
    ```console          `$ command`, then exactly what it prints

An HTML comment above a block, which no reader sees, says what else is true of it:

    <!-- rounding -->           another BLAS gives other last digits: see `require_alike`
    <!-- verdicts -->           of the lines that end in ok: their names, and what stands in their last two columns
    <!-- machine -->            hexadecimal numbers are exact on the type of machine of RECORDED_ON; all else is exact
    <!-- fails -->              the command's exit status is not 0
    <!-- not run: reason -->    the block is shown only
    <!-- shown in FILE -->      the block is part of that file, word for word
"""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

from mpitp.comm.launch import machine
from spmd import ROOT, job_environment

FENCE = re.compile(r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>[^\n`]*)\n(?P<text>.*?)^```$", re.S | re.M)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?e[-+]?\d+|[-+]?\d+\.\d+|[-+]?\d+")
RECORDED_ON = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())["machine"]
SHOWN_ONLY = ("", "text", "bash")                   # drawings, and lines for the reader to copy


@dataclass
class Block:
    """One fenced block of a page."""
    mark: str
    language: str
    text: str
    line: int

    @property
    def program(self):
        """The file's name if the block is a program."""
        found = re.match(r"# (\w+\.py)\n", self.text) if self.language == "python" else None
        return found and found[1]

    @property
    def commands(self):
        """[(command, what it prints)] of a console block."""
        parts = re.split(r"^\$ ", self.text, flags=re.M)[1:]
        joined = [re.sub(r"\\\n\s*", "", part) for part in parts]
        return [tuple(part.split("\n", 1)) for part in joined]


def blocks(page):
    """The fenced blocks of a page, a pathlib.Path, in order."""
    text = page.read_text()
    return [Block(found["mark"] or "", found["language"], found["text"], text.count("\n", 0, found.start("text")))
            for found in FENCE.finditer(text)]


def comparable(text):
    """The lines without what another machine or moment changes: those that name the machine, and times."""
    lines = [line.rstrip() for line in text.splitlines()
             if not line.startswith("mpitp ") and ", NumPy " not in line and not line.startswith("  time ")]
    return [line for line in lines if line]


def require_alike(found, expected):
    """The same words and whole numbers; fractions as near as rounding leaves them on another processor.

    That is half a unit of an error ratio (a line that ends in ok), a twentieth of a loss (many steps lie behind it),
    1e-6 of a difference that is rounding alone, and one thousandth of everything else.
    """
    found, expected = comparable(found), comparable(expected)
    assert len(found) == len(expected), "\n".join(found)
    for a, b in zip(found, expected):
        assert re.sub(r"\s+", " ", NUMBER.sub("#", a)) == re.sub(r"\s+", " ", NUMBER.sub("#", b)), (a, b)
        for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
            if "." in x or "e" in x:
                relative, noise = (0.05 if "loss" in a else 1e-3), (0.5 if a.endswith(" ok") else 1e-6)
                assert abs(float(x) - float(y)) <= max(relative * abs(float(y)), noise), (a, b)
            elif "FAILED" in a:                                 # how far off a mistake is, in roundings
                assert abs(int(x) - int(y)) <= 0.05 * abs(int(y)), (a, b)
            else:
                assert x == y, (a, b)


def verdicts(text):
    """Name, second column, and the last two columns of every line that ends in ok; and the last line."""
    lines = text.rstrip().splitlines()
    return [(*re.split(r"\s{2,}", line.strip())[:2], *line.split()[-2:]) for line in lines if line.endswith("  ok")], \
        lines[-1]


def compare(block, found, shown):
    """Raise AssertionError unless a command printed what the block shows."""
    if block.mark == "rounding":
        require_alike(found, shown)
    elif block.mark == "verdicts":
        assert verdicts(found)[0] and verdicts(found) == verdicts(shown)
    elif block.mark == "machine":
        digits = re.compile(r"\b[0-9a-f]{16,}\b")
        assert digits.sub("#", found).rstrip() == digits.sub("#", shown).rstrip()
        if machine() == RECORDED_ON:
            assert found.rstrip() == shown.rstrip()
    else:
        assert found.rstrip() == shown.rstrip()


def run(command, folder=ROOT, fails=False):
    """What a command of a page prints. run.sh gets the environment of a newcomer, other commands that of a test."""
    if "run.sh" in command:
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith(("PMI", "PMIX", "OMP", "OPENBLAS", "MKL"))}
    else:
        environment = job_environment()
    # The launcher beside this Python first: the suite runs under MPICH and under Open MPI.
    environment.update(MPITP_VENV=sys.prefix, PATH=f"{sys.prefix}/bin:{os.environ['PATH']}", MPIEXEC_TIMEOUT="600",
                       PYTHONPATH=str(ROOT))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=700)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout


def workplace(page, folder):
    """A folder with the programs of a page, and with everything of this one."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    if "tiny-gemma3" in page.read_text():           # a model that is small enough to be run here
        import make_tiny_checkpoints as tiny
        (folder / "tiny-gemma3").mkdir()
        tiny.write(folder / "tiny-gemma3", tiny.load("gemma3_text"))
    for block in blocks(page):
        if block.program:
            (folder / block.program).write_text(block.text)
    return folder


def execute(page):
    """Run the page's python blocks in one namespace. Yields (block, what it printed, the text block behind it)."""
    namespace = {"__name__": "__main__"}
    found = blocks(page)
    for block, behind in zip(found, [*found[1:], None]):
        if block.language == "python" and not block.program and not block.mark.startswith(("not run", "shown in")):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), namespace)
            expected = behind.text if behind is not None and behind.language == "text" else ""
            yield block, printed.getvalue(), expected


def kind(block):
    """What a test does with a block: "python", "program", "console", "part", "not run" or "shown"."""
    if block.mark.startswith("not run: "):
        return "not run"
    if block.mark.startswith("shown in "):
        return "part"
    if block.language == "console":
        return "console"
    if block.language == "python":
        return "program" if block.program else "python"
    known = block.language in SHOWN_ONLY or block.language.startswith("{")      # {image} and others of MyST
    assert known, f"line {block.line}: a block in {block.language!r}"
    return "shown"


def check(page, folder):
    """Do with every block of a page what its kind asks for. Raises AssertionError at the first that does not hold."""
    for block, printed, expected in execute(page):
        assert printed == expected, f"{page.name}, line {block.line}, prints\n{printed}"
    folder = workplace(page, folder)
    for block in blocks(page):
        if kind(block) == "part":
            assert block.text in (ROOT / block.mark.removeprefix("shown in ")).read_text(), f"{page.name}, {block.line}"
        if kind(block) == "console":
            assert block.mark in ("", "rounding", "verdicts", "machine", "fails"), block.mark
            for command, shown in block.commands:
                compare(block, run(command, folder, fails=block.mark == "fails"), shown)
