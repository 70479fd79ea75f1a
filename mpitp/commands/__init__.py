"""The command line: one file a command, each with `add_arguments(parser)` and `run(arguments) -> exit status`."""
import argparse
import os
import shutil
import textwrap
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from .. import __version__
from ..errors import InputError

WIDTH = 100         # columns that help and tables have at most
# Options that name a file or folder, which may lie elsewhere on another host: whether they are given is compared.
PATHS = ("model", "dump", "data", "out", "resume_from", "json", "csv", "plot", "text", "ids_file", "batch_file",
         "messages", "reports", "timeline", "config", "machine", "calibrate", "source", "source", "target")
# Variables that change what the ranks do together.
VARIABLES = ("MPITP_TRANSPORT", "MPITP_SHARE_GPU", "MPITP_CUDA_AWARE")
Parsed = tuple[ModuleType, argparse.Namespace] | SystemExit


@dataclass(frozen=True)
class Command:
    """What the command line knows of a command before it imports it.

    Parameters
    ----------
    summary : str
        One line, for the list of all commands.
    examples : tuple of (str, str)
        Command lines that end the command's help, each with what it does. A test runs them in one folder, in order,
        beside a tiny checkpoint `my-model`, a dump `my-dump` and a text `book.txt`.
    """
    summary: str
    examples: tuple[tuple[str, str], ...]


