"""The judge: right runs are right, wrong ones are found where they first go wrong, and known mistakes named."""
import json
import subprocess
import sys

import numpy as np
import pytest

from judge_host import BF16, Host
from mpitp import DecoderConfig, oracle
from mpitp.court.dump import read_dump
from mpitp.court.mistakes import MISTAKES
from mpitp.court.report import LOOK, WIDTH, lines
from mpitp.court.verdict import judge
from mpitp.sharding.decoder_specs import decoder_specs
from spmd import ROOT, job_environment

DTYPES = ["float64", "float32", pytest.param("bfloat16", marks=pytest.mark.skipif(BF16 is None, reason="no ml_dtypes"))]
HEADS = {"hidden_size": 12, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 4}

LAYERS = {          # kind, config, options, method of Host, its arguments
    "mlp": ("mlp", {"activation": "relu"}, {}, "mlp", (11, 37), {}),
    "gated": ("mlp", {"activation": "silu"}, {}, "mlp", (11, 37), {"gated": True, "activation": "silu"}),
    "even": ("mlp", {"activation": "silu"}, {}, "mlp", (11, 36), {"gated": True, "activation": "silu"}),
    "attention": ("attention", HEADS, {}, "attention", (12, 6, 2, 4), {}),
    "multi-head": ("attention", {"hidden_size": 15, "num_attention_heads": 5, "kv_channels": 4}, {}, "attention",
                   (15, 5, 5, 4), {"bias": False}),
    "norm": ("norm", {}, {}, "norm", (13,), {}),
    "RMS norm": ("norm", {"normalization": "rmsnorm"}, {}, "norm", (13,), {"rms": True}),
    "column": ("column_linear", {}, {}, "column_linear", (13, 17), {}),
    "embedding": ("embedding", {}, {}, "embedding", (37, 6), {}),
    "loss": ("loss", {}, {"label_smoothing": 0.1}, "loss", (37,), {}),
}


def verdict_of(folder, layer, ranks, dtype="float32", bug="", sequence_parallel=False, seed=0, **more):
    kind, config, options, method, sizes, how = LAYERS[layer]
    host = Host(folder, ranks, kind, config, dtype=dtype, bug=bug, options=options, seed=seed,
                sequence_parallel=sequence_parallel, **more)
    getattr(host, method)(*sizes, **how)
    return judge(read_dump(folder))


# --- right runs --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_no_false_alarm(tmp_path, ranks, dtype):
    """Odd sizes, uneven parts, tokens replicated and dealt."""
    for layer in LAYERS:
        for dealt in (False, True) if layer in ("mlp", "gated", "attention", "multi-head") else (False,):
            verdict = verdict_of(tmp_path / f"{layer}{dealt}", layer, ranks, dtype, sequence_parallel=dealt, seed=ranks)
            assert verdict.good, (layer, dealt, list(lines(verdict)))
            assert not verdict.explanations and verdict.first is None


def test_the_limits_are_not_close(tmp_path):
    """A right run stays well below its limits, so that another one does too."""
    for dtype in ("float64", "float32"):
        for layer in LAYERS:
            verdict = verdict_of(tmp_path / f"{layer}{dtype}", layer, 3, dtype)
            assert all(row.reading.excess < 0.5 for row in verdict.rows if row.reading), list(lines(verdict))


@pytest.mark.parametrize("parallel_residual, placement", [(False, "before"), (True, "before"), (False, "both"),
                                                          (False, "after_residual")])
