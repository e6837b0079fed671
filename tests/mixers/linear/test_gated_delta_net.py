from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.mixers.linear.delta_net import delta_rule
from tevo.mixers.linear.gated_delta_net import GatedDeltaNet, gated_delta_rule, plain_gated_delta_rule
from tevo.testing import RUNGS, relative_rms


def parts(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, e, dtype=torch.float64, generator=generator) for e in (4, 4, 4))
    g, beta = (torch.randn(2, 3, n, dtype=torch.float64, generator=generator) for _ in range(2))
    return q, F.normalize(k, dim=-1), v, -g.square(), beta.sigmoid()


@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_chunks_of_any_size_equal_the_recurrence(chunk: int) -> None:
    ours, theirs = gated_delta_rule(*parts(13), chunk=chunk), plain_gated_delta_rule(*parts(13))
    assert all(relative_rms(a, b) <= RUNGS["F64"] for a, b in zip(ours, theirs, strict=True))


def test_without_fading_it_is_the_delta_rule() -> None:
    q, k, v, g, beta = parts(13)
    ours, _ = gated_delta_rule(q, k, v, torch.zeros_like(g), beta)
    assert relative_rms(ours, delta_rule(q, k, v, beta)[0]) <= RUNGS["F64"]


def test_the_steps_of_new_weights_are_those_of_the_released_code() -> None:
    torch.manual_seed(0)
    mixer = GatedDeltaNet(dim=96, heads=48)
    steps = F.softplus(mixer.decay.bias.detach())
    # rounding of the inverse in single precision
    assert 0.99e-3 <= float(steps.min()) < 3e-3 and 0.03 < float(steps.max()) <= 0.101
    rates = mixer.log_rate.detach().exp()
    assert float(rates.min()) > 0 and 12 < float(rates.max()) <= 16.01


def test_convolutions_reach_over_padding_inside_a_sequence() -> None:
    torch.manual_seed(0)
    mixer = GatedDeltaNet(dim=12, heads=3).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    holes = torch.full((2, 12, 12), float("nan"), dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]).bool().expand(2, -1)
    holes[mask] = x.flatten(0, 1)
    assert relative_rms(mixer(holes, mask=mask)[mask], mixer(x).flatten(0, 1)) <= RUNGS["F64"]


def test_refuses_what_it_has_no_form_for() -> None:
    with pytest.raises(ValueError, match="build it with causal=True"):
        GatedDeltaNet(dim=12, heads=3, causal=False)
    with pytest.raises(ValueError, match="expected at least 1 each"):
        GatedDeltaNet(dim=12, heads=3, taps=0)
