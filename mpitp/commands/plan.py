"""Tell before a job runs whether it fits, how long it takes, and on how many ranks. Needs no MPI and reads no weights.

The model is that of a checkpoint folder, of a config.json alone, or that of `train` with the sizes that are given.
Memory is exact: every array that stays, by name with --json, and the peak on top of it. So are messages and bytes. Time
is what the machine's tables say: those of --machine, else of the machine at hand where `bench --calibrate` was run on
it, else of a laptop.
"""
from __future__ import annotations

import argparse
from typing import Any

from .. import tables
from ..checkpoints.config_file import read_config
from ..config import DecoderConfig
from ..errors import require, require_positive
from ..plan import outcome
from ..plan.job import Job
from ..plan.machine import Machine
from ..plan.machine_file import calibrated_here, read_machine
from ..plan.machines import DEFAULT, MACHINES, machine_named
from . import speaks
from .pictures import require_picture
from .plan_page import JobReport, PlanReport, lines

SIZES = ("vocab_size", "hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups")
BATCH = {"train": 8, "decode": 1}
TOKENS = 1024
RANKS = "1,2,4,8,16,32,64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder, of which config.json is read")
    parser.add_argument("--config", metavar="FILE", help="a config.json alone")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="as train's")
    parser.add_argument("-n", "--ranks", metavar="P,P", help="numbers of ranks, with commas between (of "
                        f"{RANKS} those that the machine has)")
    parser.add_argument("--train", action="store_true", help="a training step alone (both where neither is given)")
    parser.add_argument("--decode", action="store_true", help="generation alone")
    parser.add_argument("--batch", "--micro-batch-size", type=int, metavar="B", help="sequences of a forward of each "
                        f"model ({BATCH['train']} in training, {BATCH['decode']} in generation)")
    parser.add_argument("--tokens", "--seq-length", type=int, metavar="S", help=f"of a window, or of a prompt ({TOKENS}"
                        ", or fewer where the model has fewer positions)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each sequence (64)")
    parser.add_argument("--gradient-accumulation", type=int, default=1, metavar="N", help="how many times --batch "
                        "the global batch of a step is, on any number of tensor groups (1)")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="tensor groups that share a global "
                        "batch (1)")
    parser.add_argument("--sequence-parallel", action="store_true", help="training as train's: each tensor rank has "
                        "some tokens only, where no product needs them all")
    parser.add_argument("--gather-again", action="store_true", help="with it: rows that enter a product are gathered "
                        "again in backward, and not kept")
    parser.add_argument("--recompute", choices=("block", "attention"), help="training as train's: what backward "
                        "computes again (nothing)")
    parser.add_argument("--dtype", default="float32", help="float32 (the default), float64; on a GPU float16 and "
                        "bfloat16 too")
    parser.add_argument("--machine", metavar="FILE|NAME", help=f"what `bench --calibrate` wrote, or one of "
                        f"{', '.join(MACHINES)}")
    parser.add_argument("--json", metavar="FILE", help="write everything there, every array by its name")
    parser.add_argument("--plot", metavar="FILE.png", help="draw memory and time (needs matplotlib: pip install "
                        "'mpitp[plot]')")


def run(arguments: argparse.Namespace) -> int:
    """Plan on the first rank; return 0."""
    numbers = check_arguments(arguments)
    machine, note = machine_of(arguments)
    if not arguments.ranks and machine.outside is None:
        numbers = [number for number in numbers if number <= machine.ranks_per_host]
    if not arguments.ranks:
        numbers = [n for n in numbers if n % arguments.data_parallel == 0] or [arguments.data_parallel]
    report = plan(arguments, numbers, machine)
    if speaks():
        print("\n".join(lines(report, note)), flush=True)
        if arguments.json:
            tables.write_json(arguments.json, "mpitp.plan/1", report)
        if arguments.plot:
            from .plan_plots import draw
            draw(arguments.plot, report)
    return 0


