"""What people see of a training run: its first lines, a line a step, the last figures, the curve."""
from __future__ import annotations

import argparse
import math

from ..training.data import order_2_bits
from ..training.log import read_log
from ..training.loop import Trainer
from . import progress


def print_line(text: str) -> None:
    """Print a line at once, whoever reads it."""
    print(text, flush=True)


def opening(trainer: Trainer, arguments: argparse.Namespace) -> str:
    """Describe the model, the ranks and the data, in two parts with a semicolon between."""
    count = sum(math.prod(spec.shape) for spec in trainer.model.specs.values())
    tokens, group, size = trainer.tokens, trainer.group, trainer.world.size
    grid = f" (data {trainer.data.size} x tensor {group.size})" if trainer.data else ""
    return f"{count:,} parameters on {size} rank{'s' if size > 1 else ''}{grid}, {trainer.model.dtype}" \
           f"{', reproducible' if group.reproducible else ''}; {len(tokens.training):,} tokens of {tokens.name}, " \
           f"{len(tokens.validation):,} held out for validation"


class Progress:
    """What people see: a line that moves in a terminal, some plain lines elsewhere; and the curve."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.curve: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []
        if trainer.step and trainer.folder and trainer.world.rank == 0:
            for line in read_log(trainer.folder):               # resumed: the curve begins where the run did
                self.note(line["step"], line)
        self.is_terminal = trainer.world.rank == 0 and progress.is_watched()
        self.every = max(1, trainer.settings.train_iters // 20)

    def __call__(self, step: int, figures: dict) -> None:
        if self.trainer.world.rank != 0:
            return
        self.note(step, figures)
        settings = self.trainer.settings
        tokens = settings.global_batch_size * self.trainer.tokens.seq_length
        text = f"step {step:6d}/{settings.train_iters}  {self.curve[-1][1]:7.4f} bits  " \
               f"lr {figures['lr']:.2e}  gradient {figures['gradient_norm']:6.3f}  " \
               f"{tokens / figures['seconds']:6.0f} tokens/s"
        if "validation_loss" in figures:
            text += f"  validation {self.validation[-1][1]:.4f}"
        if self.is_terminal:
            print(f"\r{text}", end="\n" if "validation" in text else "", flush=True)
        elif step % self.every == 0 or "validation" in text:
            print_line(text)

    def note(self, step: int, figures: dict) -> None:
        """Keep the losses for the curve, in bits."""
        self.curve.append((step, figures["loss"] / math.log(2)))
        if "validation_loss" in figures:
            self.validation.append((step, figures["validation_loss"] / math.log(2)))

    def end_line(self) -> None:
        """End the line that moves."""
        if self.is_terminal:
            print()

    def finish(self, arguments: argparse.Namespace) -> None:
        """Print the last figures, the baseline's beside them, and draw the curve."""
        self.end_line()
        if self.validation:
            print_line(f"validation: {self.validation[-1][1]:.4f} bits a token after {self.validation[-1][0]} steps")
        baseline = None
        if arguments.baseline:
            tokens = self.trainer.tokens
            baseline = order_2_bits(tokens.training, tokens.validation)
            print_line(f"baseline:   {baseline:.4f} bits a token, an order-2 model of the same tokens")
        if arguments.plot:
            from .plots import draw_training
            draw_training(arguments.plot, self.curve, self.validation, baseline, opening(self.trainer, arguments))
