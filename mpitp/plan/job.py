"""What is planned: a model, what is done with it, and how its ranks are dealt."""
from __future__ import annotations

from dataclasses import dataclass

from ..arrays import compute_dtype
from ..config import DecoderConfig
from ..errors import one_of, require, require_positive
from ..sharding.partition import Partition

KINDS = ("train", "decode", "score", "load")
RECOMPUTED = (None, "block", "attention")


@dataclass(frozen=True)
class Job:
    """A Job is what each tensor group of a run does, again and again.

    Parameters
    ----------
    config : DecoderConfig
        The model.
    kind : str
        "train", "decode" (prompts, then a token of each sequence at a time), "score" (one window forward) or "load"
        (the weights alone).
    batch : int
        Sequences of a forward: of a micro-batch, in training.
    tokens : int
        Positions of each sequence: of a window, of a prompt.
    new_tokens : int
        Of "decode": what each sequence is continued by.
    accumulation : int
        Of "train": how many micro-batches the global batch of a step has, which the data ranks share.
    unit : str
        Of "train" in reproducible mode: "sequence" or "micro-batch", what is computed by itself.
    label_smoothing : float
        Of the training loss.
    dtype : str
        Of the weights, and of what is computed.
    weights : str
        "bfloat16" where matrices stay so in the memory of a CPU.
    device : str
        "cpu" or "gpu", which decides what dtypes there are.
    sequence_parallel, gather_again, recompute : bool, bool, str or None
        Of "train": as the Decoder's. Generation works on whole rows, and keeps nothing for backward.

    Raises
    ------
    InputError
        For a number that is not positive, an unknown kind, dtype or recomputation, gather_again without
        sequence_parallel, more positions than the model has learned.
    """
    config: DecoderConfig
    kind: str
    batch: int
    tokens: int
    new_tokens: int = 1
    accumulation: int = 1
    unit: str = "sequence"
    label_smoothing: float = 0.0
    dtype: str = "float32"
    weights: str = "float32"
    device: str = "cpu"
    sequence_parallel: bool = False
    gather_again: bool = False
    recompute: str | None = None

    def __post_init__(self) -> None:
        one_of("kind of job", self.kind, KINDS)
        require_positive(batch=self.batch, tokens=self.tokens, new_tokens=self.new_tokens,
                         gradient_accumulation=self.accumulation)
        compute_dtype(self.dtype, self.device)
        require(self.recompute in RECOMPUTED, f"recompute {self.recompute!r}", "'block', 'attention' or None")
        require(self.sequence_parallel or not self.gather_again, "gather_again without sequence_parallel", "both")
        if self.config.position_embedding == "learned":
            most = self.config.max_position_embeddings or 0
            require(self.positions <= most, f"{self.positions} positions", f"at most {most}, which the model has "
                                                                           f"learned")

    @property
    def positions(self) -> int:
        """How many positions of a sequence there are at most: what keys and values have room for."""
        return self.tokens + (self.new_tokens - 1 if self.kind == "decode" else 0)


@dataclass(frozen=True)
class Layout:
    """A Layout says how the ranks of a run are dealt: `data` tensor groups of `tensor` ranks each.

    Parameters
    ----------
    tensor : int
        Ranks that share each layer.
    data : int
        Groups, each with windows of its own.
    blocks : int or None
        Blocks of a dimension in reproducible mode; None: one a rank.
    """
    tensor: int
    data: int = 1
    blocks: int | None = None

    @property
    def ranks(self) -> int:
        """All ranks of the run."""
        return self.tensor * self.data


def own_rows(job: Job, layout: Layout, rows: int) -> list[int]:
    """Return how many of so many rows (tokens) of a training forward each rank of a tensor group has by itself."""
    if not (job.kind == "train" and job.sequence_parallel):
        return [rows] * layout.tensor
    return list(Partition(rows, layout.tensor, layout.blocks or layout.tensor).lengths)


def pieces(job: Job, layout: Layout) -> list[int]:
    """Return the sequences of each forward that the data rank with the most of them computes in a step, or a prefill.

    A global batch is dealt over the data ranks as training/dealing.py deals it.
    """
    if job.kind != "train":
        return [job.batch]
    sequences = job.batch * job.accumulation
    if layout.blocks is not None:
        of_one = 1 if job.unit == "sequence" else job.batch
        shared = Partition(sequences // of_one, layout.data, sequences // of_one)
        return max(([of_one] * length for length in shared.lengths), key=len)
    runs = [Partition(sequences, layout.data, layout.data).range(rank) for rank in range(layout.data)]
    return max((cut(run, job.batch) for run in runs), key=lambda sizes: (sum(sizes), len(sizes)))


def cut(run: slice, size: int) -> list[int]:
    """Return the sizes of a run of sequences that is cut at the multiples of `size`."""
    bounds = [run.start, *range(run.start - run.start % size + size, run.stop, size), run.stop]
    return [stop - start for start, stop in zip(bounds, bounds[1:]) if stop > start]


def layout_of(ranks: int, data: int = 1, blocks: int | None = None) -> Layout:
    """Return the Layout of so many ranks. Raises InputError where `data` groups cannot share them evenly."""
    require_positive(ranks=ranks, data_parallel=data)
    require(ranks % data == 0, f"{ranks} ranks with --data-parallel {data}", f"a multiple of {data}")
    return Layout(ranks // data, data, blocks)
