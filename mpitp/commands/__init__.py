"""The command line: one file a command, each with `add_arguments(parser)` and `run(arguments) -> exit status`."""
import argparse
from importlib import import_module

from .. import __version__
from ..comm.launch import is_first_rank
from ..errors import InputError

COMMANDS = {
    "verify": "check that the parallel feed-forward block equals the dense one (the default)",
    "doctor": "is this machine set up right, and what to change",
    "bench": "collectives, products and the blocks against their limits",
    "train": "train a decoder on the bytes of a file",
    "generate": "continue prompts with the model of a checkpoint folder",
    "score": "loss and perplexity of a text",
    "inspect": "what each rank would hold and read of a checkpoint",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong once, not once a rank."""

    def error(self, message):
        raise InputError(f"{message} ({self.prog} --help lists what there is)")

    def _print_message(self, message, file=None):
        if is_first_rank():
            super()._print_message(message, file)


def run_command(argv):
    """Run the command that argv names, `verify` when it names none; returns its exit status."""
    name = argv[0] if argv else "verify"
    if name in ("-h", "--help", "--version"):
        parser = Parser(prog="python -m mpitp", description="Tensor parallelism in plain NumPy and MPI.",
                        formatter_class=argparse.RawDescriptionHelpFormatter,
                        epilog="commands:\n" + "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items()) +
                               "\n\npython -m mpitp COMMAND --help tells a command's options.")
        parser.add_argument("--version", action="version", version=f"mpitp {__version__}")
        parser.parse_args(argv[:1])
    if name.startswith("-"):
        name, argv = "verify", ["verify", *argv]
    if name not in COMMANDS:
        raise InputError(f"found command {name!r}, expected one of {', '.join(COMMANDS)}")
    command = import_module(f".{name}", __name__)
    parser = Parser(prog=f"python -m mpitp {name}", description=command.__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv[1:]))
