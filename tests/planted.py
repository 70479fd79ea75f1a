"""Mistakes that once went unnoticed, each planted in a copy of this tree, and the test that notices it.

    python tests/planted.py                     plant every one; a table; exit status 1 where one is not noticed
    python tests/planted.py dropout 'z-loss'    those whose names have one of these words
    python tests/planted.py --list              what is planted, and where

A mistake is an edit of one place: a text that occurs once in a file, and what stands there instead; or, where a text is
made of measurements, the first match of a pattern, whose last digit becomes another. Its tests must pass without it and
fail with it; both are run, on as many ranks as it says.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mistake:
    """An edit, and the test that must fail with it (a node of pytest, or several with blanks between)."""
    name: str
    file: str
    was: str                    # a text; a pattern where now is None
    now: str | None
    test: str
    ranks: int = 1

    def edit(self, text):
        """Return what stands in a text and what comes there instead."""
        if self.now is not None:
            return self.was, self.now
        found = re.search(self.was, text, re.MULTILINE)
        assert found, f"{self.name}: nothing in {self.file} matches {self.was}"
        last = max(re.finditer(r"[0-9]", found[0]), key=lambda digit: digit.start())
        other = str((int(last[0]) + 1) % 10)
        return found[0], found[0][:last.start()] + other + found[0][last.end():]


LOOP, DATA, SCORE = "mpitp/training/loop.py", "mpitp/training/data.py", "mpitp/commands/score.py"
SHOWN = "mpitp/commands/train_progress.py"
FORWARD = "self.model.forward(ids, step=self.dealing.address(self.step, piece))"
SEED = "self.config, self.seed = config, 0 if seed is None else seed"
FIGURES = "tests/test_train_figures.py::test_what_is_printed_and_logged"
DENSE = "tests/test_train.py::test_weights_and_state_against_dense"
MISTAKES = [
    # --- training ---------------------------------------------------------------------------------------------------
    Mistake("no dropout in training", LOOP, FORWARD, "self.model.forward(ids)", DENSE),
    Mistake("one dropout mask for all micro-batches", LOOP, FORWARD,
            "self.model.forward(ids, step=self.step)", DENSE),
    Mistake("validation with dropout", LOOP, "self.model.forward(ids, save=False)",
            "self.model.forward(ids, step=self.step, save=False)", DENSE),
    Mistake("reported loss not divided by the accumulation", LOOP,
            "        return loss\n", "        return loss * self.settings.gradient_accumulation\n",
            DENSE),
    Mistake("gradients not divided by the accumulation", LOOP,
            "self.model.loss_backward(saved_loss, 1 / times)", "self.model.loss_backward(saved_loss)", DENSE),
    Mistake("validate() with its sign turned", LOOP, "return sum(totals, 0.0)", "return -sum(totals, 0.0)", DENSE),
    Mistake("validation smooths labels, as training does", LOOP,
            "self.model.loss(logits, targets, ignore_index=IGNORED)",
            "self.model.loss(logits, targets, label_smoothing=0.1, ignore_index=IGNORED)", DENSE),
    Mistake("gradient norm after clipping", LOOP, '"gradient_norm": norm, "lr"', '"gradient_norm": norm * scale, "lr"',
            DENSE),
    Mistake("z-loss of --z-loss not given to the loss", LOOP, "z_loss=self.settings.z_loss", "z_loss=0.0", DENSE),
    Mistake("--z-loss that the command drops", "mpitp/commands/train.py", '"spike_limit", "z_loss", "repro',
            '"spike_limit", "repro',
            "tests/test_train_figures.py::test_flags_reach_the_settings"),
    Mistake("nats printed as bits by train", SHOWN, 'figures["loss"] / math.log(2)',
            'figures["loss"]', FIGURES),
    Mistake("validation in nats printed as bits by train", SHOWN,
            'figures["validation_loss"] / math.log(2)', 'figures["validation_loss"]',
            FIGURES),
    Mistake("tokens a second without the accumulation", SHOWN,
            "settings.global_batch_size *", "settings.micro_batch_size *",
            FIGURES),
    Mistake("nats printed as bits by score", SCORE, "bits * counted / utf8", "loss * counted / utf8",
            "tests/test_score.py::test_text"),
    Mistake("bits printed as nats by score", SCORE, 'f"loss {result.loss:.6f} nats',
            'f"loss {result.loss / math.log(2):.6f} nats',
            "tests/test_score.py::test_the_loss_of_transformers"),
    Mistake("a loss of score over one token too many", SCORE, "return total / (len(ids) - 1), len(ids) - 1, windows",
            "return total / len(ids), len(ids) - 1, windows", "tests/test_score.py::test_each_token_counts_once"),
    Mistake("--seed that changes no dropout mask of blocks", "mpitp/layers/block.py",
            SEED, "self.config, self.seed = config, 0", DENSE),
    Mistake("--seed that changes no dropout mask of embeddings", "mpitp/layers/decoder.py",
            SEED, "self.config, self.seed = config, 0", DENSE),
    Mistake("--seed that changes no dropout mask of attention", "mpitp/layers/attention.py",
            "config.dropout, 0 if seed is None else seed", "config.dropout, 0", DENSE),
    Mistake("--seed that changes no window", DATA, 'rng.key(self.seed, "training.windows")',
            'rng.key(0, "training.windows")', "tests/test_train.py::test_windows"),
    Mistake("resume takes tensors of another shape or dtype", "mpitp/checkpoints/steps.py",
            "require(found.get(name) == expected,", "require(name in found,",
            "tests/test_step_folders.py::test_tensors_of_another_shape_or_dtype"),
    Mistake("resume takes tensors of another shape", "mpitp/checkpoints/steps.py",
            "require(found.get(name) == expected,", "require(found.get(name, ' ')[0] == expected[0],",
            "tests/test_step_folders.py::test_tensors_of_another_shape_or_dtype"),
    Mistake("train without --data fails", DATA, 'standard_library() if path is None else read(path, dtype)',
            'read(path, dtype)', "tests/test_train_figures.py::test_without_data"),
    Mistake("a log whose steps are off by one", LOOP, "append_log(self.folder, self.step, figures)",
            "append_log(self.folder, self.step - 1, figures)", FIGURES),
    # --- z-loss -----------------------------------------------------------------------------------------------------
    Mistake("z-loss without the maximum that was subtracted", "mpitp/layers/loss.py", "z_loss * (lse_N + max_N) ** 2",
            "z_loss * lse_N ** 2", "tests/test_loss.py"),
    Mistake("z-loss without its factor of 2 backward", "mpitp/layers/loss.py", "(1 + 2 * z_loss *", "(1 + z_loss *",
            "tests/test_loss.py"),
    # --- loading ----------------------------------------------------------------------------------------------------
    Mistake("an error of the disk while slices are read passes", "mpitp/checkpoints/safetensors.py",
            'raise InputError(f"{self.path}: found {error.strerror}, expected to read it") from None',
            "return", "tests/test_safetensors.py::test_an_error_of_the_disk_while_slices_are_read"),
    Mistake("lengths [1, 99] of prompts of two tokens", "mpitp/inference/generation.py", "and (lengths <= S).all()", "",
            "tests/test_generation.py::test_bad_input"),
    Mistake("seed=None gives other weights than zeros", "mpitp/layers/base.py",
            "self.dtype) if seed is None else", "self.dtype) + 1 if seed is None else",
            "tests/test_parameters.py::test_no_seed_is_zeros"),
    Mistake("a base of 1 with yarn", "mpitp/attention_config.py", "require(self.base != 1,", "require(self.base,",
            "tests/test_rotary.py::test_a_base_of_1_with_yarn_is_refused"),
    Mistake("query_pre_attn_scalar 0", "mpitp/checkpoints/families/gemma.py",
            "keys.number(name, default=default, above=0) ** -0.5",
            "max(keys.number(name, default=default), 1e-9) ** -0.5",
            "tests/test_config_keys.py::test_a_query_pre_attn_scalar_of_0"),
    Mistake("verify takes the machine down", "mpitp/verification/feed_forward.py", "if needed > there:", "if False:",
            "tests/test_memory.py::test_a_dense_side_beyond_the_memory"),
    Mistake("an estimate of verify's memory without the weights", "mpitp/verification/feed_forward.py",
            "8 * (6 * weights + 12", "8 * (12", "tests/test_memory.py::test_a_dense_side_beyond_the_memory"),
    Mistake("a model beyond the memory is loaded", "mpitp/checkpoints/room.py", "sum(needed) > free", "False",
            "tests/test_hostile_folders.py::test_a_folder_larger_than_memory"),
    Mistake("a transport that does not wait before it ends", "mpitp/comm/gpu/nccl.py",
            "        self.cupy.cuda.get_current_stream().synchronize()", "        pass",
            "tests/test_transports.py::test_close_waits_for_what_is_pending"),
    Mistake("peer access that does not wait before it ends", "mpitp/comm/gpu/peer.py",
            "        self.peers.cupy.cuda.get_current_stream().synchronize()", "        pass",
            "tests/test_transports.py::test_close_waits_for_what_is_pending"),
    # --- figures ----------------------------------------------------------------------------------------------------
    Mistake("a figure of a table changed by hand", "docs/performance.md",
            r"^\| forward \| \*\*mpitp\*\* .*$", None,
            "tests/test_docs.py::test_tables_are_those_of_the_result_files"),
    Mistake("a figure of an accuracy table changed by hand", "docs/accuracy.md",
            r"^\| .* \| \d+\.\d+ \(\d+\.\d+\) \|", None,
            "tests/test_docs.py::test_tables_are_those_of_the_result_files"),
    Mistake("a figure of a run in prose changed by hand", "docs/performance.md",
            r"\d\.\d\d, \d\.\d\d, \d\.\d\d", None,
            "tests/test_docs.py::test_tables_are_those_of_the_result_files"),
    Mistake("61% in communication", "README.md", r"\d+% of it in communication", None,
            "tests/test_docs.py::test_recorded_lines_are_those_of_their_runs"),
    Mistake("a loss of the training transcript changed by hand", "docs/checkpoints.md", "2.8597 bits", "2.5897 bits",
            "tests/test_docs.py::test_recorded_lines_are_those_of_their_runs"),
    Mistake("a learning rate of the training transcript that is none", "docs/checkpoints.md", "lr 1.67e-03",
            "lr 1.76e-03", "tests/test_train_figures.py::test_the_recorded_run_is_this_programs"),
    Mistake("another number of parameters in the transcript", "docs/checkpoints.md", "3,280,128 parameters",
            "3,208,128 parameters", "tests/test_train_figures.py::test_the_recorded_run_is_this_programs"),
    Mistake("an error of `verify --all` changed by hand", "docs/accuracy.md", "1.73   1.73     1.17   1.96",
            "1.73   1.73     1.71   1.96",
            "tests/test_docs.py::test_the_layers_that_verify_shows_are_those_of_the_accuracy_table"),
    Mistake("a hash of the docs changed by hand", "docs/same_bits.md", "3f5d9fb64688b873", "3f5d9fb64688b837",
            "tests/test_docs.py::test_its_outputs[same_bits]"),
    Mistake("a loss of the docs changed by hand", "docs/checkpoints.md", "loss 4.234821 nats", "loss 4.634821 nats",
            "tests/test_docs.py::test_its_outputs[checkpoints]"),
]


def apply(tree, mistake):
    """Plant a mistake; returns the file and its text as it was."""
    path = Path(tree) / mistake.file
    text = path.read_text(encoding="utf-8")
    was, now = mistake.edit(text)
    assert text.count(was) == 1, f"{mistake.name}: found {text.count(was)} times, expected once: {was}"
    path.write_text(text.replace(was, now), encoding="utf-8")
    return path, text


def run_tests(tree, mistake):
    """Run the tests of a mistake; returns the exit status and what was printed."""
    beside = Path(sys.prefix) / "bin" / "mpirun"
    command = [str(beside) if beside.exists() else "mpirun", "-n", str(mistake.ranks), sys.executable, "-m", "pytest",
               "-q", "-x", "--color=no", *mistake.test.split()]
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree}/tests/support", "OMP_NUM_THREADS": "1",
                   "MPIEXEC_TIMEOUT": "900", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, text=True, capture_output=True, timeout=1000)
    return done.returncode, done.stdout + done.stderr


def verdict(tree, mistake):
    """Return what became of a mistake, in words, and its seconds; "caught by TEST" is the good one."""
    began = time.monotonic()
    path, text = apply(tree, mistake)
    try:
        status, said = run_tests(tree, mistake)
    finally:
        path.write_text(text, encoding="utf-8")
    failed = [line[7:].split(" - ")[0] for line in said.splitlines() if line.startswith("FAILED ")]
    if status == 0:
        found = "NOT NOTICED"
    elif failed:
        found = f"caught by {failed[0].removeprefix('tests/')}"
    else:
        found = f"no test ran: {said.strip().splitlines()[-1] if said.strip() else status}"
    return found, time.monotonic() - began


def copy_of(root, folder):
    """A copy of the tree to plant in."""
    tree = Path(folder) / "tree"
    shutil.copytree(root, tree, symlinks=True, ignore=shutil.ignore_patterns(
        ".git", "build", "__pycache__", ".venv*", "*.egg-info", ".mypy_cache", ".ruff_cache"))
    return tree


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="WORD", help="of the names of those to plant (all)")
    parser.add_argument("--list", action="store_true", help="say what is planted where, and plant nothing")
    arguments = parser.parse_args(words)
    chosen = [mistake for mistake in MISTAKES
              if not arguments.names or any(word in mistake.name for word in arguments.names)]
    if arguments.list:
        for mistake in chosen:
            was, now = mistake.edit((ROOT / mistake.file).read_text(encoding="utf-8"))
            print(f"{mistake.name}\n    {mistake.file}: {was}\n    -> {now}\n    {mistake.test}")
        return 0
    missed, failing = 0, {}
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(ROOT, folder)
        for mistake in chosen:
            if (mistake.test, mistake.ranks) not in failing:            # without it they must pass, or they say nothing
                status, said = run_tests(tree, mistake)
                failing[mistake.test, mistake.ranks] = said[-2000:] if status else ""
            if failing[mistake.test, mistake.ranks]:
                found, seconds = f"{mistake.test} fails without it:\n{failing[mistake.test, mistake.ranks]}", 0.0
            else:
                found, seconds = verdict(tree, mistake)
            missed += not found.startswith("caught by")
            print(f"{mistake.name:55s} {seconds:5.0f} s  {found}", flush=True)
    print(f"{len(chosen)} planted, {len(chosen) - missed} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
