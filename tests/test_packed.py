"""Weights that stay in bfloat16, multiplied by NumKong: exact numbers, the same bits in any batch and on any ranks."""
import importlib.util
import sys

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import make_tiny_checkpoints as tiny
import mpitp
from mpitp import InputError
from mpitp.checkpoints import packing
from mpitp.inference.kv import KeyValues
from mpitp.ops import bfloat16, packed
from mpitp.ops.embedding import embedding_forward
from mpitp.ops.linear import linear_forward, two_linears_forward
from spmd import draw, everywhere, job, same_bytes

HAS_NUMKONG = importlib.util.find_spec("numkong") is not None
pytestmark = pytest.mark.host
with_numkong = pytest.mark.skipif(not HAS_NUMKONG, reason="NumKong is not installed (the extra numkong)")
# Biases; transposed weights; fused ones and a shared head; a tied, scaled embedding; windows; q/k norms; ALiBi.
CASES = ["llama3_biases", "gpt2", "falcon_40b", "gemma3_text", "gemma2", "olmo2", "bloom", "phi_grouped"]


def weight_of(bits, activations="float32", faster_rows=packed.EVERY_BATCH, ends=()):
    """A PackedWeight of bfloat16 bits in the buffers that end there."""
    ends = [0, *ends, len(bits)]
    buffers = [packed.pack(bits[start:stop], start) for start, stop in zip(ends, ends[1:])]
    return packed.PackedWeight(bits.shape, buffers, activations, faster_rows)


def bits_of(seed, *shape):
    return bfloat16.upper_halves(draw(seed, *shape, dtype=np.float32))


def any_numbers(seed, *shape):
    """float32 numbers of every exponent whose lowest bit bfloat16 has too, of both signs, zeros among them."""
    words = np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)
    words = words & 0x807FFFFF | (words >> 8 & 0xFF).clip(24, 254) << 23
    words.flat[::7] &= 0x80000000
    return words.view(np.float32)


# --- products -------------------------------------------------------------------------------------------------------

def test_three_numbers_add_up_to_x():
    x = any_numbers(0, 40, 50)
    numbers = bfloat16.Numbers(*x.shape)
    numbers.put(x)
    parts = bfloat16.widened(numbers.numbers_KNI)
    assert same_bytes(parts.astype(np.float64).sum(0) + 0.0, x.astype(np.float64) + 0.0)
    assert (np.abs(parts[1:]) <= np.abs(parts[0]) * 2.0 ** -7).all()


def test_rounded_is_the_nearest():
    x = any_numbers(1, 40, 50)
    x = x[np.abs(x) < 1e30].reshape(1, -1)              # 2^16 times as much must be finite
    found = bfloat16.rounded(x)
    assert same_bytes(bfloat16.widened(bfloat16.upper_halves(found)), found)
    error, nearest = np.abs(found - x), x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert same_bytes(error, np.abs(nearest - x))


@with_numkong
@pytest.mark.parametrize("activations", packed.FASTER_ROWS)
@pytest.mark.parametrize("rows, outputs, depth", [(1, 40, 64), (3, 9, 100), (5, 300, 33), (70, 24, 640), (2, 1, 1)])
def test_products(activations, rows, outputs, depth):
    """By NumKong and by BLAS, as exact as BLAS alone on the same numbers, also into a gap of another array."""
    x, bits = draw(1, rows, depth, dtype=np.float32), bits_of(2, outputs, depth)
    w, exact_x = bfloat16.widened(bits), x if activations == "float32" else bfloat16.rounded(x)
    exact = exact_x.astype(np.float64) @ w.T.astype(np.float64)
    magnitude = np.abs(exact_x.astype(np.float64)) @ np.abs(w.T.astype(np.float64))
    limit = 4 * np.finfo(np.float32).eps * magnitude
    for faster_rows in (0, packed.EVERY_BATCH):
        weight = weight_of(bits, activations, faster_rows, ends=range(8, outputs, 8))
        assert (np.abs(linear_forward(x, weight)[0] - exact) <= limit).all()
        out = np.full((rows, outputs + 2), 7, np.float32)
        assert same_bytes(linear_forward(x, weight, out=out[:, 1:-1])[0], linear_forward(x, weight)[0])
        assert (out[:, [0, -1]] == 7).all()


