"""Is what save_model writes what it read, to transformers? Every tiny checkpoint is loaded, saved twice, and compared.

The first copy has the config.json that was loaded, the second the one that the family's table writes. Two commands, as
PyTorch and MPI need not be in one environment; any number of ranks:

    mpirun -n 2 python tests/support/check_saved_models.py save DIR
    python tests/support/check_saved_models.py compare DIR

What it printed is in docs/families.md.
"""
import json
import sys
import warnings
from pathlib import Path

import numpy as np

import make_tiny_checkpoints as tiny

COPIES = ("loaded", "saved", "written")


def save(folder):
    """Write each case, load it, and save it: as it is, and with a config.json out of the table."""
    import mpitp
    from mpitp.checkpoints.families import config_json, family_named
    warnings.simplefilter("ignore")
    with mpitp.TensorParallelGroup() as group:
        for case in tiny.CASES:
            loaded, saved, written = (folder / case / copy for copy in COPIES)
            group.on_root(lambda: tiny.write(loaded, tiny.load(case)))
            model = mpitp.load_model(loaded, group)
            for copy in saved, written:
                mpitp.save_model(model, copy)
            family = model.folder.family
            keys = config_json(model.config, family_named(family.saved_as or family.model_type))
            group.on_root(lambda: (written / "config.json").write_text(json.dumps(keys)))


def compare(folder):
    """Print how far the logits of the copies are apart, which is nothing."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    transformers.logging.set_verbosity_error()
    good = True
    for case in tiny.CASES:
        ids = torch.tensor([tiny.load(case)["ids"]])
        logits = []
        for copy in COPIES:
            model = AutoModelForCausalLM.from_pretrained(folder / case / copy, attn_implementation="eager").eval()
            with torch.no_grad():
                logits.append(model(ids).logits[0].numpy())
        differences = [float(np.abs(found - logits[0]).max()) for found in logits[1:]]
        good &= differences[0] == 0 and differences[1] <= 1e-6 * float(np.abs(logits[0]).max())
        print(f"{case:24s} saved {differences[0]:.1e}  with a config.json of the table {differences[1]:.1e}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: {'equal' if good else 'DIFFERENT'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit({"save": save, "compare": compare}[sys.argv[1]](Path(sys.argv[2])))
