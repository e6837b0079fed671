"""Presets: what their sources say of them, a step of training, and the parts that are theirs alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tevo.slot_attention import SlotAttention, SlotAutoencoder, SlotSetPredictor, hungarian_huber
from tevo.slot_attention.presets import PRESETS, DropPath, preset


def images() -> Tensor:
    return torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1


def bo_qsa_by_hand(module: SlotAttention, inputs: Tensor, slots: Tensor) -> Tensor:
    """Three rounds as the authors write them, without drop-path."""
    x = module.norm_inputs(inputs)
    k, v, start = module.k(x), module.v(x), slots
    for i in range(3):
        if i == 2:
            slots = slots.detach() + start - start.detach()
        q = module.q(module.norm_slots(slots))
        attention = (q @ k.mT / math.sqrt(64)).softmax(1)
        updates = (attention / (attention.sum(-1, keepdim=True) + 1.0)) @ v
        slots = module.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + module.mlp(module.norm_mlp(slots))
    return slots


def test_bo_qsa_is_the_authors_recursion_with_its_gradients() -> None:
    torch.manual_seed(0)
    module = preset("bo-qsa").slot_attention.double().eval()
    inputs = torch.randn(2, 13, 64).double()
    start = module.initial_slots(2)
    torch.testing.assert_close(start, module.slots_queries.expand(2, -1, -1), rtol=0, atol=0)
    weights = torch.randn(2, 8, 64).double()
    results = []
    for found in (module(inputs), bo_qsa_by_hand(module, inputs, start)):
        parameters = list(module.parameters())
        results.append((found, torch.autograd.grad((found * weights).sum(), parameters, retain_graph=True)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_training_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = preset(name)
    batch = images()[..., : model.encoder.image_size[0], : model.encoder.image_size[1]]
    out = model(batch)
    if isinstance(model, SlotAutoencoder):
        assert out.masks.shape == (2, {"bo-qsa": 8, "isa-t": 4}[name], *batch.shape[2:])
        loss = (out.reconstruction - batch).square().mean()
    else:
        assert isinstance(model, SlotSetPredictor) and out.predictions.shape == (2, 10, 19)
        loss = hungarian_huber(out.predictions, torch.rand(2, 10, 19))[0]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_isa_t_has_the_parameters_of_the_authors_configuration() -> None:
    model = preset("isa-t")
    assert model.encoder.image_size == model.encoder.grid == model.decoder.grid == (35, 35)
    norm, wide = 2 * 64, 64 * 128 + 128 + 128 * 64 + 64
    expected = {
        "encoder": 25 * 3 * 64 + 64 + 3 * (25 * 64 * 64 + 64),
        # theirs has recurrent biases for one gate of three
        "slot_attention": 4 * 64 + 3 * 64 * 64 + (2 * 64 + 64) + 4 * norm + 2 * wide + 6 * (64 * 64 + 64),
        "decoder": (2 * 64 + 64) + (64 * 256 + 256) + 5 * (256 * 256 + 256) + (256 + 1) + 3 * (256 + 1),
    }
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()} == expected


def test_drop_path_zeroes_rows_and_keeps_the_mean() -> None:
    module, x = DropPath(0.2), torch.randn(20_000, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(0)
    y = module(x)
    kept = (y != 0).flatten(1).all(1)
    assert ((y == 0).flatten(1).all(1) == ~kept).all()
    torch.testing.assert_close(y[kept], x[kept] / 0.8, rtol=0, atol=1e-12)
    # five standard errors of 20,000 draws
    assert abs(kept.double().mean() - 0.8) < 5 * 0.4 / 20_000**0.5
    assert module.eval()(x) is x


def test_bad_input_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="unknown preset 'bo_qsa' \\(did you mean 'bo-qsa'\\?\\), expected one of"):
        preset("bo_qsa")
    with pytest.raises(ValueError, match="probability=1"):
        DropPath(1)