@with_numkong
def test_bits_of_a_product_depend_on_its_row_and_its_weight_alone():
    x, bits = draw(1, 21, 200, dtype=np.float32), bits_of(2, 53, 200)
    whole = linear_forward(x, weight_of(bits))[0]
    wide = np.empty((21, 603), np.float32)
    wide[:, 201:401] = x                                # rows with gaps, of another alignment
    assert same_bytes(linear_forward(wide[:, 201:401], weight_of(bits))[0], whole)
    for rows in range(1, 22):
        assert same_bytes(linear_forward(x[-rows:], weight_of(bits))[0], whole[-rows:])
    for ends in ([8], [1], [4, 20], [16, 17, 18]):
        assert same_bytes(linear_forward(x, weight_of(bits, ends=ends))[0], whole)
    packed.require_fixed_bits()


@with_numkong
@pytest.mark.parametrize("activations", packed.FASTER_ROWS)
@pytest.mark.parametrize("rows", [1, 13])
def test_two_products_of_one_x(activations, rows):
    x = draw(1, rows, 70, dtype=np.float32)
    both = [weight_of(bits_of(seed, 24, 70), activations, 12) for seed in (2, 3)]
    for found, weight in zip(two_linears_forward(x, *both), both):
        assert same_bytes(found, linear_forward(x, weight)[0])


@with_numkong
def test_kernels_whose_bits_depend_on_the_batch_are_refused(monkeypatch):
    monkeypatch.setattr(packed, "packed_product", lambda x, w, y: np.add(x @ bfloat16.widened(w.buffers[0].rows).T,
                                                                         1e-6 * len(x), out=y))
    with pytest.raises(InputError, match="found NumKong .*whose bits depend on the batch, expected reproducible"):
        packed.require_fixed_bits()


@with_numkong
@pytest.mark.parametrize("activations", packed.FASTER_ROWS)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_what_is_not_finite_stays_so(activations, rows):
    """The NaN of all ones as well, to which rounding as integers would add up to zero."""
    for value in (np.nan, np.inf, -np.inf, np.uint32(0xFFFFFFFF).view(np.float32), np.uint32(0x7F800001).view("f")):
        x, bits = np.ones((rows, 40), np.float32), bits_of(2, 16, 40)
        x[-1, 3] = value
        for faster_rows in (0, packed.EVERY_BATCH):
            assert not np.isfinite(linear_forward(x, weight_of(bits, activations, faster_rows))[0][-1]).any()
    bits[5, 7] = 0x7F80                                 # an infinite weight
    y = linear_forward(np.ones((rows, 40), np.float32), weight_of(bits, activations))[0]
    assert not np.isfinite(y[:, 5]).any() and np.isfinite(np.delete(y, 5, 1)).all()


@with_numkong
def test_rows_are_looked_up_as_they_are():
    bits = bits_of(1, 30, 65)                           # 65: NumKong pads its rows
    bits[4], ids = 0x8000, np.array([29, 0, 4, -1, 30, 17, 4])
    weight = weight_of(bits, ends=[8, 24])
    assert same_bytes(embedding_forward(weight, ids), embedding_forward(bfloat16.widened(bits), ids))
    assert np.signbit(embedding_forward(weight, ids)[2]).all()


@with_numkong
def test_another_order_of_rows_is_refused(monkeypatch):
    original = packed.library()

    class Turned:
        nk_dots_packed_size_bf16 = original.nk_dots_packed_size_bf16

        @staticmethod
        def nk_dots_pack_bf16(bits, outputs, depth, pitch, memory):
            original.nk_dots_pack_bf16(bits + (outputs - 1) * pitch, 1, depth, pitch, memory)

    description = packed.description()
    monkeypatch.setattr(packed, "library", Turned)
    monkeypatch.setattr(packed, "description", lambda: description)
    with pytest.raises(InputError, match="which packs bfloat16 in another order, expected one row after the other"):
        packed.pack(bits_of(1, 8, 64), 0)


