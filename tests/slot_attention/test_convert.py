"""Conversion: gates and layouts by value, every name used, unknown names refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tevo.slot_attention.convert import from_keras
from tevo.slot_attention.models import SlotAutoencoder, SlotSetPredictor
from tevo.slot_attention.module import SlotAttention

GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention"


def keras(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key.removeprefix("keras/"): data[key] for key in data if key.startswith("keras/")}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_every_weight_of_each_model_is_given_and_fits() -> None:
    small = {"num_slots": 4, "dim": 12, "hidden_dim": 24, "image_size": (32, 32)}
    for name, model in (
        ("sa_module_a", SlotAttention(dim=24, input_dim=16, hidden_dim=32)),
        ("autoencoder_small_a", SlotAutoencoder(**small, decoder_grid=(2, 2))),
        ("set_prediction_small_a", SlotSetPredictor(**small)),
    ):
        arrays = keras(name)
        state = from_keras(arrays)
        model.load_state_dict(state)
        # nothing lost, nothing shared: as many numbers as came in
        assert sum(a.size for a in arrays.values()) == sum(t.numel() for t in state.values())
        assert all(t.is_contiguous() for t in state.values())


def test_gru_equals_the_equations_of_keras() -> None:
    rng = np.random.default_rng(1)
    d, e = 5, 3
    arrays = {
        "gru.kernel": rng.normal(size=(e, 3 * d)),
        "gru.recurrent_kernel": rng.normal(size=(d, 3 * d)),
        "gru.bias": rng.normal(size=(2, 3 * d)),
    }
    x, h = rng.normal(size=(7, e)), rng.normal(size=(7, d))
    (wz, wr, wh), (uz, ur, uh) = (np.split(arrays[f"gru.{name}"], 3, 1) for name in ("kernel", "recurrent_kernel"))
    (bz, br, bh), (cz, cr, ch) = (np.split(row, 3) for row in arrays["gru.bias"])
    z, r = sigmoid(x @ wz + bz + h @ uz + cz), sigmoid(x @ wr + br + h @ ur + cr)
    expected = z * h + (1 - z) * np.tanh(x @ wh + bh + r * (h @ uh + ch))
    cell = torch.nn.GRUCell(e, d, dtype=torch.float64)
    cell.load_state_dict({key.removeprefix("gru."): value for key, value in from_keras(arrays).items()})
    found = cell(torch.from_numpy(x), torch.from_numpy(h)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_module_layout_equals_the_stored_one() -> None:
    names = {"project_q": "q", "project_k": "k", "project_v": "v", "mlp.1": "mlp.2"}
    with np.load(GOLDEN / "sa_module_a.npz") as data:
        expected = {key.removeprefix("torch/"): data[key] for key in data if key.startswith("torch/")}
    state = from_keras(keras("sa_module_a"))
    assert len(expected) == len(state)
    for key, value in expected.items():
        layer, _, kind = key.rpartition(".")
        ours = f"{names.get(layer, layer)}.{kind}" if layer else key
        np.testing.assert_array_equal(state[ours].numpy(), value)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("encoder_cnn.4.kernel", (5, 5, 3, 4), "unknown name 'encoder_cnn.4.kernel'"),
        ("layer_norm.kernel", (4,), "shape"),
        ("layer_norm.moving_mean", (4,), "unknown name"),
        ("gru.weights", (4, 12), "unknown name"),
        ("gru.bias", (12,), "reset_after=True"),
        ("gru.kernel", (4, 13), "3 x slot width"),
        ("encoder_cnn.0.kernel", (3, 4), "expected 4 dimensions"),
        ("project_q.kernel", (1, 1, 3, 4), "expected 2 dimensions"),
    ],
)
def test_what_is_not_of_the_reference_is_refused(name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_keras({name: np.zeros(shape, dtype=np.float32)})