@pytest.mark.parametrize("ranks", [1, 3])
def test_blocks_and_decoders(ranks, parallel_residual, placement):
    """Those of mpitp.oracle itself, gradients of shards on their ranks; then one wrong sum in them."""
    config = DecoderConfig(31, 16, 2, 4, num_query_groups=2, ffn_hidden_size=17, gated=True, activation="silu",
                           parallel_residual=parallel_residual, norm_placement=placement, qk_norm=True)
    draw = np.random.default_rng(0)
    w = {name: draw.standard_normal(spec.shape) * 0.4 for name, spec in decoder_specs(config).items()}
    ids, targets = draw.integers(0, 31, (2, 2, 5))
    logits, saved = oracle.decoder.forward(ids, w, config)
    loss, saved_loss = oracle.cross_entropy.forward(logits, targets)
    gradients = oracle.decoder.backward(oracle.cross_entropy.backward(saved_loss), saved)
    inputs = {"ids": [ids] * ranks, "targets": targets}
    assert oracle.check_layer("decoder", config, w, inputs, {"logits": logits, "loss": loss}, gradients).good
    with pytest.raises(AssertionError, match="first wrong tensor is logits"):
        oracle.check_layer("decoder", config, w, inputs, {"logits": 2 * logits, "loss": loss}, gradients)
    x, dy, w = draw.standard_normal((2, 5, 16)), draw.standard_normal((2, 5, 16)), oracle.linear.part(w, "layers.1")
    y, saved = oracle.block.forward(x, w, config, 1)
    dx, gradients = oracle.block.backward(dy, saved)
    inputs = {"x": [x] * ranks, "dy": dy}
    assert oracle.check_layer("block", config, w, inputs, {"y": y}, {"dx": dx, **gradients}, options={"layer": 1}).good


# --- wrong ones --------------------------------------------------------------------------------------------------

WRONG = [           # layer, bug, first wrong tensor, what the mistake's name or sentence has
    ("gated", "g missing", "y", "(g) is missing"), ("gated", "g twice", "y", "(g) is taken twice"),
    ("gated", "g mean", "y", "(g) is a mean"), ("gated", "f missing", "dx", "f's backward is missing"),
    ("gated", "f twice", "dx", "f's backward is taken twice"), ("gated", "f mean", "dx", "f's backward is a mean"),
    ("mlp", "bias P times", "y", "added on every rank"), ("mlp", "bias over P", "y", "divided by 3"),
    ("mlp", "bias missing", "y", "is not added"), ("mlp", "dy summed", "d down.bias", "in g's backward"),
    ("even", "shards swapped", "hidden", "in reverse order"), ("even", "rank 0's shard", "hidden", "rank 0's on every"),
    ("even", "shard offset by one", "hidden", "one too early"),
    ("gated", "gate and up swapped", "hidden", "gate and up are swapped"),
    ("attention", "kv missing", "d key.bias", "is not summed over the ranks that use it"),
    ("attention", "kv twice", "d key.bias", "summed twice"), ("attention", "kv mean", "d key.bias", "is a mean"),
    ("attention", "rotary twice", "y", "applied twice"), ("attention", "rotary interleaved", "y", "interleaved pairs"),
    ("attention", "scale of hidden", "y", "hidden_size"),
    ("multi-head", "scale of local heads", "y", "hidden_size over the heads of a rank"),
    ("norm", "norm missing", "d bias", "not summed over the ranks"), ("norm", "norm mean", "d bias", "averaged"),
    ("norm", "epsilon", "y", "epsilon is 0.001 in place of 1e-05"),
    ("embedding", "g missing", "y", "embedded tokens is missing"),
    ("embedding", "last id masked", "y", "last id of a rank's range"), ("loss", "log P", "loss", "log 3 too large"),
    ("loss", "last id masked", "loss", "last id of a rank's range"),
    ("loss", "smoothing local", "loss", "rank's own part of the vocabulary"),
]


@pytest.mark.parametrize("layer, bug, first, text", WRONG, ids=[f"{layer}: {bug}" for layer, bug, *_ in WRONG])
def test_known_mistakes_are_named(tmp_path, layer, bug, first, text):
    named(tmp_path, layer, bug, first, text, "float32")


@pytest.mark.parametrize("dtype", [DTYPES[0], DTYPES[2]])
def test_known_mistakes_are_named_in_other_dtypes(tmp_path, dtype):
    for number, (layer, bug, first, text) in enumerate(WRONG[::3]):
        named(tmp_path / str(number), layer, bug, first, text, dtype)


def named(folder, layer, bug, first, text, dtype):
    verdict = verdict_of(folder, layer, 3, dtype, bug)
    said = "\n".join(lines(verdict))
    assert not verdict.good and verdict.explanations and verdict.first.title == first, said
    assert text in verdict.explanations[0].text, said


def test_bias_gradient_under_sequence_parallelism(tmp_path):
    verdict = verdict_of(tmp_path, "mlp", 2, bug="bias gradient missing", sequence_parallel=True)
    assert verdict.first.title == "d down.bias" and "is not summed" in verdict.explanations[0].text