# --- models ---------------------------------------------------------------------------------------------------------

def bfloat16_folder(folder, case):
    """A checkpoint folder in BF16, and its golden values."""
    golden = tiny.load(case)
    tiny.write(folder, golden, ml_dtypes.bfloat16)
    return golden


def logits_of(model, ids):
    return model.gather_logits(model.forward(np.array(ids), save=False)[0])


@with_numkong
@pytest.mark.filterwarnings("ignore::mpitp.checkpoints.model_folder.CheckpointWarning")
@pytest.mark.parametrize("case", CASES[:4])
def test_models_against_float32(group, case, tmp_path):
    ids = [bfloat16_folder(tmp_path, case)["ids"]]
    model, exact = mpitp.load_model(tmp_path, group), mpitp.load_model(tmp_path, group, "float64")
    kept = mpitp.load_model(tmp_path, group, weights="bfloat16")
    fast = mpitp.load_model(tmp_path, group, weights="bfloat16", activations="bfloat16")
    expected = logits_of(exact, ids)
    errors = [np.abs(logits_of(m, ids) - expected).max() / np.abs(expected).max() for m in (model, kept, fast)]
    assert errors[1] <= 2e-5 and errors[2] <= 0.1
    assert kept.bytes_read == model.bytes_read
    assert [tokens.tolist() for tokens in mpitp.generate(kept, ids, max_new_tokens=4)] == \
        [tokens.tolist() for tokens in mpitp.generate(model, ids, max_new_tokens=4)]


@with_numkong
@pytest.mark.filterwarnings("ignore::mpitp.checkpoints.model_folder.CheckpointWarning")
@pytest.mark.parametrize("case, activations", [*((case, "float32") for case in CASES), ("gemma3_text", "bfloat16")])
def test_reproducible_bits_for_any_ranks_and_any_batch(case, activations, tmp_path, world):
    """A prompt in one pass, a token at a time, beside others, and on one rank: the same bits."""
    golden = bfloat16_folder(tmp_path, case)
    ids = np.array([golden["ids"], golden["ids"][::-1], np.roll(golden["ids"], 1)])
    B, S = ids.shape
    options = dict(weights="bfloat16", activations=activations)
    with mpitp.TensorParallelGroup(MPI.COMM_SELF, reproducible=True) as alone, \
            mpitp.TensorParallelGroup(reproducible=True) as every:
        expected = logits_of(mpitp.load_model(tmp_path, alone, **options), ids[:1])
        model = mpitp.load_model(tmp_path, every, **options)
        found = [logits_of(model, ids[:1]), logits_of(model, ids)[:1], logits_of(model, ids[:1, :S - 2])]
        together, one_by_one = KeyValues(model, B, S), KeyValues(model, 1, S)
        counts = np.array([S - 1, 1, 2])                # prompts of unequal length, then a token of each
        pieces = [model.gather_logits(model.extend(ids[:, :S - 1], together, counts))[:1],
                  model.gather_logits(model.extend(ids[:, S - 1:], together))[:1]]
        tokens = [model.gather_logits(model.extend(ids[:1, s:s + 1], one_by_one)) for s in range(S)]
    same = [same_bytes(logits, expected[:, :logits.shape[1]]) for logits in found]
    same += [same_bytes(logits, expected[:, S - 2 + i]) for i, logits in enumerate(pieces)]
    same += [same_bytes(logits, expected[:, s]) for s, logits in enumerate(tokens)]
    assert everywhere(all(same)), same