def check_arguments(arguments: argparse.Namespace) -> list[int]:
    """Return the numbers of ranks. Raises InputError for options that contradict each other, files that cannot be."""
    given = [flag for flag in ("model", "config") if getattr(arguments, flag)]
    given += [name for name in SIZES if getattr(arguments, name) is not None][:1]
    require(len(given) < 2, " and ".join(f"--{name.replace('_', '-')}" for name in given),
            "one of --model, --config and the sizes of a model")
    require(not (arguments.train and arguments.decode), "--train and --decode", "one of them, or neither for both")
    require(not (arguments.decode and arguments.data_parallel > 1), f"--decode with --data-parallel "
            f"{arguments.data_parallel}", "--train: groups that generate have nothing to do with each other")
    of_training = [flag for flag in ("sequence_parallel", "gather_again", "recompute") if getattr(arguments, flag)]
    flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in of_training)
    require(not (arguments.decode and of_training), f"--decode with {flags}", "--train: generation has no backward")
    require(arguments.sequence_parallel or not arguments.gather_again, "--gather-again without --sequence-parallel",
            "both")
    require_positive(data_parallel=arguments.data_parallel, gradient_accumulation=arguments.gradient_accumulation,
                     max_new_tokens=arguments.max_new_tokens)
    words = (arguments.ranks or RANKS).split(",")
    require(all(word.strip().isdigit() and int(word) for word in words), f"-n {arguments.ranks}",
            "positive integers with commas between")
    if arguments.json:
        tables.require_writable(arguments.json)
    if arguments.plot:
        require_picture(arguments.plot)
    return sorted({int(word) for word in words})


def machine_of(arguments: argparse.Namespace) -> tuple[Machine, str]:
    """Return the machine that times are of, and a line that says why it is that one, "" where it was named."""
    name = arguments.machine
    if name is None:
        found, note = calibrated_here()
        return (found, note) if found else (MACHINES[DEFAULT], note)
    if name in MACHINES:
        return machine_named(name), ""
    return (read_machine(name), "") if name.endswith(".json") or "/" in name else (machine_named(name), "")


def plan(arguments: argparse.Namespace, numbers: list[int], machine: Machine) -> PlanReport:
    """Return what the jobs take."""
    config, source = config_of(arguments)
    jobs = []
    for kind in ("train", "decode"):
        if getattr(arguments, kind) or not (arguments.train or arguments.decode):
            job = job_of(arguments, kind, config, machine)
            data = arguments.data_parallel if kind == "train" else 1
            found = outcome.plan(job, machine, numbers, data)
            fastest, cheapest = (best.ranks if best else None for best in (outcome.fastest(found),
                                                                           outcome.cheapest(found)))
            jobs.append(JobReport(kind, job.batch, job.tokens, job.new_tokens, job.accumulation, found,
                                  fastest, cheapest, outcome.why(found), job.sequence_parallel, job.gather_again,
                                  job.recompute))
    return PlanReport(source, config, outcome.parameters(config), arguments.dtype, machine.name, machine.source,
                      machine.memory_bytes, machine.ranks_per_host, machine.device, jobs)


def config_of(arguments: argparse.Namespace) -> tuple[DecoderConfig, str]:
    """Return the model's config, and where it is from."""
    path = arguments.model or arguments.config
    if path:
        return read_config(path), path
    from . import Parser, train                 # which trains nothing here, but knows the sizes that are not given
    parser = Parser()
    train.add_arguments(parser)
    sizes: Any = parser.parse_args([])
    for name in SIZES:
        if getattr(arguments, name) is not None:
            setattr(sizes, name, getattr(arguments, name))
    return train.config_of(sizes), "options"


def job_of(arguments: argparse.Namespace, kind: str, config: DecoderConfig, machine: Machine) -> Job:
    """Return the job of this kind."""
    new, tokens = arguments.max_new_tokens if kind == "decode" else 1, arguments.tokens
    if tokens is None:
        most = config.max_position_embeddings if config.position_embedding == "learned" else None
        tokens = max(1, min(TOKENS, (most or TOKENS + new) - new + 1))
    batch = BATCH[kind] if arguments.batch is None else arguments.batch
    options = dict(sequence_parallel=arguments.sequence_parallel, gather_again=arguments.gather_again,
                   recompute=arguments.recompute) if kind == "train" else {}
    return Job(config, kind, batch, tokens, new, arguments.gradient_accumulation, dtype=arguments.dtype,
               device=machine.device, **options)
