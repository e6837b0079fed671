"""B2T: where the connection ends, how weights start, and why gradients reach the first block."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.models.encoder import Encoder
from tevo.residuals.b2t_connection import B2T
from tevo.residuals.post_norm import PostNorm
from tevo.testing.tolerances import RUNGS, relative_rms


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_connection_ends_before_the_last_norm() -> None:
    torch.manual_seed(0)
    f, g = torch.nn.Linear(12, 12).double(), torch.nn.Linear(12, 12).double()
    y = B2T(dim=12).double()(draw(2, 13, 12), (f, g))
    # eps = 1e-5 beside a variance of order one; outside the norm the variance would be near 3
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(2, 13, dtype=torch.float64), rtol=1e-4, atol=0)


def test_silent_sublayers_leave_the_norm_of_the_input_and_its_norm() -> None:
    x = draw(2, 13, 12)
    y = B2T(dim=12).double()(x, (torch.zeros_like, torch.zeros_like))
    assert relative_rms(y, F.layer_norm(x + F.layer_norm(x, (12,)), (12,))) <= RUNGS["F64"]


def test_matrices_start_smaller_by_the_root_of_the_depth_and_nothing_else_does() -> None:
    models = []
    for residual in ("post_norm", "b2t_connection"):
        torch.manual_seed(0)
        models.append(Encoder(dim=12, depth=4, heads=3, residual=residual, position="t5_bias", channel="gelu"))
    plain, ours = (dict(model.named_parameters()) for model in models)
    assert set(plain) == set(ours)
    scaled = 0
    for name, parameter in ours.items():
        matrix = parameter.ndim > 1 and "position" not in name
        scaled += matrix
        assert torch.equal(parameter, plain[name] * (0.5 if matrix else 1)), name
    # q, kv, out and the two of the feed-forward, in each block; one table serves all blocks and is left alone
    assert scaled == 5 * 4


def test_gradients_pass_one_norm_a_block_where_post_norm_passes_two() -> None:
    """With sublayers that ignore their input, the gradient has no way but the connections."""
    depth, x = 24, draw(2, 13, 24).requires_grad_()
    noise = draw(depth, 2, 2, 13, 24, seed=3)
    norms = {}
    for cls in (PostNorm, B2T):
        wiring, y = cls(dim=24).double(), x
        for f, g in noise:
            y = wiring(y, (lambda z, f=f: f, lambda z, g=g: g))  # type: ignore[misc]
        (gradient,) = torch.autograd.grad(y, x, draw(2, 13, 24, seed=2))
        norms[cls] = float(gradient.norm()) ** (1 / depth)
    # a norm divides by the deviation of what it sums, here of 2 or of 3 parts of unit variance, the input twice in B2T:
    # (1/sqrt(2))^2 a block for post-norm, (1 + 1/sqrt(2)) / sqrt(3 + sqrt(2)) for B2T
    assert norms[PostNorm] < 0.65
    assert norms[B2T] > 0.75


def test_refuses_a_single_sublayer() -> None:
    with pytest.raises(ValueError, match="sublayers=1"):
        B2T(dim=12, sublayers=1)