@with_numkong
def test_half_the_memory(group, tmp_path):
    golden = bfloat16_folder(tmp_path, "llama3_biases")
    model = mpitp.load_model(tmp_path, group, weights="bfloat16")
    matrices = {name: w for name, w in model.weights.items() if isinstance(w, packed.PackedWeight)}
    assert len(matrices) == sum(len(spec.shape) == 2 for spec in model.specs.values()) and golden
    rows = sum(buffer.stop - buffer.start for w in matrices.values()
               for part in (w if w.buffers else next(iter(w.parts.values()), w),) for buffer in part.buffers)
    assert rows == sum(len(w) for w in matrices.values() if w.shape[1])
    assert model.local_bytes() == sum(w.nbytes for w in model.weights.values())


@with_numkong
def test_forward_only(group, tmp_path):
    ids = np.array([bfloat16_folder(tmp_path, "llama3_biases")["ids"]])
    model = mpitp.load_model(tmp_path, group, weights="bfloat16")
    logits, saved = model.forward(ids)
    refused = "found weights that are kept in bfloat16, .*, expected float32 ones: load_model without"
    for function in (lambda: model.backward(logits, saved), model.gather,
                     lambda: mpitp.save_model(model, tmp_path / "saved")):
        with pytest.raises(InputError, match=refused):
            function()


@with_numkong
@pytest.mark.parametrize("dtype, stored", [(np.float16, "F16"), (np.float32, "F32")])
def test_other_files_are_refused_by_name(group, dtype, stored, tmp_path):
    tiny.write(tmp_path, tiny.load("llama"), dtype)
    with pytest.raises(InputError, match=r"found .*: .*embed_tokens.weight.* not in BF16, expected every matrix in it"):
        mpitp.load_model(tmp_path, group, weights="bfloat16")


def test_options_that_do_not_fit(group, tmp_path):
    bfloat16_folder(tmp_path, "llama")
    for options, message in (
            (dict(weights="float16"), "found weights 'float16', expected one of float32, bfloat16"),
            (dict(activations="bfloat16"), "found activations 'bfloat16' with weights 'float32'"),
            (dict(weights="bfloat16", activations="int8"), "found activations 'int8', expected one of"),
            (dict(weights="bfloat16", dtype="float64"), "found weights 'bfloat16' with dtype 'float64'")):
        with pytest.raises(InputError, match=message):
            mpitp.load_model(tmp_path, group, **options)


def test_without_numkong(group, tmp_path, monkeypatch):
    bfloat16_folder(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "numkong", None)
    packed.library.cache_clear()
    with pytest.raises(InputError, match=r"found no NumKong, expected it .*: pip install 'mpitp\[numkong\]'"):
        mpitp.load_model(tmp_path, group, weights="bfloat16")
    packed.library.cache_clear()


@with_numkong
def test_ranks_with_other_libraries(group, tmp_path, monkeypatch):
    bfloat16_folder(tmp_path, "llama")
    monkeypatch.setattr(packing, "description", lambda: f"NumKong {group.rank}")
    if group.size > 1:
        with pytest.raises(InputError, match="the ranks disagree on NumKong: rank.* 0: NumKong 0; "):
            mpitp.load_model(tmp_path, group, weights="bfloat16")


@with_numkong
@pytest.mark.launcher
def test_commands(tmp_path):
    """The same ids and loss, and what inspect says of the memory."""
    golden = bfloat16_folder(tmp_path, "llama")
    ids = ",".join(map(str, golden["ids"]))
    (tmp_path / "ids").write_text(ids)
    found = []
    for options in ((), ("--weights", "bfloat16")):
        given = "--model", tmp_path, *options
        generated = job(2, "-m", "mpitp", "generate", "--ids", ids, "--max-new-tokens", 4, *given)
        scored = job(2, "-m", "mpitp", "score", "--ids-file", tmp_path / "ids", *given)
        assert generated.returncode == scored.returncode == 0, generated.stderr + scored.stderr
        found.append((generated.stdout.splitlines()[0], float(scored.stdout.split()[1])))
    assert found[0][0] == found[1][0] and abs(found[0][1] / found[1][1] - 1) < 1e-6
    inspected = job(1, "-m", "mpitp", "inspect", tmp_path, "--weights", "bfloat16")
    assert "in float32, matrices in bfloat16," in inspected.stdout
