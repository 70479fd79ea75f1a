"""Does transformers compute from an exported run what mpitp computes from its step folder? Logits, text, tokens.

A small run is trained and exported as every family that can have it. Two commands, as PyTorch and MPI need not be in
one environment; any number of ranks:

    mpirun -n 2 python tests/support/check_exported_runs.py make DIR
    python tests/support/check_exported_runs.py compare DIR

What it printed is in docs/checkpoints.md.
"""
import sys
from pathlib import Path

import numpy as np

TEXT = "import os, naïve: 日本\n"
NEW = 12


def make(folder):
    """Train, export, and keep what mpitp computes from the step folder."""
    import mpitp
    from mpitp.commands import export, run_command
    if run_command(["train", "--hidden-size", "40", "--num-layers", "3", "--num-attention-heads", "5",
                    "--num-query-groups", "1", "--seq-length", "64", "--train-iters", "60", "--out", f"{folder}/run"]):
        raise SystemExit("the run ended early")
    with mpitp.TensorParallelGroup() as group:
        model = mpitp.load_model(f"{folder}/run/step-00000060", group)
        ids = list(TEXT.encode())
        logits = model.gather_logits(model.forward(np.array([ids]), save=False)[0])[0]
        new = [int(tokens[0]) for tokens in mpitp.generate(model, [ids], max_new_tokens=NEW)]
        if group.rank == 0:
            np.savez(folder / "expected.npz", logits=logits, new=new)
        families = export.that_can_say(model.config)
    for family in families:
        run_command(["export", f"{folder}/run", f"{folder}/{family}", "--family", family])


def compare(folder):
    """Print how far the logits are apart, which is rounding, and whether text and tokens are the same."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    transformers.logging.set_verbosity_error()
    expected, good = np.load(folder / "expected.npz"), True
    for exported in sorted(path.parent for path in folder.glob("*/config.json")):
        model = AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(exported)
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0].numpy()
        new = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1]:].tolist()
        error = float(np.abs(logits - expected["logits"]).max() / np.abs(expected["logits"]).max())
        same = ids[0].tolist() == list(TEXT.encode()) and tokenizer.decode(ids[0]) == TEXT
        same_text = new == expected["new"].tolist()
        good &= error <= 1e-5 and same and same_text and logits.dtype == np.float32
        print(f"{exported.name:12s} logits {error:.1e}  tokens {'equal' if same else 'DIFFERENT'}  greedy text "
              f"{'equal' if same_text else 'DIFFERENT'}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {'good' if good else 'DIFFERENT'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit({"make": make, "compare": compare}[sys.argv[1]](Path(sys.argv[2])))
