"""Write tests/data/family_defaults.json: what transformers has for each family where config.json says nothing.

Needs transformers: python tests/support/make_family_defaults.py, on a machine that has it; the tests do not.
"""
import json
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mpitp.checkpoints.families import MODULES  # noqa: E402


def main():
    found = {}
    for model_type in MODULES:
        try:
            found[model_type] = transformers.AutoConfig.for_model(model_type).to_dict()
        except (KeyError, ValueError) as error:
            print(f"{model_type}: {error}", file=sys.stderr)
    path = ROOT / "tests" / "data" / "family_defaults.json"
    path.write_text(json.dumps({"transformers": transformers.__version__, "configs": found}, sort_keys=True,
                               separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
