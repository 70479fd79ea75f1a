"""Train a decoder on the bytes of a file over the ranks at hand.

Checkpoints are step folders of safetensors in --out, which any number of ranks resumes from. With --reproducible they
are the same files, byte for byte, for every number of ranks.
"""
import argparse
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from .. import tables
from ..comm.agreement import same_everywhere
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..errors import InputError, require, require_positive
from ..checkpoints import steps as step_folders
from ..training.data import DTYPES, look_like_words
from ..training.lock import FolderLock
from ..training.loop import Trainer, TrainingStopped
from ..training.requests import SIGNALS, Requests
from ..training.resume import resume
from ..training.settings import SEQUENCE, UNITS, Settings
from . import ask_plan, device, progress, train_model
from .train_progress import Progress, opening, print_line

if TYPE_CHECKING:
    from ..grid import Grid

# What a new decoder has; a checkpoint's says it itself, so options alone are not None.
NEW_MODEL = dict(vocab_size=256, hidden_size=256, num_layers=4, num_attention_heads=8, hidden_dropout=0.0,
                 attention_dropout=0.0)
SETTINGS = ("micro_batch_size", "gradient_accumulation", "train_iters", "lr", "min_lr", "weight_decay", "clip_grad",
            "seed", "adam_beta1", "adam_beta2", "adam_eps", "label_smoothing", "eval_interval", "eval_batches",
            "save_interval", "keep", "lr_decay_iters", "save_minutes", "spike_limit", "z_loss", "reproducible_unit",
            "sequence_parallel", "gather_again", "recompute", "overlap_grad_reduce")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    parser.add_argument("--data", metavar="FILE", help="bytes, or token ids in .npy or a file of llm.c (the standard "
                        "library's sources)")
    parser.add_argument("--data-dtype", choices=DTYPES, help="of token ids without a header, such as nanoGPT's uint16 "
                        "(bytes)")
    train_model.add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="step folders and log.jsonl go there (nowhere)")
    parser.add_argument("--resume", nargs="?", const="newest", choices=("newest", "auto"), help="go on from the newest "
                        "step folder of --out; auto: begin where there is none, and end well where no step is left")
    parser.add_argument("--resume-from", metavar="DIR", help="go on from this step folder of --out; later ones are set "
                        "aside")
    parser.add_argument("--stop-on", metavar="NAMES", default="TERM", help=f"signals of {', '.join(SIGNALS)} to save "
                        "and stop on, with commas between; the others save and go on (TERM)")
    for flag, default, text in (
            ("vocab-size", None, "tokens of the vocabulary (256)"), ("hidden-size", None, "features (256)"),
            ("ffn-hidden-size", None, "features of the feed-forward middle (8/3 of the hidden size, gated)"),
            ("num-layers", None, "blocks (4)"), ("num-attention-heads", None, "query heads (8)"),
            ("num-query-groups", None, "key/value heads (as many)"), ("seq-length", 128, "tokens of a window"),
            ("data-parallel", 1, "copies of the model, each on ranks / N tensor ranks, that share batches of any "
             "size"),
            ("micro-batch-size", defaults.micro_batch_size, "windows of a forward, at most"),
            ("gradient-accumulation", 1, "micro-batches of a step: --micro-batch-size times this is the global batch, "
             "whatever --data-parallel is (Megatron's is a data rank's)"),
            ("train-iters", defaults.train_iters, "steps"),
            ("lr-warmup-iters", None, "steps until --lr (a tenth of --lr-decay-iters)"),
            ("lr-decay-iters", None, "steps until --min-lr, where it stays (--train-iters)"),
            ("seed", 0, "of weights, windows, dropout"),
            ("eval-interval", 50, "validate every so many steps"), ("eval-batches", 8, "batches of a validation"),
            ("save-interval", 0, "a checkpoint every so many steps, beside the last"),
            ("keep", defaults.keep, "step folders that stay, 0 for all")):
        shown = f" ({default})" if default is not None else ""
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=text + shown)
    for flag, number, text in (
            ("lr", defaults.lr, "learning rate"), ("min-lr", None, "at the last step (a tenth)"),
            ("weight-decay", 0.1, "decoupled"), ("clip-grad", 1.0, "largest norm of all gradients, 0 for any"),
            ("adam-beta1", 0.9, "decay of the gradient's mean"), ("adam-beta2", 0.95, "decay of its square's mean"),
            ("adam-eps", 1e-8, "added to the root of that"),
            ("label-smoothing", 0.0, "part of a label that all tokens share"),
            ("z-loss", 0.0, "weight of the squared log-sum-exp, which keeps it near 0 (PaLM: 1e-4)"),
            ("save-minutes", defaults.save_minutes, "a checkpoint so long after the last one, 0 for none"),
            ("spike-limit", None, "stop, saving nothing, where loss or gradient norm is above so many times the "
             "median of the last steps"),
            ("hidden-dropout", None, "probability (0, or the model's)"),
            ("attention-dropout", None, "probability (0, or the model's)")):
        shown = f" ({number})" if number is not None else ""
        parser.add_argument(f"--{flag}", type=float, default=number, metavar="X", help=(text + shown).strip())
    device.add_group_arguments(parser, blocks=True, reproducible="the same bytes for any number of ranks and of data "
                               "ranks, and any cut of the global batch into micro-batches")
    parser.add_argument("--reproducible-unit", choices=UNITS, help="what is computed by itself with --reproducible: a "
                        f"sequence, or, faster, a micro-batch, for the same bytes with this cut alone ({SEQUENCE})")
    add_layout_arguments(parser)
    parser.add_argument("--baseline", action="store_true", help="compare with an order-2 model of the same tokens")
    parser.add_argument("--plot", metavar="FILE.png", help="the curve (needs matplotlib: pip install 'mpitp[plot]')")


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what changes who keeps, computes and sends what, and no result."""
    parser.add_argument("--sequence-parallel", action="store_true", help="each tensor rank has some tokens only, where "
                        "no product needs them all")
    parser.add_argument("--gather-again", action="store_true", help="with --sequence-parallel: all tokens that enter a "
                        "product are gathered a second time in backward, in place of being kept")
    parser.add_argument("--recompute", choices=("block", "attention"), help="compute again in backward, to keep less: "
                        "whole blocks, or attention's part (neither)")
    parser.add_argument("--overlap-grad-reduce", action=argparse.BooleanOptionalAction, help="begin the sums over data "
                        "ranks while backward computes (with NCCL and peer access alone)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command on this rank; return 0, or 1 when the run had to stop."""
    train_model.check_arguments(arguments)
    settings = settings_of(arguments)
    requests = Requests(name for name in arguments.stop_on.split(",") if name)
    require_positive(data_parallel=arguments.data_parallel)
    copies = arguments.data_parallel
    with requests, device.group_of(arguments) if copies == 1 else device.grid_of(arguments, copies) as ranks:
        world = getattr(ranks, "world", ranks)
        start = train_model.BeginWith(world, arguments) if arguments.model else None
        config = start.config if start else config_of(arguments)
        lock = world.on_root(lambda: prepare(arguments, config.vocab_size))
        try:
            return train(arguments, Job(ranks, world, config, settings, requests, lock, start))
        finally:
            if lock:
                lock.release()


