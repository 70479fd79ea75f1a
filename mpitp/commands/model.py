"""What commands that load a checkpoint folder share: the options that name it."""
from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --model, --strict and --verify-weights."""
    parser.add_argument("--model", metavar="DIR", required=True, help="a folder with config.json and "
                        "safetensors, or a step folder of train")
    add_strict(parser)
    add_verify_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add --weights and --activations."""
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"), help="matrices in memory: "
                        "widened to --dtype (float32, the default), or as in a BF16 file: half the memory; needs "
                        "NumKong (pip install 'mpitp[numkong]')")
    parser.add_argument("--activations", default="float32", choices=("float32", "bfloat16"), help="what bfloat16 "
                        "weights are multiplied with: as it is (the default), or rounded, which is faster")


def add_verify_weights(parser: argparse.ArgumentParser) -> None:
    """Add --verify-weights."""
    parser.add_argument("--verify-weights", action="store_true", help="compare all bytes of the ranks' files before "
                        "they are loaded (headers and samples otherwise)")


def add_strict(parser: argparse.ArgumentParser) -> None:
    """Add --strict."""
    parser.add_argument("--strict", action="store_true", help="end where config.json has a key that the model's family "
                        "does not know (a warning otherwise)")
