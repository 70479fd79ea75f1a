"""Step folders hold what was saved; damage is named, by checksum, digest or step, and a whole one is offered."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from decoder_cases import config
from groups import group_fixture
from mpitp import InputError
from mpitp.checkpoints import checksums, steps
from mpitp.sharding.parameters import ParameterSpec, Place
from mpitp.training.data import Tokens
from mpitp.training.loop import Trainer, TrainingStopped
from mpitp.training.resume import resume
from mpitp.training.settings import Settings
from mpitp.training.spikes import Spikes

TEXT = bytes((7 * i * i + i // 3) % 27 for i in range(900))
QUICK = dict(micro_batch_size=2, train_iters=6, lr=0.01, min_lr=0.001, warmup=1, save_interval=2, eval_batches=1)


group = group_fixture("reproducible", scope="module")


@pytest.fixture(scope="module")
def whole_run(group, tmp_path_factory):
    """A folder with step folders 2, 4 and 6 of a run of 6 steps."""
    folder = Path(group.comm.bcast(str(tmp_path_factory.mktemp("whole"))))
    on_one(group, (folder / "text").write_bytes, TEXT)
    on_one(group, (folder / "out").mkdir)
    trainer(group, folder).run()
    return folder


@pytest.fixture
def run(group, whole_run, tmp_path):
    """A copy of it."""
    folder = Path(group.comm.bcast(str(tmp_path / "run")))
    on_one(group, shutil.copytree, whole_run, folder)
    return folder


def trainer(group, folder, **more):
    settings = Settings(**{**QUICK, **more})
    configuration = config("llama, one kv head")
    return Trainer(group, configuration, Tokens(folder / "text", configuration.vocab_size, 7, settings.seed), settings,
                   folder=str(folder / "out"), say=lambda text: None)


def on_one(group, change, *arguments):
    """Change files on rank 0 alone."""
    if group.rank == 0:
        change(*arguments)
    group.comm.Barrier()


def flip(path, at, bit=0x10):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(bytes(content))


def swap(path):
    """Two tensors of one shape change places: only their names in the header do."""
    content = path.read_bytes()
    a, b = b'"layers.0.mlp.up.weight"', b'"layers.1.mlp.up.weight"'
    assert a in content and b in content
    between = b"'" * len(a)
    path.write_bytes(content.replace(a, between).replace(b, a).replace(between, b))


def edit(path, **changes):
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, **changes}))


def poison(group, folder, kind, value):
    """Save a step folder whose checksums are right and one number of which cannot have been an optimizer's."""
    made = trainer(group, folder, train_iters=8, lr_decay_iters=6)
    resume_from(made, 4)
    array = getattr(made.optimizer, kind)["layers.1.mlp.down.weight"]
    if group.rank == 0:
        array[0, 0] = value
    made.step = 6
    made.save()


def resume_from(made, step=None, **more):
    said = []
    made.say = said.append
    resume(made, step, **more)
    return said