@dataclass
class Job:
    """What a training job consists of before it reads its data: its ranks, all of them, ...; the lock is rank 0's."""
    ranks: Union[TensorParallelGroup, "Grid"]
    world: TensorParallelGroup
    config: DecoderConfig
    settings: Settings
    requests: Requests
    lock: FolderLock | None
    start: train_model.BeginWith | None


def train(arguments: argparse.Namespace, job: Job) -> int:
    """Read the data, resume, and train; return the exit status."""
    group, ids = job.world, job.start.token_ids() if job.start else None
    ask_plan.training(job.ranks, arguments, job.config, job.settings)
    tokens = same_everywhere(group.comm, lambda: train_model.tokens_of(arguments, job.config.vocab_size, ids),
                             lambda tokens: {"the data": tokens.fingerprint()})
    if group.rank == 0 and arguments.data_dtype is None and look_like_words(tokens.tokens):
        print(f"mpitp: warning: {tokens.name}: found bytes that look like 16-bit integers, expected --data-dtype "
              f"uint16 for token ids; trained on as bytes", file=sys.stderr, flush=True)
    trainer = Trainer(job.ranks, job.config, tokens, job.settings, dtype=arguments.dtype, folder=arguments.out,
                      say=print_line)
    trainer.lock = job.lock
    if job.start:
        job.start.begin(trainer)
    if arguments.resume or arguments.resume_from:
        with progress.Progress("reading and verifying the checkpoint"):
            steps_left = resume(trainer, step_of(arguments), auto=arguments.resume == "auto")
        if not steps_left:
            return 0
    show = Progress(trainer)
    if group.rank == 0:
        print_line(opening(trainer, arguments).replace("; ", "\n"))
    try:
        stopped_by = trainer.run(show, job.requests)
    except TrainingStopped as stopped:
        if group.rank == 0:
            print(f"mpitp: {stopped}", file=sys.stderr, flush=True)
        return 1
    if stopped_by:
        if group.rank == 0:
            show.end_line()
            print_line(f"stopped by {stopped_by} after step {trainer.step} of {job.settings.train_iters}, "
                       + ("go on with --resume" if arguments.out else "nothing saved: found no --out"))
    else:
        group.on_root(lambda: show.finish(arguments))
    return 0


