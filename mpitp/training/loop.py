"""The loop: batches, gradients, clipping, AdamW, validation, checkpoints, and what ends a run early."""
from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from ..arrays import Array, on_host
from ..checkpoints import steps as step_folders
from ..comm.group import TensorParallelGroup
from ..config import DecoderConfig
from ..layers.decoder import Decoder
from ..layers.norm import NormOverflow
from .data import Tokens
from .lock import FolderLock
from .log import append_log
from .optimizer import AdamW, gradient_norm, learning_rate, non_finite
from .requests import NOTHING, SAVE, STOP, Requests
from .settings import Settings
from .spikes import Spikes


class TrainingStopped(RuntimeError):
    """Training cannot go on; raised on every rank, with one line that says at which step and why. Checkpoints stay."""


class Trainer:
    """A decoder, its optimizer and its data, and the steps that they take together.

    Parameters
    ----------
    group : TensorParallelGroup
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
    lock : FolderLock or None
        Of the folder, where rank 0 has one: no checkpoint is written once another job has taken it.
    began_with : dict or None
        The family and the config.json of the checkpoint that the run began with (initial.py); None: random weights.
    """

    def __init__(self, group: TensorParallelGroup, config: DecoderConfig, tokens: Tokens, settings: Settings, *,
                 dtype: str = "float32", folder: str | None = None, say: Callable[[str], None] = print):
        self.group, self.config, self.tokens, self.settings = group, config, tokens, settings
        self.folder, self.say = folder, say
        self.lock: FolderLock | None = None
        self.began_with: dict | None = None
        self.model = Decoder(group, config, dtype=dtype, seed=settings.seed)
        self.optimizer = AdamW(self.model, settings.adam_beta1, settings.adam_beta2, settings.adam_eps,
                               settings.weight_decay)
        self.step = 0                           # steps done
        self.gradients: dict[str, Array] = {}   # of the last step, whose arrays the next one uses again
        self.more: dict[str, Array] = {}        # of its last micro-batch
        self.spikes = Spikes(settings.spike_limit)
        self.last_saved = time.monotonic()

    # --- one step -----------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step on gradient_accumulation micro-batches. Returns {"loss", "gradient_norm", "lr"}."""
        settings, loss = self.settings, 0.0
        for micro in range(settings.gradient_accumulation):
            loss += self.add_gradients(micro) / settings.gradient_accumulation
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

    def finite_step(self) -> dict[str, float]:
        """Take a step; raise TrainingStopped, before anything moves, where a norm in it overflows."""
        try:
            return self.train_step()
        except NormOverflow as overflow:
            said = f"step {self.step + 1}: {overflow}; the weights of the last checkpoint stay"
            raise TrainingStopped(said) from None

    def add_gradients(self, micro: int) -> float:
        """Add the gradients of one micro-batch to those of the step. Returns its loss."""
        number = self.step * self.settings.gradient_accumulation + micro
        ids, targets = self.tokens.batch(number, self.settings.micro_batch_size)
        logits, saved = self.model.forward(ids, step=number)
        loss, saved_loss = self.model.loss(logits, targets, label_smoothing=self.settings.label_smoothing)
        d_logits = self.model.loss_backward(saved_loss, 1 / self.settings.gradient_accumulation)
        if micro == 0:
            self.gradients = self.model.backward(d_logits, saved, out=self.gradients or None)
        else:
            self.more = self.model.backward(d_logits, saved, out=self.more or None)
            for name, g in self.gradients.items():
                g += self.more[name]
        return loss

    def require_finite(self, loss: float, norm: float) -> None:
        """Raise TrainingStopped, before anything moves, where loss or gradients are not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        found = non_finite(self.model, self.gradients)
        where = "every gradient is finite, their squares are not"
        if found:
            name, ranks = next(iter(found.items()))
            where = f"{len(found)} gradients are not finite, {name} first, on rank{'s' if len(ranks) > 1 else ''} " \
                    f"{', '.join(map(str, ranks))}"
        where = self.group.comm.bcast(where)
        raise TrainingStopped(f"step {self.step + 1}: found loss {loss} and gradient norm {norm}, expected finite "
                              f"numbers ({where}); the weights of the last checkpoint stay")

    def require_finite_weights(self) -> None:
        """Raise TrainingStopped where a step has left weights that are not finite, so that no checkpoint holds them."""
        found = non_finite(self.model, self.model.weights)
        names = self.group.comm.bcast(list(found) if found else [])
        if names:
            raise TrainingStopped(f"step {self.step}: found {len(names)} parameters that are not finite, {names[0]} "
                                  f"first, expected finite ones; the last checkpoint stays")

    def validate(self) -> float:
        """Return the mean loss over the validation windows, without dropout."""
        total, count = 0.0, 0
        for ids, targets in self.tokens.validation_batches(self.settings.micro_batch_size, self.settings.eval_batches):
            logits, _ = self.model.forward(ids, save=False)
            total += self.model.loss(logits, targets)[0] * ids.size
            count += ids.size
        return total / count

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
                    figures = self.finite_step()
                figures["seconds"] = time.perf_counter() - start
                last = self.step == settings.train_iters
                if last or settings.eval_interval and self.step % settings.eval_interval == 0:
                    figures["validation_loss"] = self.validate()
                wish, by = self.agreed_wish(requests)
                due = last or settings.save_interval and self.step % settings.save_interval == 0
                save = bool(self.folder and (due or wish != NOTHING))
                if self.step % settings.check_interval == 0 or last or save:    # no checkpoint of copies that differ
                    self.require_equal_copies()
                self.group.on_root(lambda: self.log(figures))
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
        if self.group.rank == 0 and minutes and time.monotonic() - self.last_saved > 60 * minutes:
            wish = max(wish, (SAVE, "time"))
        return max(self.group.comm.allgather(wish))

    def log(self, figures: dict) -> None:
        """Add this step's line to the log, where there is a folder for it."""
        if self.folder:
            append_log(self.folder, self.step, figures)

    def require_equal_copies(self) -> None:
        """Raise TrainingStopped where ranks that hold the same weights hold different ones."""
        of_ranks = self.group.comm.allgather(self.copies())
        different = [label for label in set().union(*of_ranks)
                     if len({copies[label] for copies in of_ranks if label in copies}) > 1]
        if different:
            raise TrainingStopped(f"step {self.step}: found different weights of {min(different)} on the ranks, "
                                  f"expected equal copies: memory or library errors; the last checkpoint stays")

    def copies(self) -> dict[str, str]:
        """Return {parameter or key/value head: SHA-256} of everything of which other ranks have a copy."""
        found = {}
        for name, spec in self.model.specs.items():
            w = self.model.weights[name]
            if spec.axis is None:
                found[name] = digest(w)
            elif spec.share > 1:
                first = spec.window(self.group.place)[0].start // spec.multiple
                for head in range(len(w) // spec.multiple):
                    found[f"{name}, head {first + head}"] = digest(w[head * spec.multiple:(head + 1) * spec.multiple])
        return found

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
        tokens = {"vocabulary": "bytes" if self.tokens.are_bytes else "ids"} if self.began_with is None else \
            {"model": self.began_with}
        return json.loads(json.dumps({**tokens, "config": asdict(self.config),
                                      "settings": self.settings.of_the_result(), "data": self.tokens.fingerprint(),
                                      "seq_length": self.tokens.seq_length, "dtype": self.model.dtype.name,
                                      "blocks": self.group.blocks if self.group.reproducible else None}))

    def save(self) -> None:
        """Write a step folder. Collective."""
        assert self.folder, "there is a time to save with a folder alone"
        self.group.on_root(self.require_lock)
        path = step_folders.save(self.group, self.folder, self.step, self.files(), self.state(), self.settings.keep)
        if self.group.rank == 0:
            self.say(f"saved {path}")
        self.last_saved = time.monotonic()

    def require_lock(self) -> None:
        """Raise InputError where another job writes into the folder."""
        if self.lock:
            self.lock.require_own()


def digest(w: Array) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(on_host(w).tobytes()).hexdigest()
