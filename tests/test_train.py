"""Training over ranks against a dense run in float64: figures, weights and optimizer state, data."""
import json
import math
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import mpitp
from check_decoder import dense_weights
from decoder_cases import KINDS, config
from dense_training import dense_steps, mean_loss
from mpitp.training import loop, optimizer
from mpitp.training.data import Tokens, look_like_words, order_2_bits
from mpitp.training.loop import Settings, Trainer, TrainingStopped
from mpitp.training.resume import resume
from spmd import ROOT, draw, everywhere

TEXT = bytes((7 * i * i + i // 3) % 27 for i in range(900))
SETTINGS = dict(micro_batch_size=2, gradient_accumulation=2, train_iters=6, lr=0.05, min_lr=0.01, warmup=2,
                clip_grad=0.5, weight_decay=0.3, label_smoothing=0.1, z_loss=0.02, seed=4, eval_batches=2)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    return tmp_path / "text"


def trainer(group, text, kind="llama, one kv head", dtype="float64", folder=None, **more):
    settings = Settings(**{**SETTINGS, **more})
    configuration = replace(config(kind), hidden_dropout=0.1, attention_dropout=0.2)
    tokens = Tokens(text, configuration.vocab_size, 7, settings.seed)
    made = Trainer(group, configuration, tokens, settings, dtype=dtype, folder=folder)
    weights = dense_weights(made.model.specs)
    made.model.load_dense(weights)
    return made, weights


def problems(group, text, kind="llama, one kv head", steps=3):
    """Names of figures, weights and state that differ from the dense run after some steps, with dropout."""
    made, weights = trainer(group, text, kind)
    *expected, figures = dense_steps(made, weights, steps)
    wrong = []
    for step in range(steps):
        found = made.train_step()
        wrong += [f"step {step} {name}" for name, exact in figures[step].items()
                  if found[name] != pytest.approx(exact, rel=1e-9)]
    windows = 4 if group.reproducible else 2        # of a global batch there, whatever a micro-batch is
    batches = made.tokens.validation_batches(windows, made.settings.eval_batches)
    validation = mean_loss(expected[0], made.config, batches)
    wrong += ["validation"] if made.validate() != pytest.approx(validation, rel=1e-9) else []
    found = (made.model.weights, made.optimizer.exp_avg, made.optimizer.exp_avg_sq)
    for what, local, exact in zip(("weight", "exp_avg", "exp_avg_sq"), found, expected):
        for name, array in group.comm.bcast(made.model.gather(local)).items():
            if name.endswith("key.bias"):           # its gradient is 0 but for rounding, which Adam makes large
                continue
            if not np.abs(array - exact[name]).max() <= 1e-8 * max(1e-3, np.abs(exact[name]).max()):
                wrong.append(f"{what} {name}")
    return wrong


@pytest.mark.parametrize("kind", ["llama, one kv head", "gpt2", "gemma3", "neox with query norm"])
def test_weights_and_state_against_dense(group, text, kind):
    assert problems(group, text, kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_norm(group, kind):
    """Each parameter once, shared heads and replicated ones too. One all-reduce of one number."""
    model = mpitp.Decoder(group, config(kind), dtype="float64", seed=None)
    whole = dense_weights(model.specs, seed=5)
    model.load_dense(whole)
    group.ledger.clear()
    norm = optimizer.gradient_norm(model, model.weights)
    assert norm == pytest.approx(math.sqrt(sum((g * g).sum() for g in whole.values())), rel=1e-13)
    assert {key.elements: calls for key, calls in group.ledger.counts().items()} == {1: 1}
    group.ledger.clear()


# --- planted faults ---------------------------------------------------------------------------------------------

def seen(group, found, *names):
    assert everywhere(set(names) <= set(found)), found


def test_10_replicated_parameters_counted_once_a_rank(group, text, monkeypatch):
    if group.size == 1:
        pytest.skip("on one rank this is not a mistake")
    right = optimizer.gradient_norm

    def wrong(model, gradients):
        replicated = sum((g * g).sum() for name, g in gradients.items() if model.specs[name].axis is None)
        return math.sqrt(right(model, gradients) ** 2 + (group.size - 1) * replicated)
    monkeypatch.setattr(loop, "gradient_norm", wrong)
    seen(group, problems(group, text), "weight embedding.weight", "exp_avg layers.0.attention.query.weight")


def test_weight_decay_on_norms(group, text, monkeypatch):
    right = optimizer.AdamW.step

    def wrong(self, gradients, lr, t, scale=1.0):
        right(self, gradients, lr, t, scale)
        for name, spec in self.layer.specs.items():
            if not spec.decay:
                self.layer.weights[name] *= 1 - lr * self.weight_decay
    monkeypatch.setattr(optimizer.AdamW, "step", wrong)
    seen(group, problems(group, text), "weight final_norm.weight", "weight layers.0.mlp_norm.weight")


def test_learning_rate_off_by_one_step(group, text, monkeypatch):
    right = optimizer.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda step, *rest: right(step + 1, *rest))
    seen(group, problems(group, text), "weight embedding.weight", "weight head.weight")


def test_bias_correction_off_by_one_step(group, text, monkeypatch):
    right = optimizer.AdamW.step
    monkeypatch.setattr(optimizer.AdamW, "step", lambda self, g, lr, t, scale=1.0: right(self, g, lr, t + 1, scale))
    seen(group, problems(group, text), "weight embedding.weight")


# --- what ends a run -----------------------------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite(group, text):
    made, _ = trainer(group, text)
    made.train_step()
    name, last = "layers.1.mlp.up.weight", group.size - 1
    if group.rank == last:
        made.model.weights[name][0, 0] = np.nan
    before = [w.tobytes() for w in made.model.weights.values()]
    with pytest.raises(TrainingStopped) as caught:
        made.train_step()
    said = str(caught.value)
    assert everywhere("step 2: found loss nan" in said and "gradients are not finite" in said), said
    assert "\n" not in said
    assert [w.tobytes() for w in made.model.weights.values()] == before and made.step == 1


def test_a_copy_of_a_gradient_that_differs(group, text):
    """On one rank alone: all see the same norm and stop at the same step; no rank waits for another."""
    for wrong in (np.nan, 50.0):
        made, _ = trainer(group, text, check_interval=1)
        right = made.sum_gradients

        def planted():
            loss = right()
            if made.step == 1 and group.rank == group.size - 1:
                made.gradients["final_norm.weight"][0] = wrong
            return loss
        made.sum_gradients = planted
        norms = []
        with pytest.raises(TrainingStopped):
            while made.step < 4:
                norms.append(made.train_step()["gradient_norm"])
                made.require_equal_copies()
            raise TrainingStopped("one rank has no other copies")
        assert len(set(map(str, group.comm.allgather((norms, made.step))))) == 1


def test_copies_that_differ(group, text):
    if group.size == 1:
        pytest.skip("one rank has no copies")
    for name in ("final_norm.weight", "layers.0.attention.key.weight"):
        made, _ = trainer(group, text)
        made.require_equal_copies()
        if group.rank == 1 and made.model.weights[name].size:
            made.model.weights[name].flat[0] += 1e-9
        with pytest.raises(TrainingStopped, match=name):
            made.require_equal_copies()


# --- data ------------------------------------------------------------------------------------------------------------

def test_windows(text):
    tokens = Tokens(text, 27, 7, seed=1)
    ids, targets = tokens.batch(3, 5)
    assert ids.shape == targets.shape == (5, 7) and (ids[:, 1:] == targets[:, :-1]).all()
    again = np.concatenate([Tokens(text, 27, 7, seed=1).batch(n, 1)[0] for n in range(15, 20)])
    assert (again == ids).all()                                 # addressed: any batch alone
    assert (tokens.batch(4, 5)[0] != ids).any() and (Tokens(text, 27, 7, seed=2).batch(3, 5)[0] != ids).any()
    held_out = [batch[0] for batch in tokens.validation_batches(2, 3)]
    assert sum(map(len, held_out)) == 6
    assert all((a == b[0]).all() for a, b in zip(held_out, tokens.validation_batches(2, 3)))
    assert len(tokens.training) + len(tokens.validation) == 900 and len(tokens.validation) == 45


@pytest.mark.parametrize("content, said", [
    (b"short", "found 5 tokens, expected at least 16"),
    (bytes(20) + b"\x1b", "found token 27 at position 20, expected 0 to 26"),
])
def test_data_that_does_not_fit(tmp_path, content, said):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(mpitp.InputError) as caught:
        Tokens(tmp_path / "text", 27, 7, 0)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["ids.npy", "ids.bin", "text"])
def test_a_file_that_fails_or_shrinks_while_it_trains(tmp_path, monkeypatch, name):
    """One line that names it; a memory map would end the process by SIGBUS."""
    path, dtype = tmp_path / name, None if name == "ids.npy" else "uint16" if name == "ids.bin" else "uint8"
    ids = np.arange(30_000, dtype=dtype or "u2") % 101
    np.save(path, ids) if name == "ids.npy" else path.write_bytes(ids.tobytes())
    tokens = Tokens(path, 101, 16, 0, dtype)
    before, _ = tokens.batch(0, 4)
    assert tokens.fingerprint().startswith("30000 tokens") and (before[:, 1:] == (before[:, :-1] + 1) % 101).all()
    with monkeypatch.context() as failing:
        failing.setattr("os.preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(mpitp.InputError, match=f"{name}: found Input/output error at byte"):
            tokens.batch(1, 4)
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(mpitp.InputError, match=f"{name}: found 200 bytes, expected more than"):
        tokens.batch(2, 40)


def test_what_is_no_file_of_tokens(tmp_path):
    """A pipe would be waited for, and read only once; an archive has no one axis."""
    os.mkfifo(tmp_path / "pipe")
    np.savez(tmp_path / "x.npz", ids=np.arange(9))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    for name, said in (("pipe", "found a pipe"), ("x.npy", "found an archive of arrays")):
        with pytest.raises(mpitp.InputError, match=said):
            Tokens(tmp_path / name, 101, 16, 0)


def test_token_ids(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(3000, dtype=np.uint16) % 1001)
    assert Tokens(tmp_path / "ids.npy", 1001, 16, 0).batch(0, 2)[0].max() < 1001
    np.save(tmp_path / "wrong.npy", np.ones((3, 4)))
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, said in (("wrong.npy", "float64 of shape (3, 4)"), ("empty.npy", "expected a .npy file"),
                       ("gone", "No such file"), ("", "Is a directory")):
        with pytest.raises(mpitp.InputError) as caught:
            Tokens(tmp_path / name, 1001, 2, 0)
        assert said in str(caught.value)


def test_order_2_by_hand():
    """abab...: after two letters the next is sure, but for the smoothing."""
    text = np.tile(np.array([0, 1], np.uint8), 500)
    assert order_2_bits(text, text[:100], 2) == pytest.approx(0, abs=1e-3)
    coin = (draw(0, 40_000) > 0).astype(np.uint8)
    assert order_2_bits(coin[:30_000], coin[30_000:], 2) == pytest.approx(1, abs=0.01)


def test_order_2_counts_every_token_behind_a_pair():
    """Token by token, by the definition."""
    text = np.array([i * i % 7 % 3 for i in range(60)], np.uint8)
    training, validation, V = text[:40].tolist(), text[33:].tolist(), 3
    triples = list(zip(training, training[1:], training[2:]))
    three, pair = Counter(triples), Counter((a, b) for a, b, _ in triples)
    two, first, one = Counter((b, c) for _, b, c in triples), Counter(b for _, b, _ in triples), Counter(
        c for *_, c in triples)
    best = math.inf
    for alpha in (0.1, 0.3, 1, 3, 10, 30, 100):
        bits = []
        for x, y, z in zip(validation, validation[1:], validation[2:]):
            p = (one[z] + 1) / (len(triples) + V)
            p = (two[y, z] + alpha * p) / (first[y] + alpha)
            bits.append(-math.log2((three[x, y, z] + alpha * p) / (pair[x, y] + alpha)))
        best = min(best, sum(bits) / len(bits))
    assert order_2_bits(np.array(training, np.uint8), np.array(validation, np.uint8), V) == pytest.approx(best)


@pytest.mark.parametrize("beta1, beta2", [(1.0, 0.9), (0.9, 1.5), (-0.1, 0.9), (0.9, float("nan"))])
def test_betas_that_are_no_averages(beta1, beta2):
    with pytest.raises(mpitp.InputError, match="expected a number from 0 to below 1"):
        optimizer.AdamW(None, beta1, beta2, 1e-8, 0.0)


def test_schedule():
    rates = [optimizer.learning_rate(step, 1.0, 0.1, 4, 10) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[9] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:]))