def test_a_mistake_that_nobody_made_before_is_not_named(tmp_path):
    """Rounds of random numbers on one tensor: found, at the right place, without a name."""
    draw = np.random.default_rng(5).standard_normal
    x, dy, w = draw((6, 5)), draw((6, 7)), draw((7, 5))
    with pytest.raises(AssertionError, match="Not a mistake that I know; first wrong at d weight"):
        oracle.check_layer("column_linear", {}, {"weight": w}, {"x": x, "dy": dy}, {"y": x @ w.T},
                           {"weight": dy.T @ x + 0.01 * draw((7, 5)), "dx": dy @ w})


def test_the_first_wrong_tensor_is_first_in_the_order_of_computation(tmp_path):
    """Of y and everything behind it, y; though dx was recorded first and is farther off."""
    draw = np.random.default_rng(5).standard_normal
    x, dy, w = draw((6, 5)), draw((6, 7)), draw((7, 5))
    with pytest.raises(AssertionError, match="first wrong tensor is y.*wrong after it: d weight, dx"):
        oracle.check_layer("column_linear", {}, {"weight": w}, {"x": x, "dy": dy}, {"y": x @ w.T + 1e-9},
                           {"dx": 7 * draw((6, 5)), "weight": draw((7, 5))})


def slices(tmp_path, local, whole=None, axis=0, **others):
    """The verdict on slices of "weight" alone, beside a right y."""
    draw = np.random.default_rng(5).standard_normal
    whole = draw((8, 8)) if whole is None else whole
    x = draw((3, 8))
    for rank in (0, 1):
        recorder = oracle.Recorder(tmp_path, rank, 2, "column_linear")
        recorder.reference("weight", whole)
        recorder.weight("weight", local(whole)[rank], axis=axis)
        recorder.forward("x", x)
        recorder.forward("y", x @ whole[4 * rank:4 * rank + 4].T, axis=1)
        recorder.save()
    return judge(read_dump(tmp_path))


@pytest.mark.parametrize("local, text", [
    (lambda w: (w[4:], w[:4]), "rank 0's slice of weight is rank 1's"),
    (lambda w: (w[:4], w[:4]), "rank 1's slice of weight is rank 0's"),
    (lambda w: (w[:4], w[3:7]), "has rows 3 to 6, expected 4 to 7: offset by -1"),
    (lambda w: (w[0::2], w[1::2]), "(every second one)"), (lambda w: (w.T[:4], w.T[4:]), "transposed weight"),
    (lambda w: (w[:4], 0 * w[4:]), "is 0 everywhere"), (lambda w: (w[:4], w[4:] + 1), "nowhere in the whole weights")])
def test_slices_of_the_wrong_place(tmp_path, local, text):
    verdict = slices(tmp_path, local)
    assert verdict.first.title == "weight" and text in verdict.explanations[0].text, list(lines(verdict))


def test_slices_of_the_right_place(tmp_path):
    assert slices(tmp_path, lambda w: (w[:4], w[4:])).good


@pytest.mark.parametrize("masks, split, text", [
    ("same", True, "the same dropout mask on the shards"), ("other", False, "differs between ranks"),
    ("other", True, ""), ("same", False, "")])
def test_dropout_masks(tmp_path, masks, split, text):
    """Shards have masks of their own, replicas the same one."""
    draw = np.random.default_rng(3)
    x, w = draw.standard_normal((2, 6, 4)), {"norm": np.ones(4)}
    found = [np.where(draw.random((2, 6, 4)) < 0.5, 0, 2.0) for _ in range(2)]
    found = [found[0]] * 2 if masks == "same" else found
    y, _ = oracle.norm.forward(x, {"weight": w["norm"]}, "rmsnorm")
    for rank in (0, 1):
        recorder = oracle.Recorder(tmp_path, rank, 2, "norm", {"normalization": "rmsnorm"})
        recorder.reference("weight", w["norm"])
        recorder.forward("x", x)
        recorder.forward("y", y)
        recorder.forward("hidden.dropout", found[rank], axis=2 if split else None)
        recorder.save()
    verdict = judge(read_dump(tmp_path))
    assert verdict.good == (text == "")
    if text:
        assert text in verdict.explanations[0].text and verdict.first.name == "hidden.dropout"


