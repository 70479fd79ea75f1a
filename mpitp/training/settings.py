"""How a decoder is trained, apart from the model and the data."""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import one_of, require, require_positive

UNITS = SEQUENCE, MICRO_BATCH = "sequence", "micro-batch"

@dataclass(frozen=True)
class Settings:
    """How a decoder is trained.

    Parameters
    ----------
    micro_batch_size, gradient_accumulation : sequences of a forward, and forwards of a step on one data rank; their
        product is the global batch on every grid
    train_iters : steps
    lr, min_lr, warmup : see learning_rate
    lr_decay_iters : steps until min_lr, 0 for train_iters
    adam_beta1, adam_beta2, adam_eps, weight_decay : see AdamW
    clip_grad : largest Euclidean norm of all gradients, 0 for none
    label_smoothing : of the training loss
    z_loss : weight of the squared log-sum-exp in the training loss (PaLM: 1e-4)
    seed : of weights, windows and dropout
    eval_interval, eval_batches : validation every so many steps (0: at the end) on so many batches
    save_interval, save_minutes : a checkpoint every so many steps, and so long after the last one (0: at the end)
    keep : how many of the newest checkpoints stay (0: all)
    spike_limit : how many times the median of the last steps a loss or a gradient norm may be (0: any); see spikes.py
    check_interval : every so many steps the copies that several ranks hold are compared
    reproducible_unit : what is computed by itself in reproducible mode. "sequence": the bits depend on the global batch
        alone. "micro-batch": faster, and the bits depend on the cut into micro-batches, too
    sequence_parallel, gather_again, recompute : of the decoder, see Decoder; they change nothing in what is computed
    overlap_grad_reduce : whether the sums over data ranks are begun while backward computes, see buckets.py. None:
        where the transport adds up by itself meanwhile, as GPUs by NCCL or by peer access do

    Raises
    ------
    InputError
        For a number that is none of these.
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
    lr_decay_iters: int = 0
    save_minutes: float = 30.0
    spike_limit: float = 0.0
    z_loss: float = 0.0
    reproducible_unit: str = SEQUENCE
    sequence_parallel: bool = False
    gather_again: bool = False
    recompute: str | None = None
    overlap_grad_reduce: bool | None = None

    def __post_init__(self) -> None:
        require_positive(micro_batch_size=self.micro_batch_size, gradient_accumulation=self.gradient_accumulation,
                         train_iters=self.train_iters, eval_batches=self.eval_batches,
                         check_interval=self.check_interval)
        for name in ("lr", "min_lr", "warmup", "clip_grad", "eval_interval", "save_interval", "keep", "lr_decay_iters",
                     "save_minutes", "spike_limit", "z_loss"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} = {value!r}", "a number from 0")
        one_of("reproducible_unit", self.reproducible_unit, UNITS)

    @property
    def global_batch_size(self) -> int:
        """The sequences of a step, over all data ranks."""
        return self.micro_batch_size * self.gradient_accumulation

    def schedule(self) -> tuple[float, float, int, int]:
        """Return what learning_rate takes beside the step: lr, min_lr, warmup, steps."""
        return self.lr, self.min_lr, self.warmup, self.lr_decay_iters or self.train_iters

    def of_the_result(self, unit: str | None = None) -> dict:
        """Return the settings that the result depends on, with which alone a run is resumed.

        unit : what is computed by itself in reproducible mode. Where that is a sequence, the cut of the global batch
            into micro-batches means nothing, and the global batch stands for one of them
        """
        own = asdict(self)
        for name in ("eval_interval", "eval_batches", "save_interval", "keep", "check_interval", "save_minutes",
                     "spike_limit", "reproducible_unit", "sequence_parallel", "gather_again", "recompute",
                     "overlap_grad_reduce"):
            del own[name]
        if unit == SEQUENCE:
            own |= dict(micro_batch_size=self.global_batch_size, gradient_accumulation=1)
        return own
