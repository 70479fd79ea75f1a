"""The loop: batches, gradients, clipping, AdamW, validation, checkpoints, and what ends a run early."""
import contextlib
import hashlib
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass

import numpy as np

from ..arrays import on_host
from ..layers.decoder import Decoder
from ..errors import InputError, require, require_positive
from ..checkpoints import steps as checkpoint
from .optimizer import AdamW, gradient_norm, learning_rate, non_finite


class TrainingStopped(RuntimeError):
    """The run cannot go on, on every rank alike: one line that says at which step and why. Checkpoints stay."""


@dataclass(frozen=True)
class Settings:
    """How a decoder is trained. Batches are of one rank group: all ranks see the same tokens.

    micro_batch_size, gradient_accumulation : sequences of a forward, and forwards of a step
    train_iters : steps
    lr, min_lr, warmup : see learning_rate; adam_*, weight_decay : see AdamW
    clip_grad : largest Euclidean norm of all gradients, 0 for none
    label_smoothing : of the training loss
    seed : of weights, windows and dropout
    eval_interval, eval_batches : validation every so many steps (0: at the end) on so many batches
    save_interval, keep : a checkpoint every so many steps (0: at the end), of which the newest `keep` stay (0: all)
    check_interval : every so many steps what several ranks hold is compared between them
    """
    micro_batch_size: int = 8
    gradient_accumulation: int = 1
    train_iters: int = 200
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup: int = 20
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    label_smoothing: float = 0.0
    seed: int = 0
    eval_interval: int = 0
    eval_batches: int = 8
    save_interval: int = 0
    keep: int = 3
    check_interval: int = 50

    def __post_init__(self):
        require_positive(micro_batch_size=self.micro_batch_size, gradient_accumulation=self.gradient_accumulation,
                         train_iters=self.train_iters, eval_batches=self.eval_batches,
                         check_interval=self.check_interval)
        for name in ("lr", "min_lr", "warmup", "clip_grad", "eval_interval", "save_interval", "keep"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} = {value!r}", "a number from 0")

    def of_the_result(self):
        """The settings that the result depends on: a run is resumed with the same."""
        own = asdict(self)
        for name in ("eval_interval", "eval_batches", "save_interval", "keep", "check_interval"):
            del own[name]
        return own