COMMANDS = {
    "verify": Command(
        "check that the parallel feed-forward block equals the dense one (the default)", (
            ("mpirun -n 2 python -m mpitp verify --hidden-size 256 --gated --activation silu",
             "Check a gated block of 256 features on two ranks."),
            ("mpirun -n 3 python -m mpitp verify --all --reproducible",
             "Check every layer and whole decoders on three ranks; the results have the bits of one rank's."))),
    "doctor": Command(
        "tell whether this machine is set up right, and what to change", (
            ("mpirun -n 2 python -m mpitp doctor",
             "Look at the cores, the BLAS and the MPI that two ranks get from this launcher."),
            ("python -m mpitp doctor --json doctor.json",
             "Look at one process, and write what was found for a program."))),
    "bench": Command(
        "time collectives, products and the blocks against their limits", (
            ("mpirun -n 2 python -m mpitp bench allreduce --max-bytes 65536",
             "Time the collectives for messages of up to 64 KiB."),
            ("mpirun -n 2 python -m mpitp bench ffn block --hidden-size 256 --rounds 3 --csv bench.csv",
             "Time a small feed-forward block and a small decoder block, and write the figures to a table."))),
    "plan": Command(
        "tell before a job runs whether it fits, how long it takes, and on how many ranks", (
            ("python -m mpitp plan --model my-model -n 1,2,4 --decode",
             "Plan generation with a checkpoint, of which only config.json is read; needs no MPI."),
            ("python -m mpitp plan --hidden-size 1024 --train --machine infiniband --json plan.json",
             "Plan the training of a model on a cluster, and write every array and every message."))),
    "scale": Command(
        "time the blocks on growing numbers of ranks, each in a job of its own", (
            ("python -m mpitp scale --ranks 1,2 ffn --hidden-size 128 --rounds 3",
             "See how the feed-forward block scales from one rank to two; started without mpirun."),
            ("python -m mpitp scale --ranks 1,2 ffn --hidden-size 128 --scaling weak --json scale.json",
             "Keep the tokens a rank the same, and write the figures for a program."))),
    "train": Command(
        "train a decoder on the bytes of a file", (
            ("mpirun -n 2 python -m mpitp train --hidden-size 64 --num-layers 2 --train-iters 20 --out run",
             "Train a small decoder on Python's own sources, and keep the last step in the folder run."),
            ("mpirun -n 2 python -m mpitp train --data book.txt --hidden-size 64 --train-iters 20 --reproducible",
             "Train on a text of your own, with the same bits for any number of ranks."))),
    "export": Command(
        "write a trained run as a checkpoint folder that transformers loads", (
            ("python -m mpitp export my-run my-export --family llama",
             "Write the newest step of a run that is whole, with the names and the config.json of a Llama."),
            ("mpirun -n 2 python -m mpitp export my-run/step-00000003 16-bit --family phi3 --dtype bfloat16",
             "Write one step, in 16 bits, each rank its slices."))),
    "generate": Command(
        "continue prompts with the model of a checkpoint folder", (
            ("mpirun -n 2 python -m mpitp generate --model my-model --prompt 'once upon a time'",
             "Continue a text, each rank holding its slices of the model (needs mpitp[text])."),
            ("mpirun -n 2 python -m mpitp generate --model my-model --ids 1,2,3 --temperature 0.8",
             "Continue token ids, drawing each token."))),
    "score": Command(
        "compute loss and perplexity of a text", (
            ("mpirun -n 2 python -m mpitp score --model my-model --text book.txt",
             "Score a text (needs mpitp[text])."),
            ("mpirun -n 2 python -m mpitp score --model my-model --ids-file ids.txt --window 16 --stride 4",
             "Score token ids, each predicted from at least 12 before it."))),
    "inspect": Command(
        "tell what each rank would hold and read of a checkpoint", (
            ("python -m mpitp inspect my-model",
             "See the size, the shapes and the family of a checkpoint; no weights are read."),
            ("python -m mpitp inspect my-model -n 8 --json inspect.json",
             "See what each of eight ranks would hold, and write it for a program."))),
    "judge": Command(
        "tell whether somebody's tensor-parallel run is right, and which mistake it has", (
            ("python -m mpitp judge my-dump",
             "Judge what the ranks of a run wrote down with mpitp.oracle.Recorder; needs no MPI."),
            ("python -m mpitp judge my-dump --json judge.json",
             "Write the verdict for a program, too."))),
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong once, not once a rank."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists what there is)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if speaks():
            super()._print_message(message, file)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, up to WIDTH columns; the description is folded, its indented paragraphs stay."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=min(WIDTH, shutil.get_terminal_size().columns))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(p if "\n " in f"\n{p}" else textwrap.fill(p, width) for p in paragraphs)


def speaks() -> bool:
    """Return whether this process is the one that prints; each one, where there is no MPI to ask."""
    try:
        from ..comm.launch import is_first_rank
        return is_first_rank()
    except (ImportError, RuntimeError):         # no mpi4py, no MPI library
        return True


def run_command(argv: list[str]) -> int:
    """Run the command that argv names, `verify` when it names none. Collective over all ranks.

    Returns
    -------
    int
        The exit status of this rank.

    Raises
    ------
    InputError
        On every rank, for options that are wrong, or that differ between ranks.
    """
    from ..comm.agreement import same_everywhere
    from ..comm.launch import world
    parsed = same_everywhere(world(), partial(parse, argv), describe)
    if isinstance(parsed, SystemExit):
        raise parsed                            # help was asked for
    command, arguments = parsed
    return command.run(arguments)


def parse(argv: list[str]) -> Parsed:
    """Return the module of the command that argv names, and its options. Raises InputError where they are wrong."""
    try:
        return parse_or_help(argv)
    except SystemExit as help_was_printed:
        return help_was_printed


def parse_or_help(argv: list[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Do what parse() does; raise SystemExit after help and version, as argparse."""
    name = argv[0] if argv else "verify"
    if name in ("-h", "--help", "--version"):
        main_parser().parse_args(argv[:1])
    if name.startswith("-"):
        name, argv = "verify", ["verify", *argv]
    if name not in COMMANDS:
        raise InputError(f"found command {name!r}, expected one of {', '.join(COMMANDS)}")
    command = import_module(f".{name}", __name__)
    return command, command_parser(name, command).parse_args(argv[1:])


def describe(parsed: Parsed) -> dict[str, str]:
    """Say what all ranks must have in common before they begin: the command, its options, the version, variables."""
    if isinstance(parsed, SystemExit):
        return {"the command": "help"}
    command, arguments = parsed
    said = {"the command": command.__name__.split(".")[-1], "the version of mpitp": __version__}
    for name, value in vars(arguments).items():
        if name in PATHS:
            value = "not given" if value is None else "given"
        said[f"--{name.replace('_', '-')}"] = str(value)
    return said | {name: os.environ.get(name, "not set") for name in VARIABLES}


def main_parser() -> Parser:
    """Return the parser of `python -m mpitp` without a command: help, which lists the commands, and the version."""
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    parser = Parser(prog="python -m mpitp", usage="mpirun -n P python -m mpitp [COMMAND] [OPTIONS]",
                    description="Tensor parallelism in plain NumPy and MPI.", formatter_class=HelpFormatter,
                    epilog=f"commands:\n{commands}\n\nA command's options and examples: python -m mpitp COMMAND --help")
    parser.add_argument("--version", action="version", version=f"mpitp {__version__}")
    return parser


def command_parser(name: str, command: ModuleType) -> Parser:
    """Return the parser of the command of this name, `command` its module; its help ends with the examples."""
    examples = "\n".join(f"  {line}\n      {text}" for line, text in COMMANDS[name].examples)
    parser = Parser(prog=f"python -m mpitp {name}", description=command.__doc__, formatter_class=HelpFormatter,
                    epilog=f"examples:\n{examples}")
    command.add_arguments(parser)
    return parser
