"""What the timed cases do: the work that their names say, all of it. That they take time, benchmarks show."""
import numpy as np
import pytest

import mpitp
from decoder_cases import config
from groups import group_fixture
from mpitp.checkpoints import left_out
from mpitp.config import DecoderConfig
from mpitp.measure import decode, feed_forward

group = group_fixture("ordinary")


def test_flops_by_definition():
    """2 for a multiplication and an addition: up and down forward; backward each of them for dx and for dW."""
    assert feed_forward.flops(3, 5, 7, False) == 2 * (3 * 5 * 7 + 3 * 7 * 5)
    assert feed_forward.flops(3, 5, 7, True) == 3 * feed_forward.flops(3, 5, 7, False)


def test_forward_and_backward_are_run(group, monkeypatch):
    done = []
    for name in ("forward", "backward"):
        right = getattr(mpitp.ParallelMLP, name)
        monkeypatch.setattr(mpitp.ParallelMLP, name, lambda *arguments, right=right, name=name, **more: (
            done.append((name, more.get("save", True), more.get("out") is not None)), right(*arguments, **more))[1])
    cases = feed_forward.LayerCases(mpitp.ParallelMLP(group, 8, 16), *np.ones((2, 3, 8), "f")).by_name("")
    done.clear()
    for name, case in cases.items():
        case()
        expected = [("forward", False, False)] if name.endswith("forward") else [("forward", True, False),
                                                                                ("backward", True, True)]
        assert done == expected, name
        done.clear()


def test_the_products_of_a_token_are_those_of_all_matrices(group):
    model = mpitp.Decoder(group, config("gpt2"))
    products = decode.MatrixProducts(model, 4)
    products.run()
    matrices = [w for name, w in model.weights.items() if w.ndim == 2 and not name.startswith("position")
                and (name != "embedding.weight" or w is model.weights[model.head.weight_name])]
    assert [id(w) for w, _ in products.weights] == [id(w) for w in matrices] and len(matrices) > 6
    for w, rows in products.weights:
        assert rows == (1 if w is model.weights[model.head.weight_name] else 4)
        assert products.x[rows, w.shape[1]].shape == (rows, w.shape[1])


class Stored:
    """A tensor of a file, of which rows are read."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __getitem__(self, window):
        return self.array[window]


@pytest.mark.parametrize("piece", [1, 6, 1 << 20])
def test_tensors_that_differ_anywhere(monkeypatch, piece):
    """In the first piece, in the last, by a NaN; read piece by piece."""
    monkeypatch.setattr(left_out, "PIECE", piece)
    a = np.arange(12.0).reshape(4, 3)
    assert not left_out.differ(Stored(a), Stored(a.copy()))
    for place in ((0, 0), (3, 2)):
        for value in (-1.0, np.nan):
            b = a.copy()
            b[place] = value
            assert left_out.differ(Stored(a), Stored(b))


def test_what_a_config_has_where_nothing_is_said():
    """Documented defaults, on which files and results depend."""
    found = DecoderConfig(11, 12, 1, 3)
    assert (found.init_method_std, found.norm_epsilon, found.ffn_size) == (0.02, 1e-5, 48)
    assert found.activation == "gelu_tanh"
    assert (found.logits_multiplier, found.residual_multiplier, found.embedding_multiplier) == (1.0, 1.0, 1.0)
