"""The loop: batches, gradients, clipping, AdamW, validation, checkpoints, and what ends a run early."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Array
from ..checkpoints import steps as step_folders
from ..comm.agreement import disagreement
from ..comm.group import TensorParallelGroup
from ..comm.launch import machine
from ..config import DecoderConfig
from ..errors import require
from ..layers.decoder import Decoder
from ..layers.norm import NormOverflow
from ..sharding.partition import Block
from .copies import different_copies
from .data import IGNORED, Tokens
from .dealing import Dealing
from .gradients import GradientSum, GradientTreeSum
from .lock import FolderLock
from .log import append_log
from .optimizer import AdamW, gradient_norm, learning_rate, non_finite
from .requests import NOTHING, SAVE, STOP, Requests
from .settings import Settings
from .spikes import Spikes

if TYPE_CHECKING:
    from ..grid import Grid


class TrainingStopped(RuntimeError):
    """Training cannot go on; raised on every rank, with one line that says at which step and why. Checkpoints stay."""


class Trainer:
    """A decoder, its optimizer and its data, and the steps that they take together.

    Parameters
    ----------
    ranks : TensorParallelGroup or Grid
        Of one copy of the decoder, or of several, each of which computes some sequences of a batch.
    config : DecoderConfig
    tokens : Tokens
        The same on every rank.
    settings : Settings
    dtype : str, optional
        Of the decoder.
    folder : str, optional
        Where checkpoints and the log go; None: neither is written.
    say : function(text), optional
        Rank 0 tells people with it what happens.

    Attributes
    ----------
    group, world : TensorParallelGroup
        The ranks of this copy of the decoder, and all ranks.
    data : TensorParallelGroup or None
        The ranks that hold the same slices of other copies; None where there is one copy.
    lock : FolderLock or None
        Of the folder, where rank 0 has one: no checkpoint is written once another job has taken it.
    began_with : dict or None
        The family and the config.json of the checkpoint that the run began with (initial.py); None: random weights.
    """

    def __init__(self, ranks: TensorParallelGroup | Grid, config: DecoderConfig, tokens: Tokens, settings: Settings, *,
                 dtype: str = "float32", folder: str | None = None, say: Callable[[str], None] = print):
        whole: Any = ranks
        self.group: TensorParallelGroup = getattr(whole, "tensor", whole)       # a group of one copy is both
        self.world: TensorParallelGroup = getattr(whole, "world", whole)
        data = getattr(whole, "data", None)
        self.data: TensorParallelGroup | None = data if data and data.size > 1 else None
        self.config, self.tokens, self.settings = config, tokens, settings
        self.folder, self.say = folder, say
        self.lock: FolderLock | None = None
        self.began_with: dict | None = None
        self.model = Decoder(self.group, config, dtype=dtype, seed=settings.seed, recompute=settings.recompute,
                             sequence_parallel=settings.sequence_parallel, gather_again=settings.gather_again)
        self.optimizer = AdamW(self.model, settings.adam_beta1, settings.adam_beta2, settings.adam_eps,
                               settings.weight_decay)
        self.dealing = Dealing(settings, self.data.rank if self.data else 0, self.data.size if self.data else 1,
                               self.group.reproducible)
        self.sum = self.gradient_sum()
        self.step = 0                           # steps done
        self.gradients: dict[str, Array] = {}   # of the last step, whose arrays the next one uses again
        self.spikes = Spikes(settings.spike_limit)
        self.last_saved = time.monotonic()

    def gradient_sum(self) -> GradientSum:
        """Return what adds up gradients over the pieces of a batch and the data ranks."""
        asked, data = self.settings.overlap_grad_reduce, self.data
        require(not (asked and self.group.reproducible), "overlap_grad_reduce in reproducible mode",
                "one of them: the tree's sums come after backward")
        # With check=True every message waits for all ranks, so nothing would be beside anything.
        if data and not data.check and (data.overlaps if asked is None else asked):
            from .buckets import GradientBuckets                # where it is used
            return GradientBuckets(self.model, data, self.dealing.partition)
        kind = GradientTreeSum if self.group.reproducible else GradientSum
        return kind(self.model, data, self.dealing.partition)

    # --- one step -----------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step on a global batch. Returns {"loss", "gradient_norm", "lr"}."""
        settings, loss = self.settings, self.sum_gradients()
        norm = gradient_norm(self.model, self.gradients)
        self.require_finite(loss, norm)
        spike = self.spikes.find({"loss": loss, "gradient_norm": norm})
        if spike:
            raise TrainingStopped(f"step {self.step + 1}: {spike}; the weights of the last checkpoint stay")
        lr = learning_rate(self.step, *settings.schedule())
        scale = settings.clip_grad / norm if 0 < settings.clip_grad < norm else 1.0
        self.step += 1
        self.optimizer.step(self.gradients, lr, self.step, scale)
        return {"loss": loss, "gradient_norm": norm, "lr": lr}

    def sum_gradients(self) -> float:
        """Compute the gradients of a global batch, whose loss is the mean over its counted tokens; returns the loss.

        Raises TrainingStopped on every rank, before anything moves, where a norm overflows on any.
        """
        ids, targets = self.tokens.batch(self.step, self.settings.global_batch_size)
        counted, problem = counted_tokens(targets), ""
        self.sum.begin()
        try:
            for piece in self.dealing.pieces:
                self.add_gradients(piece, ids[piece.start:piece.stop], targets[piece.start:piece.stop], counted)
        except NormOverflow as overflow:        # on all ranks of this copy of the model, or on none
            problem = str(overflow)
        if self.data:
            with self.world.ledger.record_control("overflow"):
                problem = max(self.world.comm.allgather(problem))
        if problem:
            self.sum.abandon()
            raise TrainingStopped(f"step {self.step + 1}: {problem}; the weights of the last checkpoint stay")
        loss, self.gradients = self.sum.finish()
        return loss

    def add_gradients(self, piece: Block, ids: Array, targets: Array, counted: int) -> None:
        """Add what a piece of the global batch, in which so many tokens count, adds to loss and gradients."""
        own = counted_tokens(targets)
        times = counted / own if own else math.inf          # the loss of a piece is the mean over its own tokens
        logits, saved = self.model.forward(ids, step=self.dealing.address(self.step, piece))
        loss, saved_loss = self.model.loss(logits, targets, label_smoothing=self.settings.label_smoothing,
                                           z_loss=self.settings.z_loss, ignore_index=IGNORED)
        beside = self.sum if self.sum.overlaps and piece == self.dealing.pieces[-1] else None
        self.model.backward(self.model.loss_backward(saved_loss, 1 / times), saved, out=self.sum.room(),
                            step_sums=self.sum.norms, beside=beside)
        self.sum.add(piece, loss / times)

    def require_finite(self, loss: float, norm: float) -> None:
        """Raise TrainingStopped, before anything moves, where loss or gradients are not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        found = non_finite(self.model, self.gradients, self.world)
        where = "every gradient is finite, their squares are not"
        if found:
            name, ranks = next(iter(found.items()))
            where = f"{len(found)} gradients are not finite, {name} first, on rank{'s' if len(ranks) > 1 else ''} " \
                    f"{', '.join(map(str, ranks))}"
        where = self.world.comm.bcast(where)
        raise TrainingStopped(f"step {self.step + 1}: found loss {loss} and gradient norm {norm}, expected finite "
                              f"numbers ({where}); the weights of the last checkpoint stay")

    def require_finite_weights(self) -> None:
        """Raise TrainingStopped where a step has left weights that are not finite, so that no checkpoint holds them."""
        found = non_finite(self.model, self.model.weights, self.world)
        names = self.world.comm.bcast(list(found) if found else [])
        if names:
            raise TrainingStopped(f"step {self.step}: found {len(names)} parameters that are not finite, {names[0]} "
                                  f"first, expected finite ones; the last checkpoint stays")

    def validate(self) -> float:
        """Return the mean loss over the validation windows, without dropout; each data rank computes some of them."""
        totals, counts = [], []
        for number, (ids, targets) in enumerate(self.tokens.validation_batches(*self.dealing.windows())):
            counts.append(counted_tokens(targets))
            totals.append(0.0)
            if self.data is None or number % self.data.size == self.data.rank:
                logits, _ = self.model.forward(ids, save=False)
                totals[-1] = self.model.loss(logits, targets, ignore_index=IGNORED)[0] * counts[-1]
        if self.data:                           # x + 0 is x: the same numbers, whoever has them
            totals = self.data.all_reduce(self.data.xp.asarray(totals)).tolist()
        return sum(totals, 0.0) / max(1, sum(counts))

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[int, dict], None] | None = None, requests: Requests | None = None) -> str:
        """Train to the last step, or until a signal asks to stop; returns that signal's name, else "".

        A signal to any rank asks for a checkpoint after the step that it meets (see requests.py).

        Parameters
        ----------
        progress : function(step, figures), optional
            Called on every rank after each step.
        requests : Requests, optional
            What signals ask for. None: those that come from now on, of which TERM ends the run.
        """
        settings, self.last_saved = self.settings, time.monotonic()
        requests = requests or Requests()
        with requests:
            while self.step < settings.train_iters:
                start = time.perf_counter()
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):     # require_finite reports it
                    figures = self.train_step()
                figures["seconds"] = time.perf_counter() - start
                last = self.step == settings.train_iters
                if last or settings.eval_interval and self.step % settings.eval_interval == 0:
                    figures["validation_loss"] = self.validate()
                wish, by = self.agreed_wish(requests)
                due = last or settings.save_interval and self.step % settings.save_interval == 0
                save = bool(self.folder and (due or wish != NOTHING))
                if self.step % settings.check_interval == 0 or last or save:    # no checkpoint of copies that differ
                    self.require_equal_copies()
                self.world.on_root(lambda: self.log(figures))
                if progress:
                    progress(self.step, figures)
                if save:
                    self.require_finite_weights()
                    self.save()
                if wish == STOP and not last:
                    return by
        return ""

    def agreed_wish(self, requests: Requests) -> tuple[int, str]:
        """Return the strongest wish of all ranks; --save-minutes is a wish of rank 0. Collective."""
        wish, minutes = requests.take(), self.settings.save_minutes
        if self.world.rank == 0 and minutes and time.monotonic() - self.last_saved > 60 * minutes:
            wish = max(wish, (SAVE, "time"))
        return max(self.world.comm.allgather(wish))

    def log(self, figures: dict) -> None:
        """Add this step's line to the log, where there is a folder for it."""
        if self.folder:
            append_log(self.folder, self.step, figures)

    def require_equal_copies(self) -> None:
        """Raise TrainingStopped where ranks that hold the same weights hold different ones."""
        different = different_copies(self.model, self.world, self.data is not None)
        if different:
            machines = disagreement(self.world.comm, machine())
            why = f"the ranks run on different kinds of machine ({machines})" if machines else \
                "errors of memory or of a library"
            raise TrainingStopped(f"step {self.step}: found different weights of {different[0]} on the ranks, "
                                  f"expected equal copies: {why}; the last checkpoint stays")

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def files(self) -> step_folders.Files:
        """Return the tensors that step_folders.save takes; for a 16-bit model, the weights in float32."""
        specs = self.model.specs
        state = {f"exp_avg.{name}": (specs[name], m) for name, m in self.optimizer.exp_avg.items()}
        state |= {f"exp_avg_sq.{name}": (specs[name], v) for name, v in self.optimizer.exp_avg_sq.items()}
        return {"model.safetensors": {name: (specs[name], w) for name, w in self.optimizer.master.items()},
                "optimizer.safetensors": state}

    def state(self) -> dict:
        """Return what a run is resumed with: nothing that depends on ranks, time or host."""
        unit = self.dealing.unit
        tokens = {"vocabulary": "bytes" if self.tokens.are_bytes else "ids"} if self.began_with is None else \
            {"model": self.began_with}
        return json.loads(json.dumps({**tokens, "config": asdict(self.config), "unit": unit,
                                      "settings": self.settings.of_the_result(unit), "data": self.tokens.fingerprint(),
                                      "seq_length": self.tokens.seq_length, "dtype": self.model.dtype.name,
                                      "blocks": self.group.blocks if self.group.reproducible else None}))

    def save(self) -> None:
        """Write a step folder; the ranks of the first copy of the model write it. Collective."""
        self.world.on_root(self.require_lock)
        if self.data is None:
            self.write()
        else:
            from ..grid import on_first_copy
            on_first_copy(self.world, self.data, self.write)
        self.last_saved = time.monotonic()

    def write(self) -> None:
        """Write a step folder from one copy of the model. Collective over its ranks."""
        assert self.folder, "there is a time to save with a folder alone"
        path = step_folders.save(self.group, self.folder, self.step, self.files(), self.state(), self.settings.keep)
        if self.world.rank == 0:
            self.say(f"saved {path}")

    def require_lock(self) -> None:
        """Raise InputError where another job writes into the folder."""
        if self.lock:
            self.lock.require_own()


def counted_tokens(targets: Any) -> int:
    """Return how many targets count: those that are not IGNORED."""
    return int((targets != IGNORED).sum())
