"""GLU variants: limits of the gate, and equal parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.channels.feed_forward import GELU, ReLU
from tevo.channels.glu_variants import GEGLU, GLU, Bilinear, ReGLU, SwiGLU
from tevo.testing.tolerances import RUNGS, relative_rms


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("gated", "plain"), [(GEGLU, GELU), (ReGLU, ReLU)])
def test_a_constant_value_branch_leaves_the_plain_feed_forward(gated: type, plain: type) -> None:
    torch.manual_seed(0)
    ours = gated(dim=12, hidden_dim=20, match_parameters=False).double()
    theirs = plain(dim=12, hidden_dim=20, bias=False).double()
    x = draw(2, 13, 12)
    x[..., -1] = 1.0
    with torch.no_grad():
        w, v = ours.into.weight.chunk(2)
        theirs.into.weight.copy_(w)
        theirs.out.weight.copy_(ours.out.weight)
        v.zero_()
        v[:, -1] = 1.0
    assert relative_rms(ours(x), theirs(x)) <= RUNGS["F64"]


def test_bilinear_is_homogeneous_of_degree_two() -> None:
    torch.manual_seed(0)
    module, x = Bilinear(dim=12).double(), draw(2, 13, 12)
    assert relative_rms(module(3 * x), 9 * module(x)) <= RUNGS["F64"]


def test_an_open_sigmoid_gate_halves_the_value_branch() -> None:
    torch.manual_seed(0)
    module, x = GLU(dim=12, hidden_dim=20).double(), draw(2, 13, 12)
    v = module.into.weight.detach()[module.width :]
    with torch.no_grad():
        module.into.weight[: module.width] = 0
    assert relative_rms(module(x), x @ v.T @ module.out.weight.T / 2) <= RUNGS["F64"]


@pytest.mark.parametrize("hidden_dim", [3072, 48, 20, 7, 1])
def test_parameters_match_the_plain_feed_forward(hidden_dim: int) -> None:
    dim = 12
    ours = sum(p.numel() for p in SwiGLU(dim=dim, hidden_dim=hidden_dim).parameters())
    theirs = sum(p.numel() for p in ReLU(dim=dim, hidden_dim=hidden_dim, bias=False).parameters())
    # rounding to a whole width: at most a third of a unit of 3 d parameters
    assert abs(ours - theirs) <= dim
    if hidden_dim % 3 == 0:
        assert ours == theirs


def test_the_paper_widths() -> None:
    assert SwiGLU(dim=2, hidden_dim=3072).width == 2048
    assert SwiGLU(dim=2, hidden_dim=3072, match_parameters=False).width == 3072
