"""KERPLE: what it reduces to, why its kernels are kernels, and its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tevo.functional.attention import attention
from tevo.positions.alibi import ALiBi
from tevo.positions.kerple import KerpleLog, KerplePower, log_penalty, power_penalty

AT = torch.arange(13)[None]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(position: KerpleLog | KerplePower, p: Tensor, a: Tensor) -> KerpleLog | KerplePower:
    with torch.no_grad():
        position.p.copy_(p)
        position.a.copy_(a)
    return position


@pytest.mark.parametrize("heads", [3, 8])
def test_power_one_with_fixed_slopes_is_alibi(heads: int) -> None:
    q = draw(2, heads, 13, 4)
    alibi = ALiBi(heads=heads).double()
    slopes, distance = alibi.exponents.exp2()[:, None, None], (AT[0, :, None] - AT).abs().double()
    assert torch.equal(-power_penalty(distance, torch.ones_like(slopes), slopes)[None], alibi.bias(q, q, AT, AT))


def test_the_logarithm_becomes_linear_for_small_a() -> None:
    distance, a = torch.arange(13, dtype=torch.float64), torch.tensor(1e-9, dtype=torch.float64)
    # log(1 + x) = x - x^2/2, and x is at most 1.2e-8
    torch.testing.assert_close(log_penalty(distance, 0.5 / a, a), 0.5 * distance, rtol=1e-8, atol=0)


def least_eigenvalue(kernel: Tensor) -> float:
    """Of the kernel on vectors whose entries sum to zero."""
    n = len(kernel)
    centre = torch.eye(n, dtype=kernel.dtype) - 1 / n
    return float(torch.linalg.eigvalsh(centre @ kernel @ centre).min())


def test_the_kernels_are_conditionally_positive_definite_up_to_power_two() -> None:
    at = torch.arange(17, dtype=torch.float64)
    distance = (at[:, None] - at[None]).abs()
    one = torch.ones((), dtype=torch.float64)
    rounding = 1e-10
    assert least_eigenvalue(-log_penalty(distance, 1.7 * one, 0.3 * one)) > -rounding
    for p in (0.3, 1.0, 2.0):
        assert least_eigenvalue(-power_penalty(distance, p * one, 0.4 * one)) > -rounding
    assert least_eigenvalue(-power_penalty(distance, 2.5 * one, 0.4 * one)) < -1


def test_a_constant_added_to_the_kernel_changes_nothing() -> None:
    q, k, v = draw(2, 3, 13, 4), draw(2, 3, 13, 4, seed=2), draw(2, 3, 13, 4, seed=3)
    torch.manual_seed(0)
    bias = KerpleLog(heads=3).double().bias(q, k, AT, AT)
    one, other = (attention(q, k, v, bias=b, causal=True) for b in (bias, bias + 5))
    # rounding of the shifted scores
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_the_gradient_is_finite_at_distance_zero() -> None:
    position = filled(KerplePower(heads=3).double(), torch.tensor([0.01, 1.0, 2.0]), torch.ones(3))
    position.bias(draw(1, 3, 13, 4), draw(1, 3, 13, 4), AT, AT).sum().backward()
    assert position.p.grad is not None and position.p.grad.isfinite().all()


@pytest.mark.parametrize("cls", [KerpleLog, KerplePower])
def test_a_parameter_outside_its_bounds_counts_as_the_bound_and_can_come_back(cls: type) -> None:
    q = draw(1, 2, 13, 4)
    outside = filled(cls(heads=2).double(), torch.tensor([-1.0, 2.7]), torch.tensor([-0.3, -0.3]))
    high = 2.0 if cls is KerplePower else 2.7
    inside = filled(cls(heads=2).double(), torch.tensor([0.01, high]), torch.tensor([0.01, 0.01]))
    bias = outside.bias(q, q, AT, AT)
    torch.testing.assert_close(bias, inside.bias(q, q, AT, AT), rtol=1e-12, atol=0)
    bias.sum().backward()
    inside.bias(q, q, AT, AT).sum().backward()
    torch.testing.assert_close(outside.p.grad, inside.p.grad, rtol=1e-12, atol=0)
    assert (outside.a.grad != 0).all()
    outside.after_step()
    torch.testing.assert_close(outside.p, inside.p)
    torch.testing.assert_close(outside.a, inside.a)


def test_half_precision_tells_long_distances_apart() -> None:
    position = filled(KerpleLog(heads=1), torch.tensor([2.0]), torch.tensor([1.0])).bfloat16()
    q = torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)
    bias = position.bias(q, q, torch.tensor([[1001]]), torch.tensor([[0]]))
    # one rounding of the result, 2^-9 of it, and none of the distance before the logarithm
    assert float(bias.detach()) == pytest.approx(-2 * math.log(1002), rel=2**-8)