def test_replicas_of_an_input_differ(tmp_path):
    draw = np.random.default_rng(3).standard_normal
    x, w = draw((4, 3)), draw((2, 3))
    with pytest.raises(AssertionError, match="rank 1 has another one than rank 0"):
        oracle.check_layer("column_linear", {}, {"weight": w}, {"x": [x, x + 1e-9]}, {"y": x @ w.T}, {})


def test_rounding_is_rounding():
    """A sum in another order, and replicas that differ by it: right, with a note."""
    draw = np.random.default_rng(3).standard_normal
    x, w = draw((40, 300), dtype=np.float32), draw((20, 300), dtype=np.float32)
    y = x @ w.T
    again = np.float32(x[:, ::-1]) @ w[:, ::-1].T
    verdict = oracle.check_layer("column_linear", {}, {"weight": w}, {"x": [x, x]}, {"y": [y, again]}, {})
    assert verdict.good and (np.array_equal(y, again) or "replicas drift" in verdict.notes[0])


def test_accumulation_in_16_bits():
    """float32 numbers that were added up, or stored, as bfloat16."""
    draw = np.random.default_rng(3).standard_normal
    x, w = draw((40, 300), dtype=np.float32), draw((20, 300), dtype=np.float32)
    short = ((x @ w.T).view(np.uint32) & 0xffff0000).view(np.float32)
    with pytest.raises(AssertionError, match="bfloat16 where float32 is claimed"):
        oracle.check_layer("column_linear", {}, {"weight": w}, {"x": x}, {"y": short}, {})
    total = np.zeros((40, 20), np.float16)
    for i in range(300):
        total = total + np.float16(np.float16(x[:, i:i + 1]) * np.float16(w[:, i]))
    with pytest.raises(AssertionError, match="float16"):
        oracle.check_layer("column_linear", {}, {"weight": w}, {"x": x}, {"y": np.float32(total)}, {})


def test_stale_gradients(tmp_path):
    draw = np.random.default_rng(3).standard_normal
    x, dy, w, old = draw((4, 3)), draw((4, 2)), draw((2, 3)), draw((2, 3))
    for name, found in (("stale", old), ("not cleared", dy.T @ x + old)):
        recorder = oracle.Recorder(tmp_path / name, 0, 1, "column_linear")
        recorder.reference("weight", w)
        recorder.forward("x", x)
        recorder.backward("dy", dy)
        recorder.backward("weight", found)
        recorder.record("previous", "weight", old)
        recorder.save()
        assert name in judge(read_dump(tmp_path / name)).explanations[0].name


def test_gradient_norm(tmp_path):
    """What every rank has counts once."""
    draw = np.random.default_rng(3).standard_normal
    split, whole = draw((8, 3)), draw(5)
    right = np.sqrt((split ** 2).sum() + (whole ** 2).sum())
    wrong = np.sqrt((split ** 2).sum() + 2 * (whole ** 2).sum())
    for norm, text in ((right, ""), (wrong, "counts what every rank has 2 times")):
        gradients = {"up.weight": [split[:4], split[4:]], "norm.weight": [whole, whole]}
        arguments = ("gradient_norm", {}, {}, {}, {"norm": [norm, norm]}, gradients)
        if not text:
            assert oracle.check_layer(*arguments, layouts={"up.weight": 0}).good
        else:
            with pytest.raises(AssertionError, match=text):
                oracle.check_layer(*arguments, layouts={"up.weight": 0})