DAMAGE = {
    "a flipped bit of a weight": (lambda f: flip(f / "model.safetensors", -1000), "found checksum"),
    "a flipped bit of a moment": (lambda f: flip(f / "optimizer.safetensors", -4, 0x80), "found checksum"),
    "swapped tensors": (lambda f: swap(f / "model.safetensors"), "layers.0.mlp.up.weight: found checksum"),
    "an edited step": (lambda f: edit(f / "state.json", step=5), "found step 5, expected 6, as the folder is named"),
    "an edited setting": (lambda f: edit(f / "state.json", seq_length=9), "do not fit their digest"),
    "no digest": (lambda f: edit(f / "state.json", digest=None), "do not fit their digest"),
    "another schema": (lambda f: edit(f / "state.json", schema="mpitp.checkpoint/9"), "found schema"),
    "a key twice": (lambda f: (f / "state.json").write_text('{"step": 1, "step": 6}'), "found 'step' twice"),
    "no state": (lambda f: os.unlink(f / "state.json"), "found No such file"),
    "a short file": (lambda f: os.truncate(f / "model.safetensors", 5000), "expected"),
    "a pipe": (lambda f: (os.unlink(f / "state.json"), os.mkfifo(f / "state.json")), "found a pipe"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_newest_whole_folder_offered(group, run, kind):
    damage, said = DAMAGE[kind]
    folder = run / "out"
    on_one(group, damage, folder / "step-00000006")
    on_one(group, flip, folder / "step-00000004" / "optimizer.safetensors", -40)
    made = trainer(group, run, train_iters=8, lr_decay_iters=6)
    with pytest.raises(InputError) as caught:
        resume(made)
    text = str(caught.value)
    assert said in text and "step-00000006" in text and "\n" not in text
    assert text.endswith(f"the newest folder that is whole: --resume-from {folder}/step-00000002")
    assert any("set aside step-00000004.set-aside-1, step-00000006.set-aside-1" in line
               for line in resume_from(trainer(group, run), 2)) or group.rank
    made = trainer(group, run)
    resume_from(made)                                       # the damaged ones are out of the way
    assert made.step == 2


def test_a_renamed_folder(group, run):
    on_one(group, os.rename, run / "out" / "step-00000006", run / "out" / "step-00000007")
    with pytest.raises(InputError, match="found step 6, expected 7, as the folder is named; .*step-00000004"):
        resume(trainer(group, run, train_iters=8, lr_decay_iters=6))


@pytest.mark.parametrize("kind, value, said", [
    ("exp_avg_sq", -1.0, "found -1.0, expected averages of squares"), ("exp_avg", np.nan, "found a NaN"),
    ("master", np.inf, "found a NaN or an infinity")])
def test_numbers_that_no_optimizer_writes(group, run, kind, value, said):
    poison(group, run, kind, value)
    with pytest.raises(InputError) as caught:
        resume(trainer(group, run, train_iters=8, lr_decay_iters=6))
    assert said in str(caught.value) and "layers.1.mlp.down.weight" in str(caught.value)
    assert "step-00000004" in str(caught.value)


def test_folders_without_checksums_resume(group, run, capfd):
    """As 0.1.0 and 0.2.0 wrote them, and before settings had all of today's keys."""
    def older(path):
        state = json.loads(path.read_text())
        del state["digest"], state["checksums"], state["settings"]["lr_decay_iters"], state["settings"]["z_loss"]
        del state["config"]["zero_centered_gamma"]
        path.write_text(json.dumps({**state, "schema": "mpitp.checkpoint/1"}))
    on_one(group, older, run / "out" / "step-00000004" / "state.json")
    made = trainer(group, run)
    resume_from(made, 4)
    assert made.step == 4
    said = capfd.readouterr().err
    assert group.rank or "found no checksums" in said and said.count("\n") == 1
    made.run()
    whole = trainer(group, run, seed=QUICK.get("seed", 0))
    whole.folder = None
    whole.run()
    for name, w in made.model.weights.items():
        assert np.array_equal(w, whole.model.weights[name]), name


@pytest.mark.parametrize("change, said", [
    (lambda w: w[:-1], r"layers.0.mlp.up.weight \('F32', \((\d+), (\d+)\)\), expected \('F32', "),
    (lambda w: w.T.copy(), "layers.0.mlp.up.weight "), (lambda w: w.astype("f8"), r"layers.0.mlp.up.weight \('F64', "),
    (lambda w: w.astype("f2"), r"layers.0.mlp.up.weight \('F16', "), (lambda w: w[None], "layers.0.mlp.up.weight ")])
def test_tensors_of_another_shape_or_dtype(group, run, change, said):
    """Also in a folder without checksums, which would find them later."""
    def without_checksums(path):
        state = json.loads(path.read_text())
        del state["digest"], state["checksums"]
        path.write_text(json.dumps({**state, "schema": "mpitp.checkpoint/1"}))

    def rewrite(path):
        from safetensors.numpy import load_file, save_file
        tensors = load_file(path)
        tensors["layers.0.mlp.up.weight"] = change(tensors["layers.0.mlp.up.weight"])
        save_file(tensors, path)
    folder = run / "out" / "step-00000004"
    on_one(group, without_checksums, folder / "state.json")
    on_one(group, rewrite, folder / "model.safetensors")
    made = trainer(group, run)
    with pytest.raises(InputError, match=f"found model.safetensors: {said}"):
        resume_from(made, 4)
    assert made.step == 0


def test_a_longer_run(group, run):
    """Allowed where no step that was taken would have had another learning rate; then the same as from the start."""
    with pytest.raises(InputError, match=r"train_iters = 6, expected 9: .*--lr-decay-iters 6 --lr-warmup-iters 1"):
        resume(trainer(group, run, train_iters=9))
    longer = trainer(group, run, train_iters=9, lr_decay_iters=6)
    said = resume_from(longer)
    assert group.rank or "train_iters 6 -> 9" in said[0]
    longer.run()
    whole = trainer(group, run, train_iters=9, lr_decay_iters=6)
    whole.folder = None
    whole.run()
    assert all(np.array_equal(w, whole.model.weights[name]) for name, w in longer.model.weights.items())


def test_auto(group, run):
    """One call serves a first start, a restart, and a run that is at its end."""
    at_end = trainer(group, run)
    assert not resume(at_end, auto=True) and at_end.step == 0
    on_one(group, os.rename, run / "out" / "step-00000006", run / "gone")
    later = trainer(group, run)
    assert resume(later, auto=True) and later.step == 4
    with pytest.raises(InputError, match="seed = 0, expected 1"):
        resume(trainer(group, run, seed=1), auto=True)
    group.comm.Barrier()
    on_one(group, os.rename, run / "out", run / "other")
    on_one(group, os.mkdir, run / "out")
    on_one(group, (run / "out" / "log.jsonl").write_text, '{"step": 1, "loss": 1.0}\n')
    first = trainer(group, run)
    assert resume(first, auto=True) and first.step == 0
    assert (run / "out" / "log.jsonl").read_text() == ""    # those steps are taken again


def test_spikes_of_a_log_whose_lines_are_not_whole():
    """Figures of a killed run may be missing: such a line counts for none of them."""
    spikes = Spikes(3.0)
    spikes.replay([{"loss": 2.0, "gradient_norm": 1.0}, {"loss": 5.0}, {"gradient_norm": 1},
                   {"loss": 3.0, "gradient_norm": 4.0}])
    assert {name: list(recent) for name, recent in spikes.recent.items()} == {"loss": [2.0, 3.0],
                                                                              "gradient_norm": [1.0, 4.0]}


def test_spikes_stop_before_a_save(group, run):
    made = trainer(group, run, train_iters=14, lr_decay_iters=6, spike_limit=3)
    resume(made)
    made.spikes.replay([{"loss": 1e-3, "gradient_norm": 1e9} for _ in range(40)])
    with pytest.raises(TrainingStopped, match="step 7: found loss .* at most 3 times the 0.001 of the last 32"):
        made.run()
    assert steps.steps(str(run / "out")) == [2, 4, 6]
    assert Spikes(0).find({"loss": 1e30, "gradient_norm": 1e30}) == ""


# --- checksums -------------------------------------------------------------------------------------------------

def plain(array):
    """The formula, in Python's integers."""
    words = np.ascontiguousarray(array).reshape(-1).view("<u4").tolist()
    return sum((2 * i + 1) * word for i, word in enumerate(words)) % 2 ** 64


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5000,), (7, 3), (3, 2500), (70, 1024), (0, 4)])
def test_windows_add_up_to_the_formula(shape, dtype):
    array = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    array.reshape(-1)[:1] = np.nan
    shape = shape or (1,)
    array = array.reshape(shape)
    for axis in range(len(shape)):
        for parts in (1, 2, 3):
            spec = ParameterSpec("w", shape, axis)
            total = np.zeros(1, np.uint64)
            for rank in range(parts):
                window = spec.window(Place(rank, parts, parts))
                total += checksums.window_sum(array[window], window, shape)
            assert int(total[0]) == plain(array)


def test_every_bit_and_every_exchange_is_seen():
    array = np.random.default_rng(2).standard_normal((40, 30)).astype("f")
    whole = tuple(slice(0, n) for n in array.shape)
    before = int(checksums.window_sum(array, whole, array.shape)[0])
    dice = np.random.default_rng(3)
    for _ in range(200):
        other = array.copy()
        words = other.reshape(-1).view(np.uint32)
        i, j, k = dice.integers(0, words.size, 3)
        words[k] ^= np.uint32(1 << int(dice.integers(32)))
        assert int(checksums.window_sum(other, whole, array.shape)[0]) != before
        other = array.copy()
        flat = other.reshape(-1)
        flat[i], flat[j] = flat[j], flat[i]
        assert i == j or int(checksums.window_sum(other, whole, array.shape)[0]) != before
        other = array.copy()
        other.reshape(-1)[[i, j]] *= -1                     # two signs: bits that cancel in a plain sum
        assert i == j or int(checksums.window_sum(other, whole, array.shape)[0]) != before