def test_against_torch():
    """Five steps of torch.optim.AdamW, whose values and version lie in golden_adamw.json."""
    golden = json.loads((ROOT / "tests" / "data" / "golden_adamw.json").read_text())
    spec = mpitp.ParameterSpec("w", (5,), None)

    class Layer:
        specs, weights = {"w": spec}, {"w": np.array(golden["start"])}
    moved = optimizer.AdamW(Layer, *golden["betas"], golden["eps"], golden["weight_decay"])
    for t, step in enumerate(golden["steps"], 1):
        moved.step({"w": np.array(step["gradient"])}, golden["lr"], t)
        for array, name in ((Layer.weights, "weight"), (moved.exp_avg, "exp_avg"), (moved.exp_avg_sq, "exp_avg_sq")):
            np.testing.assert_allclose(array["w"], step[name], rtol=1e-12, atol=1e-15)


# --- token files -----------------------------------------------------------------------------------------------------

IDS = (np.arange(3000) * 17 % 50257).astype(np.int64)


def llm_c(path, magic, version, dtype, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(IDS) if count is None else count
    path.write_bytes(header.tobytes() + IDS.astype(dtype).tobytes())


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_of_words_without_a_header(dtype, tmp_path):
    """As nanoGPT writes them."""
    (tmp_path / "train.bin").write_bytes(IDS.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    assert np.array_equal(Tokens(tmp_path / "train.bin", 50257, 16, 0, dtype).tokens, IDS)
    as_bytes = Tokens(tmp_path / "train.bin", 256, 16, 0).tokens
    assert len(as_bytes) == 3000 * np.dtype(dtype).itemsize
    (tmp_path / "odd.bin").write_bytes(b"abc" * 1001)
    with pytest.raises(mpitp.InputError, match="odd.bin: found 3003 bytes of tokens, expected a multiple of"):
        Tokens(tmp_path / "odd.bin", 50257, 16, 0, dtype)
    with pytest.raises(mpitp.InputError, match="data dtype 'float32', expected one of uint8, uint16, uint32"):
        Tokens(tmp_path / "odd.bin", 50257, 16, 0, "float32")


@pytest.mark.parametrize("magic, version, dtype", [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
def test_files_of_llm_c(magic, version, dtype, tmp_path):
    path = tmp_path / "train.bin"
    llm_c(path, magic, version, dtype)
    for said in (None, dtype):
        assert np.array_equal(Tokens(path, 50257, 16, 0, said).tokens, IDS)
    assert len(Tokens(path, 256, 16, 0, "uint8").tokens) == path.stat().st_size
    other = {"uint16": "uint32", "uint32": "uint16"}[dtype]
    with pytest.raises(mpitp.InputError, match=f"expected {dtype}, as the magic number {magic} says"):
        Tokens(path, 50257, 16, 0, other)
    llm_c(path, magic, version, dtype, count=3001)
    with pytest.raises(mpitp.InputError, match="found 3000 tokens behind the header, expected 3001, as it says"):
        Tokens(path, 50257, 16, 0)
    llm_c(path, magic, version + 1, dtype)                      # another version: bytes, as any file
    assert Tokens(path, 256, 16, 0).tokens.dtype == np.uint8


def zipf(count):
    """Ids as a tokenizer gives them: the probability of an id falls with its rank."""
    return np.minimum(np.random.default_rng(0).zipf(1.2, count), 50256).astype("<u2")


@pytest.mark.parametrize("content, expected", [
    (lambda: IDS.astype("<u2").view(np.uint8), True), (lambda: zipf(5000).view(np.uint8), True),
    (lambda: np.frombuffer("a text of an editor".encode("utf-16-le") * 50, np.uint8), True),
    (lambda: Tokens(None, 256, 16, 0).tokens, False), (lambda: draw(0, 5000).view(np.uint8)[::8].copy(), False),
    (lambda: np.frombuffer((ROOT / "LICENSE").read_bytes(), np.uint8), False),
    (lambda: np.frombuffer(b"1,2,0,4," * 200, np.uint8), False),            # a table
    (lambda: IDS.astype("<u2").view(np.uint8)[:500], False),    # too few to say
    (lambda: np.random.default_rng(1).integers(0, 50257, 3000).astype("<u2").view(np.uint8), True),
    *[(lambda n=n: np.random.default_rng(n).integers(0, 256, n).astype(np.uint8), False) for n in (512, 5000, 1 << 16)],
    (lambda: IDS.astype("<u2"), False),
])
def test_what_looks_like_words(content, expected):
    assert look_like_words(content()) == expected


def test_resuming_needs_a_folder(group, text):
    made, _ = trainer(group, text)
    with pytest.raises(mpitp.InputError, match="found no folder, expected the one to resume from"):
        resume(made)