def test_data_parallel_gradients():
    """Whole weights and each rank's own tokens: gradients are sums over the ranks."""
    draw = np.random.default_rng(0).standard_normal
    x, dy, w = draw((4, 3, 6)), draw((4, 3, 6)), {"up.weight": draw((9, 6)), "down.weight": draw((6, 9))}
    runs = []
    for mine in (slice(0, 2), slice(2, 4)):
        y, saved = oracle.feed_forward.forward(x[mine], w, "relu")
        runs.append((y, *oracle.feed_forward.backward(dy[mine], saved)))
    total = {name: sum(gradients[name] for _, _, gradients in runs) for name in w}
    own = {name: [gradients[name] for _, _, gradients in runs] for name in w}
    for gradients, text in (({name: [g, g] for name, g in total.items()}, ""), (own, "gradients are not summed"),
                            ({name: [g / 2, g / 2] for name, g in total.items()}, "averaged over the ranks"),
                            ({**total, "up.weight": own["up.weight"]}, "gradient of up.weight is not summed")):
        arguments = ("mlp", {"activation": "relu"}, w, {"x": [x[:2], x[2:]], "dy": [dy[:2], dy[2:]]},
                     {"y": [y for y, _, _ in runs]}, {"dx": [dx for _, dx, _ in runs], **gradients})
        layouts = dict.fromkeys(("x", "dy", "y", "dx"), 0)
        if not text:
            assert oracle.check_layer(*arguments, layouts=layouts).good
        else:
            with pytest.raises(AssertionError, match=text):
                oracle.check_layer(*arguments, layouts=layouts)


def test_valid_tokens_averaged_per_rank():
    """Tokens dealt over the ranks, one of them with fewer that count."""
    draw = np.random.default_rng(3)
    logits, targets = draw.standard_normal((4, 6, 9)), draw.integers(0, 9, (4, 6))
    targets[0, :4] = -100
    loss = float(oracle.cross_entropy.forward(logits, targets)[0])
    own = [float(oracle.cross_entropy.forward(logits[a:a + 2], targets[a:a + 2])[0]) for a in (0, 2)]
    dealt = {"logits": [logits[:2], logits[2:]], "targets": [targets[:2], targets[2:]]}
    layouts = {"logits": 0, "targets": 0}
    assert oracle.check_layer("loss", {}, {}, dealt, {"loss": [loss, loss]}, {}, layouts=layouts).good
    with pytest.raises(AssertionError, match="averages over its own valid tokens, and the ranks' means are averaged"):
        oracle.check_layer("loss", {}, {}, dealt, {"loss": [np.mean(own)] * 2}, {}, layouts=layouts)


def test_every_known_mistake_says_where_to_look():
    for mistake in MISTAKES:
        assert any(mistake.name.startswith(start) for start, _ in LOOK), mistake.name


# --- the command -------------------------------------------------------------------------------------------------

@pytest.mark.launcher
def test_the_command(tmp_path):
    """Three lines, then the table; exit status 0, 1 and 2; where mpi4py cannot be imported."""
    for name, bug in (("right", ""), ("wrong", "f missing")):
        Host(tmp_path / name, 2, "mlp", {"activation": "relu"}, bug=bug).mlp(11, 37)
    program = "import sys; sys.modules['mpi4py'] = None; sys.argv[0] = 'mpitp'; " \
              "from mpitp.__main__ import main; sys.exit(main())"
    for name, status, start in (("right", 0, "RIGHT: "), ("wrong", 1, "WRONG: "), ("missing", 2, "")):
        done = subprocess.run([sys.executable, "-c", program, "judge", name, "--json", f"{name}.json"], cwd=tmp_path,
                              capture_output=True, text=True, timeout=300, env=job_environment(PYTHONPATH=str(ROOT)))
        assert done.returncode == status and done.stdout.startswith(start), done.stdout + done.stderr
        assert all(len(line) <= WIDTH for line in done.stdout.splitlines())
        if status < 2:
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert found["schema"] == "mpitp.judge/1" and found["good"] == (status == 0)
            assert done.stderr == "" and (status == 0 or found["first_wrong"]["name"] == "x")
        else:
            assert done.stderr.startswith("mpitp: missing: found no such folder") and done.stderr.count("\n") == 1


@pytest.mark.launcher
@pytest.mark.parametrize("options, status", [([], 0), (["--megatron"], 0), (["--megatron", "--forget-f"], 1)])
def test_a_torch_module_recorded_by_hooks(tmp_path, options, status):
    pytest.importorskip("torch")
    done = subprocess.run([sys.executable, ROOT / "examples" / "judge_torch.py", "--out", tmp_path / "dump", *options],
                          capture_output=True, text=True, timeout=300, env=job_environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == status, done.stdout + done.stderr
    assert status == 0 or "f's backward is missing" in done.stdout


@pytest.mark.launcher
def test_the_example_of_a_test(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null",
                           ROOT / "examples" / "test_my_layer.py"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=300, env=job_environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
