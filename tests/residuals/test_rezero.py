"""ReZero: a stack that starts as the identity, and what moves first."""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.models.encoder import Encoder
from tevo.residuals.rezero import ReZero
from tevo.testing.tolerances import RUNGS, relative_rms


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_deep_stack_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    model, x = Encoder(dim=12, depth=9, heads=3, residual="rezero").double(), draw(2, 13, 12)
    assert torch.equal(model(x), x)


def test_at_the_start_only_alpha_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = Encoder(dim=12, depth=3, heads=3, residual="rezero").double()
    (model(draw(2, 13, 12)) * draw(2, 13, 12, seed=2)).sum().backward()
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moves == name.endswith("alpha"), name


def test_alpha_one_is_the_plain_residual_network() -> None:
    torch.manual_seed(0)
    residual, f, g = ReZero().double(), torch.nn.Linear(12, 12).double(), torch.nn.Linear(12, 12).double()
    torch.nn.init.ones_(residual.alpha)
    x = draw(2, 13, 12)
    y = x + f(x)
    assert relative_rms(residual(x, (f, g)), y + g(y)) <= RUNGS["F64"]
