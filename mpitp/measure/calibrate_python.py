"""What Python takes around the operations of a layer: the time of tiny layers, less that of all they compute.

On a GPU both work at the same time, and Python takes longer for tiny layers: there their time is Python's, but for a
token's, which is a recorded graph.
"""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ..config import DecoderConfig
from ..layers.decoder import Decoder
from ..plan.job import Job, Layout
from ..plan.layer_work import block_work, mlp_work
from ..plan.machine import Machine
from ..plan.work import Item, work
from ..training.data import Tokens
from ..training.loop import Trainer
from ..training.settings import Settings
from .block import block_cases, block_config
from .calibrate import Calibration
from .decode import Decode
from .feed_forward import mlp_cases
from .timed_cases import Case

HIDDEN, HEADS, FFN, TOKENS, LAYERS = 64, 4, 256, 4, (2, 4)


class Tiny:
    """Tiny layers, timed as a Calibration times everything else: Python is most of their time."""

    def __init__(self, calibration: Calibration):
        self.calibration, self.group = calibration, calibration.group
        dtype = calibration.dtype.name
        self.cases: dict[str, Callable[[], Any]] = {}
        cases, _ = mlp_cases(self.group, TOKENS, HIDDEN, FFN, dtype=dtype)
        self.cases |= {f"mlp {name}": case for name, case in cases.items()}
        cases = block_cases(self.group, TOKENS, HIDDEN, HEADS, dtype)
        self.cases |= {f"block {name}": case for name, case in cases.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tokens")
            with open(path, "wb") as file:
                file.write(bytes(range(256)))
            for layers in LAYERS:
                config = tiny_config(layers)
                self.cases[f"token {layers}"] = Decode(Decoder(self.group, config, dtype=dtype), TOKENS).run
                trainer = Trainer(self.group, config, Tokens(path, config.vocab_size, TOKENS, 0),
                                  Settings(micro_batch_size=1, train_iters=1 << 30, lr=0.0), dtype=dtype)
                self.cases[f"step {layers}"] = trainer.train_step

    def points(self) -> Iterator[Case]:
        """Yield every case; the host's clock times it."""
        for name, case in self.cases.items():
            yield ("python", name, ()), case

    def run_pass(self) -> None:
        """Time every case. Collective."""
        for point, case in self.points():
            self.calibration.time(point, case, walls=True)

    def seconds(self) -> dict[str, float]:
        """Return {layer and phase: seconds beside its items}, as Tables has them."""
        calibration = self.calibration
        bare, dtype = calibration.machine(), calibration.dtype.name
        taken = {name: calibration.median("python", name, ()) for name in self.cases}
        found = {}
        for direction, name in (("forward", "mlp forward"), ("forward+backward", "mlp step")):
            sizes = TOKENS, HIDDEN, FFN, self.group.size, "backward" in direction
            found[name] = self.left(bare, taken[f"mlp {direction}"], mlp_work(*sizes, dtype))
        for direction, name in (("forward", "block window"), ("forward+backward", "block step")):
            items = block_work(block_config(HIDDEN, HEADS), TOKENS, self.group.size, "backward" in direction, dtype)
            found[name] = self.left(bare, taken[f"block {direction}"], items)
        for phase in ("token", "step"):
            few, many = (self.left(bare, taken[f"{phase} {layers}"], self.items_of(layers, phase), phase == "token")
                         for layers in LAYERS)
            found[f"block {phase}"] = max(0.0, (many - few) / (LAYERS[1] - LAYERS[0]))
            found[phase] = max(0.0, few - LAYERS[0] * found[f"block {phase}"])
        found |= {"block prefill": found["block window"], "block recomputed": found["block window"],
                  "prefill": found["token"], "window": found["token"]}
        return found

    def items_of(self, layers: int, phase: str) -> list[Item]:
        """Return the items of a tiny decoder's token or step."""
        job = Job(tiny_config(layers), "train" if phase == "step" else "decode", 1, TOKENS, 2,
                  dtype=self.calibration.dtype.name, device=self.group.device)
        items = work(job, Layout(self.group.size), phase)
        return [item for item in items if item.what not in ("greatest", "all_gather")]     # extend() alone

    def left(self, machine: Machine, seconds: float, items: list[Item], recorded: bool = False) -> float:
        """Return what is left of a time without its items; on a GPU all of it, where it was not recorded."""
        dtype = self.calibration.dtype
        if machine.device == "gpu" and not recorded:
            return seconds
        return max(0.0, seconds - sum(machine.seconds(item, dtype.name, dtype.itemsize) for item in items))


def tiny_config(layers: int) -> DecoderConfig:
    """Return a tiny decoder of Llama's kind."""
    return DecoderConfig(256, HIDDEN, layers, HEADS, ffn_hidden_size=FFN, activation="silu", gated=True,
                         normalization="rmsnorm", qkv_bias=False, attention_bias=False, mlp_bias=False)


def calibrate(calibration: Calibration, passes: int, progress: Callable[[], None] | None = None) -> Machine:
    """Return the machine after so many passes of everything; progress() is called after each. Collective."""
    tiny = Tiny(calibration)
    for _ in range(passes):
        calibration.run_pass()
        tiny.run_pass()
        if progress:
            progress()
    return calibration.machine(tiny.seconds())
