"""How long the steps of generate take on this rank, and what share of that is communication."""
from __future__ import annotations

import os
import time

import numpy as np

from ..comm.group import TensorParallelGroup
from ..inference.generation import ENDED

PREFILL, DECODE = 0, 1


class StepTimes:
    """StepTimes adds up the times of one or more generations: of the first step of each, which takes the prompts in,
    and of all others.

    Parameters
    ----------
    group : TensorParallelGroup

    Attributes
    ----------
    seconds, communication : [prefill, decode]
        The times of the steps, and of the collectives in them.
    prompt_tokens, decode_tokens : int
        Of all prompts; new ones of all steps but the first.
    first_token_seconds : float or None
        The age of this process at the first token.
    """

    def __init__(self, group: TensorParallelGroup):
        self.group, self.seconds, self.communication = group, [0.0, 0.0], [0.0, 0.0]
        self.prompt_tokens = self.decode_tokens = 0
        self.first_token_seconds: float | None = None

    def begin(self, prompt_tokens: int) -> None:
        """Note that a generation begins."""
        self.prompt_tokens += prompt_tokens
        self.part, self.before = PREFILL, time.perf_counter()
        self.group.ledger.clear()

    def add(self, tokens_B: np.ndarray) -> None:
        """Note that a step is done."""
        if self.part == PREFILL:
            self.end()
            self.part = DECODE
            if self.first_token_seconds is None:
                self.first_token_seconds = age_of_process()
        else:
            self.decode_tokens += int((tokens_B != ENDED).sum())
            self.end()

    def end(self) -> None:
        """Add the time since the step before."""
        now = time.perf_counter()
        self.seconds[self.part] += now - self.before
        self.communication[self.part] += self.group.ledger.seconds()
        self.before = now
        self.group.ledger.clear()

    def shares(self) -> list[float | None]:
        """Return the share of communication of [prefill, decode], None for what did not take place."""
        return [communication / seconds if seconds else None
                for communication, seconds in zip(self.communication, self.seconds)]


def age_of_process() -> float | None:
    """Seconds since this process started, its interpreter's start included; None where the system does not say."""
    try:
        with open("/proc/self/stat") as file:           # field 22, after the name, which may hold spaces
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return None
