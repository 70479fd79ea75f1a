"""What train prints and logs is what a dense run computes: bits, learning rates, norms, tokens a second, validation."""
import argparse
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from check_decoder import dense_weights
from decoder_cases import config
from dense_training import dense_steps, mean_loss
from groups import group_fixture
from mpitp import Decoder, InputError
from mpitp.commands import train
from mpitp.training.data import Tokens
from mpitp.training.loop import Trainer
from mpitp.training.settings import Settings
from spmd import ROOT, job, same_bytes

TEXT = bytes((7 * i * i + i // 3) % 27 for i in range(900))
SETTINGS = Settings(micro_batch_size=2, gradient_accumulation=3, train_iters=4, lr=0.05, min_lr=0.01, warmup=2,
                    clip_grad=0.5, label_smoothing=0.1, z_loss=0.02, seed=4, eval_interval=2, eval_batches=2)
LINE = re.compile(r"step +(\d+)/4 +([\d.]+) bits  lr (\S+)  gradient +([\d.]+) +(\d+) tokens/s"
                  r"(?:  validation ([\d.]+))?")
group = group_fixture("ordinary")


@pytest.fixture
def trainer(group, tmp_path):
    """A run with dropout, accumulation and every part of the loss, into a folder that all ranks know."""
    folder = group.comm.bcast(tmp_path)
    if group.rank == 0:
        (folder / "text").write_bytes(TEXT)
        (folder / "out").mkdir()
    group.comm.Barrier()
    configuration = replace(config("llama, one kv head"), hidden_dropout=0.1, attention_dropout=0.2)
    made = Trainer(group, configuration, Tokens(folder / "text", 27, 7, 4), SETTINGS, dtype="float64",
                   folder=str(folder / "out"), say=lambda text: None)
    made.model.load_dense(dense_weights(made.model.specs))
    return made


def test_what_is_printed_and_logged(trainer, capsys, monkeypatch):
    """Losses are printed in bits and logged in nats; a validation is the mean over its tokens, without dropout."""
    clock = iter(range(1000))
    half_a_second_a_step = SimpleNamespace(perf_counter=lambda: next(clock) / 2, monotonic=time.monotonic)
    monkeypatch.setattr("mpitp.training.loop.time", half_a_second_a_step)
    weights = dense_weights(trainer.model.specs)
    shown = train.Progress(trainer)
    trainer.run(shown)
    shown.finish(argparse.Namespace(baseline=False, plot=None))
    if trainer.group.rank:
        return
    printed = capsys.readouterr().out
    lines = [LINE.fullmatch(line).groups() for line in printed.splitlines() if line.startswith("step")]
    log = [json.loads(line) for line in Path(trainer.folder, "log.jsonl").read_text().splitlines()]
    assert len(lines) == len(log) == 4
    *_, figures = dense_steps(trainer, weights, 4)
    for number, (line, logged, exact) in enumerate(zip(lines, log, figures), 1):
        step, bits, lr, norm, rate, validation = line
        assert int(step) == logged["step"] == number
        assert float(bits) == pytest.approx(exact["loss"] / math.log(2), abs=1e-4)
        assert lr == f"{exact['lr']:.2e}" and float(norm) == pytest.approx(exact["gradient_norm"], abs=1e-3)
        assert {name: logged[name] for name in exact} == pytest.approx(exact, rel=1e-9)
        assert logged["seconds"] == 0.5 and int(rate) == 2 * 3 * 7 / 0.5
        if number % 2 == 0:
            moved = dense_steps(trainer, weights, number)[0]
            exact = mean_loss(moved, trainer.config, trainer.tokens.validation_batches(2, 2))
            assert logged["validation_loss"] == pytest.approx(exact, rel=1e-9)
            assert float(validation) == pytest.approx(exact / math.log(2), abs=1e-4)
        else:
            assert validation is None and "validation_loss" not in logged
    assert f"validation: {exact / math.log(2):.4f} bits a token after 4 steps\n" in printed


def test_a_seed_of_its_own_for_every_mask(group):
    """Another seed drops other elements at each of the three places, the weights being the same."""
    ids, found = np.arange(14).reshape(2, 7), {}
    for where in ("hidden_dropout", "attention_dropout"):
        configuration = replace(config("llama, one kv head"), **{where: 0.3})
        for seed in (0, 1):
            model = Decoder(group, configuration, dtype="float64", seed=seed)
            model.load_dense(dense_weights(model.specs))
            found[where, seed] = model.gather_logits(model.forward(ids, step=2)[0])
            again = model.gather_logits(model.forward(ids, step=2)[0])
            assert same_bytes(found[where, seed], again)
        assert not np.array_equal(found[where, 0], found[where, 1])


def test_flags_reach_the_settings():
    """Each option of the command line is the setting of its name."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    given = {"lr": 0.5, "min_lr": 0.25, "weight_decay": 0.75, "clip_grad": 2.0, "adam_beta1": 0.5, "adam_beta2": 0.25,
             "adam_eps": 1e-3, "label_smoothing": 0.125, "z_loss": 1e-4, "save_minutes": 3.0, "spike_limit": 4.0,
             "micro_batch_size": 3, "gradient_accumulation": 5, "train_iters": 7, "seed": 11, "eval_interval": 13,
             "eval_batches": 17, "save_interval": 19, "keep": 23, "lr_decay_iters": 29}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    made = train.settings_of(parser.parse_args([*words, "--lr-warmup-iters", "31"]))
    assert {name: getattr(made, name) for name in given} == given and made.warmup == 31
    made = train.settings_of(parser.parse_args(["--lr", "0.5", "--train-iters", "70"]))
    assert (made.min_lr, made.warmup, made.lr_decay_iters, made.z_loss) == (0.05, 7, 0, 0.0)
    made = train.settings_of(parser.parse_args(["--sequence-parallel", "--gather-again", "--recompute", "attention"]))
    assert (made.sequence_parallel, made.gather_again, made.recompute) == (True, True, "attention")
    asked = [train.settings_of(parser.parse_args(words)).overlap_grad_reduce
             for words in ([], ["--overlap-grad-reduce"], ["--no-overlap-grad-reduce"])]
    assert asked == [None, True, False]
    with pytest.raises(InputError, match="found --overlap-grad-reduce with --reproducible, expected one of them"):
        train.settings_of(parser.parse_args(["--overlap-grad-reduce", "--reproducible"]))
    with pytest.raises(InputError, match="found --gather-again without --sequence-parallel, expected both"):
        train.settings_of(parser.parse_args(["--gather-again"]))


@pytest.mark.launcher
def test_without_data():
    """The standard library's sources."""
    done = job(2, "-m", "mpitp", "train", "--hidden-size", 8, "--num-layers", 1, "--num-attention-heads", 2,
               "--seq-length", 16, "--micro-batch-size", 2, "--train-iters", 1, "--eval-batches", 1)
    assert done.returncode == 0, done.stderr
    counts = re.search(r"([\d,]+) tokens of the standard library's sources, ([\d,]+) held out", done.stdout)
    training, held_out = (int(count.replace(",", "")) for count in counts.groups())
    assert training + held_out <= 1 << 22 and held_out == (training + held_out) // 20 and "step      1/1" in done.stdout


def test_the_recorded_run_is_this_programs():
    """The transcript of docs/checkpoints.md: what does not depend on a machine is computed again."""
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    shown = text[text.index("mpitp train --hidden-size 256 --num-layers 4"):]
    shown = shown[:shown.index("```")]
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    words = shown[:shown.index("\n3,")].replace("\\\n", " ").split()
    arguments = parser.parse_args(words[words.index("train") + 1:])
    settings, configuration = train.settings_of(arguments), train.config_of(arguments)
    from mpitp.sharding.decoder_specs import decoder_specs
    from mpitp.training.optimizer import learning_rate
    count = sum(math.prod(spec.shape) for spec in decoder_specs(configuration).values())
    assert shown.count(f"{count:,} parameters on 2 ranks, float32\n") == 1
    training, held_out = (int(number.replace(",", "")) for number in re.search(
        r"([\d,]+) tokens of the standard library's sources, ([\d,]+) held", shown).groups())
    assert training + held_out == 1 << 22 and held_out == (1 << 22) // 20
    for step in (100, 1800):
        rate = learning_rate(step - 1, *settings.schedule())
        assert re.search(rf"step +{step}/1800 +\S+ bits  lr {rate:.2e} ", shown)
    last = re.search(r"step +1800/1800 .* validation (\S+)\n", shown)[1]
    assert f"validation: {last} bits a token after 1800 steps\n" in shown
