from __future__ import annotations

import pytest
import torch

from tevo.mixers.spectral.fnet import FNet, fourier_mix


def tokens(n: int, d: int) -> torch.Tensor:
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(13, 12), (7, 5), (8, 6), (1, 3), (4, 1)])
def test_mixing_twice_adds_the_mirrored_input(n: int, d: int) -> None:
    # y_ab = Re(..) twice is (n d / 2)(x_ab + x_(-a)(-b)), an identity of the real part of the transform
    x = tokens(n, d)
    mirrored = torch.roll(x.flip(1, 2), (1, 1), (1, 2))
    torch.testing.assert_close(fourier_mix(fourier_mix(x)), (n * d / 2) * (x + mirrored), rtol=1e-12, atol=1e-10)


def test_an_impulse_at_the_origin_becomes_all_ones() -> None:
    x = torch.zeros(1, 7, 5)
    x[0, 0, 0] = 1.0
    torch.testing.assert_close(FNet(dim=5)(x), torch.ones(1, 7, 5))


def test_gradients_of_gradients_agree_with_finite_differences() -> None:
    x = tokens(5, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: fourier_mix(z).pow(3), (x,))


def test_half_precision_is_computed_in_float32() -> None:
    x = tokens(13, 12).bfloat16()
    y = fourier_mix(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fourier_mix(x.float()).bfloat16())


def test_what_it_cannot_honour_is_refused() -> None:
    x = tokens(7, 5)
    with pytest.raises(ValueError, match="context"):
        FNet(dim=5)(x, x)
    with pytest.raises(ValueError, match="dim=6"):
        FNet(dim=6)(x)
