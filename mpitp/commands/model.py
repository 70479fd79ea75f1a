"""What commands that load a checkpoint folder share: the options that name it."""
from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model and --strict."""
    parser.add_argument("--model", metavar="DIR", required=True, help="a folder with config.json and safetensors")
    add_strict(parser)


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Add --strict."""
    parser.add_argument("--strict", action="store_true", help="end where config.json has a key that the model's family "
                        "does not know (a warning otherwise)")
