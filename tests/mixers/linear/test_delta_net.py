from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tevo.functional.linear_attention import causal_linear_attention
from tevo.mixers.linear.delta_net import DeltaNet, delta_rule, dpfp, normalise
from tevo.testing import relative_rms


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_full_strength_and_one_hot_features_overwrite_a_key_exactly(generator: torch.Generator) -> None:
    slots = torch.tensor([2, 0, 2, 4, 0, 2])
    k = F.one_hot(slots, 5).double()[None, None]
    v = torch.randn(1, 1, 6, 3, dtype=torch.float64, generator=generator)
    _, memory = delta_rule(k, k, v, torch.ones(1, 1, 6, dtype=torch.float64))
    wanted = torch.zeros(5, 3, dtype=torch.float64)
    for slot, value in zip(slots, v[0, 0], strict=True):
        wanted[slot] = value
    torch.testing.assert_close(memory[0, 0], wanted, rtol=0, atol=1e-15)


def test_recalls_as_many_orthogonal_keys_as_features_and_not_one_more(generator: torch.Generator) -> None:
    p = 6
    v = torch.randn(1, 1, p + 1, 3, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=generator))[0][None, None]
    one = torch.ones(1, 1, p + 1, dtype=torch.float64)
    _, memory = delta_rule(basis, basis, v[:, :, :p], one[:, :, :p])
    torch.testing.assert_close(basis @ memory, v[:, :, :p], rtol=0, atol=1e-14)
    extra = torch.cat([basis, basis.mean(2, keepdim=True) * p**0.5], 2)
    _, memory = delta_rule(extra, extra, v, one)
    assert float((extra @ memory - v).abs().max()) > 0.1


def test_weak_writing_to_an_empty_memory_is_the_sum_rule(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    strength = 1e-7
    y, _ = delta_rule(q, k, v, torch.full((2, 3, 7), strength, dtype=torch.float64))
    summed, _ = causal_linear_attention(q, k, v)
    # what is already stored is corrected for in second order only
    torch.testing.assert_close(y / strength * 2, summed, rtol=0, atol=1e-4)


def test_features_are_the_products_of_the_paper() -> None:
    x = torch.tensor([1.0, -2.0])
    # r = [1, 0, 0, 2]; r_i r_{i-1} = [1 * 2, 0, 0, 0], r_i r_{i-2} = 0
    assert dpfp(x, 1).tolist() == [2, 0, 0, 0]
    assert dpfp(x, 2).tolist() == [2, 0, 0, 0, 0, 0, 0, 0]
    assert dpfp(torch.tensor([1.0, 3.0]), 1).tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_features_sum_to_one_so_that_no_key_is_longer_than_one(nu: int, generator: torch.Generator) -> None:
    phi = normalise(dpfp(torch.randn(1000, 6, dtype=torch.float64, generator=generator), nu))
    assert float(phi.min()) >= 0
    torch.testing.assert_close(phi.sum(-1), torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(phi.norm(dim=-1).max()) <= 1


def test_a_token_without_features_writes_and_reads_nothing() -> None:
    # nu = 1 and an odd head width: alternating signs leave no neighbouring pair
    x = torch.tensor([[1.0, -1.0, 1.0]], requires_grad=True)
    phi = normalise(dpfp(x, 1))
    assert not phi.any()
    phi.sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_runs_in_half_precision_under_autocast() -> None:
    torch.manual_seed(0)
    mixer = DeltaNet(dim=12, heads=3)
    x = torch.randn(2, 70, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    # the projections keep 8 bits, and the division by the features' sum magnifies what was lost where it is small
    assert relative_rms(y, mixer(x)) < 0.1


def test_refuses_what_it_has_no_form_for() -> None:
    with pytest.raises(ValueError, match="build it with causal=True"):
        DeltaNet(dim=12, heads=3, causal=False)
    with pytest.raises(ValueError, match="expected 1 to 7"):
        DeltaNet(dim=12, heads=3, nu=8)
    with pytest.raises(ValueError, match="with itself only"):
        DeltaNet(dim=12, heads=3)(torch.zeros(1, 2, 12), torch.zeros(1, 4, 12))
