"""What the plan says of the cases that `scale` times, and the machine that it says it of."""
from __future__ import annotations

import argparse
from collections.abc import Callable

from ..arrays import compute_dtype
from ..errors import InputError, require
from ..measure.block import block_config
from ..measure.decode import decode_config
from ..plan.job import Job, Layout
from ..plan.layer_work import block_bytes, block_work, mlp_bytes, mlp_work
from ..plan.machine import Machine
from ..plan.machine_file import calibrated_here, read_machine
from ..plan.machines import MACHINES, machine_named
from ..plan.outcome import parts_of_time
from ..plan.work import Item, work, working_bytes

OF_EXTEND = ("greatest", "all_gather")          # which choose a token: what `bench decode` times has none of it


class Predictions:
    """The plan's times of what `scale` runs.

    Parameters
    ----------
    arguments : Namespace
        Of `scale`, after check_arguments.
    calibrate : function(ranks) -> Machine
        Measures so many ranks, where --calibrate asks for it.

    Raises
    ------
    InputError
        For an unknown machine, one of another device or dtype.
    """

    def __init__(self, arguments: argparse.Namespace, calibrate: Callable[[int], Machine]):
        self.arguments, self.calibrate = arguments, calibrate
        self.measured: dict[int, Machine] = {}
        self.machine, self.note = machine_of(arguments)

    def machine_for(self, ranks: int) -> Machine | None:
        """Return the machine that so many ranks are planned on, None where none is known; measured with --calibrate."""
        if not self.arguments.calibrate:
            return self.machine
        if ranks not in self.measured:
            self.measured[ranks] = self.calibrate(ranks)
        return self.measured[ranks]

    def seconds(self, bench: str, case: str, ranks: int, tokens: int) -> float | None:
        """Return the planned time of a case, None where the machine is not known, or has fewer ranks."""
        machine, dtype = self.machine_for(ranks), self.arguments.dtype
        if machine is None:
            return None
        items, working = work_of(bench, case, ranks, tokens, self.arguments)
        try:
            return sum(parts_of_time(machine, items, dtype, compute_dtype(dtype, machine.device).itemsize, working,
                                     case == "decode").values())
        except InputError:                      # one host, which has fewer ranks
            return None


def machine_of(arguments: argparse.Namespace) -> tuple[Machine | None, str]:
    """Return the machine of --machine, else the one at hand where it was calibrated, else none; and what to say."""
    name = arguments.machine
    require(not (name and arguments.calibrate), "--machine and --calibrate", "one of them")
    require(not arguments.calibrate or arguments.device == "cpu", f"--calibrate with --device {arguments.device}",
            "cpu")
    if arguments.calibrate:
        return None, "planned with each number of ranks calibrated just before"
    if name is None:
        found, note = calibrated_here()
        fits = found is not None and arguments.device == found.device and arguments.dtype in found.flops_per_second
        return (found, f"planned for the machine at hand, {note}") if fits else \
            (None, "nothing is planned: found no calibrated machine at hand; --calibrate, or --machine")
    found = read_machine(name) if name not in MACHINES and (name.endswith(".json") or "/" in name) \
        else machine_named(name)
    require(found.device == arguments.device, f"machine {found.name!r}, a {found.device}, with --device "
            f"{arguments.device}", "a machine of that device")
    require(arguments.dtype in found.flops_per_second, f"{arguments.dtype} on machine {found.name!r}",
            f"one of {', '.join(found.flops_per_second)}, whose products it knows")
    return found, f"planned for {found.name}"


def work_of(bench: str, case: str, ranks: int, tokens: int, arguments: argparse.Namespace) -> tuple[list[Item], int]:
    """Return the items of a rank in a case of `bench`, and the bytes that it works on."""
    D, heads, dtype = arguments.hidden_size, arguments.num_attention_heads, arguments.dtype
    backward, itemsize = "backward" in case, compute_dtype(dtype, arguments.device).itemsize
    if bench == "ffn":
        is_token = case.startswith("one token")
        sizes = 1 if is_token else tokens, D, 4 * D, ranks, backward
        # The cases of a round take turns: the weights of one token have left the cache for what all tokens work on.
        working = mlp_bytes(tokens, D, 4 * D, ranks, is_token or backward, itemsize)
        return mlp_work(*sizes, dtype), working
    if bench == "block":
        of_block = block_config(D, heads), tokens, ranks, backward
        return block_work(*of_block, dtype), block_bytes(*of_block)
    job = Job(decode_config(D, heads), "decode", 1, tokens, 2, dtype=dtype, device=arguments.device)
    return [item for item in work(job, Layout(ranks), "token") if item.what not in OF_EXTEND], \
        working_bytes(job, Layout(ranks), "token")
