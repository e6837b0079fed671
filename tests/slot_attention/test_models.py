"""Models: the reference's outputs and gradients, its parameter counts, its padding, and refusals."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.slot_attention.convert import from_keras
from tevo.slot_attention.matching import hungarian_huber
from tevo.slot_attention.models import (
    SlotAutoencoder,
    SlotDecoder,
    SlotSetPredictor,
    convolve_same,
    deconvolve_same,
)
from tevo.taps import record

GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention"
SMALL = {"image_size": (32, 32), "dim": 12, "iterations": 3}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)


def part(data: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in data.items() if name.startswith(prefix)}


def images(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, 1)


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=tolerance)


def check_gradients(model: nn.Module, loss: Tensor, data: dict[str, np.ndarray]) -> None:
    expected = from_keras(part(data, "grad/keras/"))
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert set(names) == set(expected)
    for name, gradient in zip(names, found, strict=True):
        # the reference's gradients are stored in float32
        scale = max(1.0, float(expected[name].abs().max()))
        close(gradient / scale, expected[name].double().numpy() / scale, 1e-6)


def test_narrow_autoencoder_equals_the_reference() -> None:
    data = load("autoencoder_small_a")
    model = SlotAutoencoder(**SMALL, num_slots=4, hidden_dim=24, decoder_grid=(2, 2)).double()
    model.load_state_dict(from_keras(part(data, "keras/")))
    image = images(data["in/image_nhwc"]).double()
    noise = torch.from_numpy(data["in/noise"]).double()
    with record() as seen:
        out = model(image, slots=model.slot_attention.initial_slots(2, noise=noise))
    loss = F.mse_loss(out.reconstruction, image)
    # what the reference ran in float64, with its position grid in float32 as ours; the rest it ran in float32
    close(model.encoder(image), data["out/features"], 1e-5)
    close(out.slots, data["out/slots_f64"], 1e-12)
    close(out.reconstruction.movedim(1, -1), data["out/recon_combined_f64"], 1e-12)
    close(out.colours.movedim(2, -1), data["out/recons"], 1e-5)
    close(out.masks[..., None], data["out/masks"], 1e-5)
    close(torch.stack(seen["attention"]).squeeze(2).mT, data["out/attn"], 1e-5)
    close(loss, data["out/loss_f64"], 1e-12)
    check_gradients(model, loss, data)


def test_narrow_set_predictor_equals_the_reference() -> None:
    data = load("set_prediction_small_a")
    model = SlotSetPredictor(**SMALL, num_slots=10, hidden_dim=24).double()
    model.load_state_dict(from_keras(part(data, "keras/")))
    noise = torch.from_numpy(data["in/noise"]).double()
    out = model(images(data["in/image_nhwc"]).double(), slots=model.slot_attention.initial_slots(3, noise=noise))
    targets = torch.from_numpy(data["in/target"]).double()
    loss, pairs = hungarian_huber(out.predictions, targets)
    close(out.slots, data["out/slots_f64"], 1e-12)
    close(out.predictions, data["out/predictions_f64"], 1e-12)
    close(loss, data["out/loss_f64"], 1e-12)
    # padding rows tie: each prediction must get a target of the same content
    theirs = torch.from_numpy(data["out/indices_row_target_col_pred"])
    for b in range(3):
        ours = targets[b, pairs[b, 0]][pairs[b, 1].argsort()]
        assert torch.equal(ours, targets[b, theirs[b, 0]][theirs[b, 1].argsort()])
    # which of the padding rows a prediction gets changes no gradient
    check_gradients(model, loss, data)


def drawn(data: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """Image, noise and weights of a full-size file, by its rule."""
    seed, batch, slots, _ = (int(x) for x in data["cfg/seed_B_K_T"])
    rng = np.random.default_rng(seed)
    image = np.clip(rng.standard_normal((batch, 128, 128, 3)) * 0.5, -1, 1).astype(np.float32)
    noise = rng.standard_normal((batch, slots, 64)).astype(np.float32)
    weights = {}
    for name, text in zip(data["names_in_draw_order"].tolist(), data["shapes"].tolist(), strict=True):
        shape = ast.literal_eval(text)
        n = rng.standard_normal(shape)
        kind = name.rpartition(".")[2]
        if kind == "gamma":
            n = 1 + 0.2 * n
        elif kind in ("beta", "bias"):
            n = 0.1 * n
        elif kind in ("slots_mu", "slots_log_sigma"):
            n = 0.3 * n
        elif len(shape) == 4:
            up = "decoder" in name
            n = n * np.sqrt(2 / (shape[0] * shape[1] * shape[3 if up else 2])) * (1.6 if up else 1)
        else:
            n = n * np.sqrt(1.5 / shape[0]) * (1.5 if "project" in name else 1)
        weights[name] = n.astype(np.float32)
    np.testing.assert_array_equal(image[0, 0, 0], data["check/image_0_0_0_3"])
    np.testing.assert_array_equal(noise[0, 0, :4], data["check/noise_0_0_4"])
    first = weights[data["names_in_draw_order"][0]].astype(np.float64).sum()
    assert abs(first - data["check/first_kernel_sum"]) <= 1e-6
    return images(image), torch.from_numpy(noise), weights


@torch.no_grad()
def test_full_size_autoencoder_equals_the_reference() -> None:
    data = load("autoencoder_full_a")
    image, noise, weights = drawn(data)
    model = SlotAutoencoder()
    model.load_state_dict(from_keras(weights))
    with record() as seen:
        out = model(image, slots=model.slot_attention.initial_slots(1, noise=noise))
    close(out.slots, data["out/slots"], 2e-4)
    close(out.reconstruction.movedim(1, -1)[:, ::4, ::4], data["out/recon_combined_s4"], 2e-4)
    close(out.colours.movedim(2, -1)[:, :, ::8, ::8], data["out/recons_s8"], 2e-4)
    close(out.masks[..., None][:, :, ::4, ::4], data["out/masks_s4"], 2e-4)
    close(out.masks.mean((2, 3)), data["out/mask_mean_per_slot"], 2e-4)
    close(seen["attention"][-1].squeeze(1).mT[:, ::64], data["out/attn_last_s"], 2e-4)
    close(F.mse_loss(out.reconstruction, image), data["out/loss"], 2e-4)


@torch.no_grad()
def test_full_size_set_predictor_equals_the_reference() -> None:
    data = load("set_prediction_full_a")
    image, noise, weights = drawn(data)
    model = SlotSetPredictor()
    model.load_state_dict(from_keras(weights))
    out = model(image, slots=model.slot_attention.initial_slots(2, noise=noise))
    close(out.slots, data["out/slots"], 2e-4)
    close(out.predictions, data["out/predictions"], 2e-4)


def test_parameter_counts_are_those_of_the_reference() -> None:
    for model, name, count in (
        (SlotAutoencoder(), "autoencoder_full_a", 890_308),
        (SlotSetPredictor(), "set_prediction_full_a", 380_755),
    ):
        assert sum(p.numel() for p in model.parameters()) == count == int(load(name)["n_params"])


def test_a_decoder_without_strides_tiles_slots_on_the_whole_image() -> None:
    """The form for small images: 35 x 35 pixels, three layers of 32 channels."""
    model = SlotAutoencoder(
        image_size=(35, 35), num_slots=4, channels=32, decoder_grid=(35, 35), decoder_strides=(1, 1, 1)
    )
    out = model(draw(2, 3, 35, 35).float())
    assert out.reconstruction.shape == (2, 3, 35, 35)
    assert out.colours.shape == (2, 4, 3, 35, 35)
    assert out.masks.shape == (2, 4, 35, 35)
    # weights and biases, counted from the description of the layers: 5 x 5 but for the last
    encoder = 25 * (3 + 32 + 32 + 32) * 32 + 4 * 32
    decoder = 25 * (64 + 32 + 32) * 32 + 3 * 32 + 9 * 32 * 4 + 4
    assert sum(p.numel() for p in model.encoder.convolutions.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.convolutions.parameters()) == decoder


def pad_by_hand(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """SAME by definition: output i is centred so that the padding needed for ceil(n / stride) outputs is split evenly."""
    kernel = weight.shape[-1]
    outs = [-(-n // stride) for n in x.shape[2:]]
    fronts = [max((o - 1) * stride + kernel - n, 0) // 2 for o, n in zip(outs, x.shape[2:], strict=True)]
    y = bias[None, :, None, None].expand(len(x), -1, *outs).clone()
    for i in range(outs[0]):
        for j in range(outs[1]):
            for p in range(kernel):
                for q in range(kernel):
                    row, column = i * stride - fronts[0] + p, j * stride - fronts[1] + q
                    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                        y[:, :, i, j] += x[:, :, row, column] @ weight[:, :, p, q].T
    return y


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 7), (9, 12)])
def test_convolution_pads_as_tensorflow_does(size: tuple[int, int], stride: int) -> None:
    layer, x = nn.Conv2d(3, 4, 5, stride).double(), draw(2, 3, *size)
    expected = pad_by_hand(x, layer.weight, layer.bias, stride)
    torch.testing.assert_close(convolve_same(x, layer), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (3, 1)])
def test_deconvolution_is_the_transpose_of_the_padded_convolution(kernel: int, stride: int) -> None:
    layer, y = nn.ConvTranspose2d(4, 5, kernel, stride, bias=False).double(), draw(2, 4, 3, 4)
    x = torch.zeros(2, 5, 3 * stride, 4 * stride, dtype=torch.float64, requires_grad=True)
    down = pad_by_hand(x, layer.weight, torch.zeros(4, dtype=torch.float64), stride)
    (expected,) = torch.autograd.grad(down, x, y)
    torch.testing.assert_close(deconvolve_same(y, layer), expected, rtol=0, atol=1e-12)


def test_the_usual_padding_on_both_sides_is_another_function() -> None:
    layer, y = nn.ConvTranspose2d(4, 5, 5, 2).double(), draw(2, 4, 6, 6)
    common = F.conv_transpose2d(y, layer.weight, layer.bias, 2, padding=2, output_padding=1)
    ours = deconvolve_same(y, layer)
    assert (common - ours).abs().max() > 0.1
    # by one pixel, on both axes
    torch.testing.assert_close(common[..., :-1, :-1], ours[..., 1:, 1:], rtol=0, atol=1e-12)


def test_masks_sum_to_one_and_weigh_the_colours() -> None:
    model = SlotAutoencoder(**SMALL, decoder_grid=(2, 2)).double()
    out = model(draw(2, 3, 32, 32), num_slots=5, iterations=2)
    assert out.slots.shape == (2, 5, 12)
    torch.testing.assert_close(out.masks.sum(1), torch.ones(2, 32, 32, dtype=torch.float64), rtol=0, atol=1e-12)
    summed = sum(out.masks[:, k, None] * out.colours[:, k] for k in range(5))
    torch.testing.assert_close(out.reconstruction, summed, rtol=0, atol=1e-12)


def test_an_exported_model_gives_the_same() -> None:
    model, x, slots = SlotAutoencoder(**SMALL, decoder_grid=(2, 2)).double(), draw(2, 3, 32, 32), draw(2, 4, 12, seed=2)
    exported = torch.export.export(model, (x,), {"slots": slots}).module()
    y = draw(2, 3, 32, 32, seed=3)
    for found, expected in zip(exported(y, slots=slots), model(y, slots=slots), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_images_do_not_see_each_other() -> None:
    model, x, slots = SlotAutoencoder(**SMALL, decoder_grid=(2, 2)).double(), draw(3, 3, 32, 32), draw(3, 4, 12, seed=2)
    alone = model(x[1:2], slots=slots[1:2])
    torch.testing.assert_close(model(x, slots=slots).reconstruction[1:2], alone.reconstruction, rtol=0, atol=1e-12)


def test_every_parameter_gets_a_gradient() -> None:
    x = draw(2, 3, 32, 32).float()
    for model in (SlotAutoencoder(**SMALL, decoder_grid=(2, 2)), SlotSetPredictor(**SMALL)):
        out = model(x)
        loss = out[0].square().sum() + out.slots.square().sum()
        for name, gradient in zip(
            dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize(
    "make", [lambda: SlotAutoencoder(**SMALL, decoder_grid=(2, 2)), lambda: SlotSetPredictor(**SMALL)]
)
def test_models_run_in_half_precision_under_autocast(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model = make()
    x, slots = draw(2, 3, 32, 32).float(), draw(2, 7, 12, seed=2).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, slots=slots)
    with torch.no_grad():
        full = model(x, slots=slots)
    # bfloat16 keeps 8 bits and the outputs are at most of order one: a few roundings
    assert (low[0].float() - full[0]).abs().max() < 0.02


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SlotAutoencoder(image_size=(64, 64)), "16 times that of the grid"),
        (lambda: SlotDecoder(dim=4, channels=4, strides=(6,)), "expected 1 to 5"),
        (lambda: SlotAutoencoder(**SMALL, decoder_grid=(2, 2))(torch.zeros(1, 32, 32, 3)), "resize the images"),
        (lambda: SlotSetPredictor(**SMALL)(torch.zeros(3, 32, 32)), "resize the images"),
    ],
)
def test_what_cannot_be_reached_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