def step_of(arguments: argparse.Namespace) -> int | None:
    """Return the step of the folder that --resume-from names, by its path or its name; None for the newest."""
    if not arguments.resume_from:
        return None
    parent, name = os.path.split(os.path.normpath(arguments.resume_from))
    match = step_folders.STEP.match(name)
    if not match or parent and os.path.realpath(parent) != os.path.realpath(arguments.out):
        raise InputError(f"found --resume-from {arguments.resume_from}, expected a step folder of --out "
                         f"{arguments.out}, such as {step_folders.step_folder(arguments.out, 200)}")
    return int(match.group(1))


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Make the settings; a tenth of lr and of the steps where min_lr and the warmup are not given."""
    if arguments.min_lr is None:
        arguments.min_lr = arguments.lr / 10
    arguments.lr_decay_iters, arguments.spike_limit = arguments.lr_decay_iters or 0, arguments.spike_limit or 0.0
    steps = arguments.lr_decay_iters or arguments.train_iters
    warmup = steps // 10 if arguments.lr_warmup_iters is None else arguments.lr_warmup_iters
    if arguments.reproducible_unit is None:
        arguments.reproducible_unit = SEQUENCE
    else:
        require(arguments.reproducible, f"--reproducible-unit {arguments.reproducible_unit} without --reproducible",
                "both")
    require(arguments.sequence_parallel or not arguments.gather_again, "--gather-again without --sequence-parallel",
            "both: elsewhere nothing is gathered")
    require(not (arguments.overlap_grad_reduce and arguments.reproducible), "--overlap-grad-reduce with --reproducible",
            "one of them: the tree's sums come after backward")
    return Settings(warmup=warmup, **{name: getattr(arguments, name) for name in SETTINGS})


def config_of(arguments: argparse.Namespace) -> DecoderConfig:
    """Return a config of Llama's kind: rotary positions, RMS norms, gated SiLU, no biases."""
    for name, value in NEW_MODEL.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    require_positive(hidden_size=arguments.hidden_size)
    ffn = arguments.ffn_hidden_size or -(-arguments.hidden_size * 8 // 3)
    return DecoderConfig(
        arguments.vocab_size, arguments.hidden_size, arguments.num_layers, arguments.num_attention_heads,
        arguments.num_query_groups, ffn_hidden_size=ffn, activation="silu", gated=True, normalization="rmsnorm",
        qkv_bias=False, attention_bias=False, mlp_bias=False, hidden_dropout=arguments.hidden_dropout,
        attention_dropout=arguments.attention_dropout)


def prepare(arguments: argparse.Namespace, vocab_size: int) -> FolderLock | None:
    """Rank 0, before anything else: can the results be written, and is nothing in their way? Returns --out's lock."""
    if arguments.baseline and vocab_size > 256:
        raise InputError(f"found --baseline with a vocabulary of {vocab_size}, expected at most 256: it counts "
                         f"what follows each pair of bytes")
    if arguments.plot:
        tables.require_writable(arguments.plot)
        try:
            import matplotlib       # noqa: F401
        except ImportError:
            raise InputError("found no matplotlib, expected it for --plot: pip install 'mpitp[plot]'") from None
    resumes = "--resume" if arguments.resume else "--resume-from" if arguments.resume_from else ""
    if arguments.resume and arguments.resume_from:
        raise InputError("found --resume and --resume-from, expected one of them")
    if not arguments.out:
        if resumes:
            raise InputError(f"found {resumes} without --out, expected the folder to resume from")
        return None
    try:
        os.makedirs(arguments.out, exist_ok=True)
    except OSError as error:
        raise InputError(f"{arguments.out}: found {error.strerror}, expected a folder to write to") from None
    if not os.access(arguments.out, os.W_OK):
        raise InputError(f"{arguments.out}: found a folder that cannot be written to, expected one that can")
    step_of(arguments)
    lock = FolderLock(arguments.out)
    said = lock.acquire()
    if said:
        print_line(f"{arguments.out}: {said}")
    steps = step_folders.steps(arguments.out)
    if steps and not resumes:
        lock.release()
        raise InputError(f"{arguments.out}: found step folders up to {steps[-1]}, expected --resume or another folder")
    return lock