class Trainer:
    """A decoder, its optimizer and its data, and the steps that they take together.

    Parameters
    ----------
    group, config, dtype : as Decoder's
    tokens : Tokens, the same on every rank
    settings : Settings
    folder : where checkpoints and the log go, None for nowhere
    say : function(text) that rank 0 tells people what happens with
    """

    def __init__(self, group, config, tokens, settings, *, dtype="float32", folder=None, say=print):
        self.group, self.config, self.tokens, self.settings = group, config, tokens, settings
        self.folder, self.say = folder, say
        self.model = Decoder(group, config, dtype=dtype, seed=settings.seed)
        self.optimizer = AdamW(self.model, settings.adam_beta1, settings.adam_beta2, settings.adam_eps,
                               settings.weight_decay)
        self.step = 0                           # steps done
        self.gradients, self.more = None, None
        self.asked_to_save = False

    # --- one step -----------------------------------------------------------------------------------------------

    def train_step(self):
        """One optimizer step on gradient_accumulation micro-batches. Returns {"loss", "gradient_norm", "lr"}."""
        settings, loss = self.settings, 0.0
        for micro in range(settings.gradient_accumulation):
            loss += self.add_gradients(micro) / settings.gradient_accumulation
        norm = gradient_norm(self.model, self.gradients)
        self.require_finite(loss, norm)
        lr = learning_rate(self.step, settings.lr, settings.min_lr, settings.warmup, settings.train_iters)
        scale = settings.clip_grad / norm if 0 < settings.clip_grad < norm else 1.0
        self.step += 1
        self.optimizer.step(self.gradients, lr, self.step, scale)
        return {"loss": loss, "gradient_norm": norm, "lr": lr}

    def add_gradients(self, micro):
        """Forward and backward of one micro-batch; its gradients are added to those of the step. Returns its loss."""
        number = self.step * self.settings.gradient_accumulation + micro
        ids, targets = self.tokens.batch(number, self.settings.micro_batch_size)
        logits, saved = self.model.forward(ids, step=number)
        loss, saved_loss = self.model.loss(logits, targets, label_smoothing=self.settings.label_smoothing)
        d_logits = self.model.loss_backward(saved_loss, 1 / self.settings.gradient_accumulation)
        if micro == 0:
            self.gradients = self.model.backward(d_logits, saved, out=self.gradients)
        else:
            self.more = self.model.backward(d_logits, saved, out=self.more)
            for name, g in self.gradients.items():
                g += self.more[name]
        return loss

    def require_finite(self, loss, norm):
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

    def require_finite_weights(self):
        """Raise TrainingStopped where a step has left weights that are no numbers: no checkpoint of those."""
        found = non_finite(self.model, self.model.weights)
        names = self.group.comm.bcast(list(found) if found else [])
        if names:
            raise TrainingStopped(f"step {self.step}: found {len(names)} parameters that are not finite, {names[0]} "
                                  f"first, expected finite ones; the last checkpoint stays")

    def validate(self):
        """The mean loss over the validation windows, without dropout."""
        total = count = 0
        for ids, targets in self.tokens.validation_batches(self.settings.micro_batch_size, self.settings.eval_batches):
            logits, _ = self.model.forward(ids, save=False)
            total += self.model.loss(logits, targets)[0] * ids.size
            count += ids.size
        return total / count

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self, progress=None):
        """Train to the last step. progress : function(step, figures) on every rank, after each step.

        USR1 asks for a checkpoint at the next step; the ranks agree on it.
        """
        settings, before = self.settings, None
        if hasattr(signal, "SIGUSR1"):
            before = signal.signal(signal.SIGUSR1, self.ask_to_save)
        try:
            while self.step < settings.train_iters:
                start = time.perf_counter()
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):     # the loss says it
                    figures = self.train_step()
                figures["seconds"] = time.perf_counter() - start
                last = self.step == settings.train_iters
                if last or settings.eval_interval and self.step % settings.eval_interval == 0:
                    figures["validation_loss"] = self.validate()
                save = self.is_time_to_save(last)
                if self.step % settings.check_interval == 0 or last or save:    # no checkpoint of copies that differ
                    self.require_equal_copies()
                self.group.root_first(lambda: self.log(figures))
                if progress:
                    progress(self.step, figures)
                if save:
                    self.require_finite_weights()
                    self.save()
        finally:
            if before is not None:
                signal.signal(signal.SIGUSR1, before)

    def ask_to_save(self, number, frame):
        self.asked_to_save = True

    def is_time_to_save(self, last):
        asked = self.group.any(self.asked_to_save)
        due = last or self.settings.save_interval and self.step % self.settings.save_interval == 0
        if asked:
            self.asked_to_save = False
        return bool(self.folder) and (due or asked)

    def log(self, figures):
        """One JSON line a step into log.jsonl, by rank 0."""
        if self.folder and self.group.rank == 0:
            path = os.path.join(self.folder, "log.jsonl")
            try:
                with open(path, "a", encoding="utf-8") as out:
                    out.write(json.dumps({"step": self.step, **figures}) + "\n")
            except OSError as error:
                raise InputError(f"{path}: found {error.strerror}, expected to write it") from None

    def require_equal_copies(self):
        """Raise TrainingStopped where ranks that hold the same weights hold different ones."""
        of_ranks = self.group.comm.allgather(self.copies())
        different = [label for label in set().union(*of_ranks)
                     if len({copies[label] for copies in of_ranks if label in copies}) > 1]
        if different:
            raise TrainingStopped(f"step {self.step}: found different weights of {min(different)} on the ranks, "
                                  f"expected equal copies: memory or library errors; the last checkpoint stays")

    def copies(self):
        """{what: SHA-256} of everything of which other ranks have a copy: replicated weights, shared heads."""
        found = {}
        for name, spec in self.model.specs.items():
            w = self.model.weights[name]
            if spec.axis is None:
                found[name] = digest(w)
            elif spec.share > 1:
                first = spec.window(self.group.place)[0].start // spec.unit
                for head in range(len(w) // spec.unit):
                    found[f"{name}, head {first + head}"] = digest(w[head * spec.unit:(head + 1) * spec.unit])
        return found

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def files(self):
        """What a step folder holds, as checkpoint.save takes it. Of a 16-bit model, its float32 weights."""
        specs = self.model.specs
        state = {f"exp_avg.{name}": (specs[name], m) for name, m in self.optimizer.exp_avg.items()}
        state |= {f"exp_avg_sq.{name}": (specs[name], v) for name, v in self.optimizer.exp_avg_sq.items()}
        return {"model.safetensors": {name: (specs[name], w) for name, w in self.optimizer.master.items()},
                "optimizer.safetensors": state}

    def state(self):
        """What state.json says: nothing that depends on ranks, time or host."""
        return json.loads(json.dumps({"schema": "mpitp.checkpoint/1", "step": self.step, "config": asdict(self.config),
                                      "settings": self.settings.of_the_result(), "data": self.tokens.fingerprint(),
                                      "seq_length": self.tokens.seq_length, "dtype": self.model.dtype.name,
                                      "blocks": self.group.blocks if self.group.reproducible else None}))

    def save(self):
        path = checkpoint.save(self.group, self.folder, self.step, self.files(), self.state(), self.settings.keep)
        if self.group.rank == 0:
            self.say(f"saved {path}")

    def resume(self):
        """Go on from the newest complete step folder, whatever number of ranks wrote it; says what it found."""
        found = self.group.root_first(lambda: self.find() if self.group.rank == 0 else None)
        step, left = self.group.comm.bcast(found)
        if step is None:
            return
        checkpoint.load(self.group, self.folder, step, self.files())
        self.optimizer.round_weights()
        self.step = step
        if self.group.rank == 0:
            self.say(f"resumed from {self.folder}, step {step}" + (f"; removed {', '.join(left)}" if left else ""))

    def find(self):
        left, steps = checkpoint.clean(self.folder), checkpoint.steps(self.folder)
        removed = f" (removed the unfinished {', '.join(left)})" if left else ""
        require(steps, f"no step folder in {self.folder}{removed}", "one to resume from")
        state, mine = checkpoint.read_state(self.folder, steps[-1]), self.state()
        for key in ("config", "settings", "data", "seq_length", "dtype", "blocks"):
            if state.get(key) != mine[key]:
                raise InputError(f"{self.folder}: found {difference(key, state.get(key), mine[key])}: a run is resumed "
                                 f"with what it began with")
        require(steps[-1] < self.settings.train_iters, f"step {steps[-1]} in {self.folder}",
                f"a run that is not at its end, --train-iters {self.settings.train_iters}")
        self.cut_log(steps[-1])
        return steps[-1], left

    def cut_log(self, step):
        """Drop what log.jsonl says of later steps: they will be taken again."""
        lines = [line for line in read_log(self.folder) if line["step"] <= step]
        path = os.path.join(self.folder, "log.jsonl")
        with open(f"{path}.partial", "w", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(f"{path}.partial", path)


def read_log(folder):
    """The lines of log.jsonl as dicts, but for one that a killed run left unfinished."""
    found, path = [], os.path.join(folder, "log.jsonl")
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and isinstance(line.get("step"), int)
            and isinstance(line.get("loss"), float)]


def difference(key, found, expected):
    """The first thing that two parts of a state differ in."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                return f"{name} = {found.get(name)}, expected {expected.get(name)}"
    return f"{key} = {found}, expected {expected}"


def digest(w):
    return hashlib.sha256(on_host(w).tobytes()).hexdigest()
