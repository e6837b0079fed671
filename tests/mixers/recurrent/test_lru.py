from __future__ import annotations

import math

import pytest
import torch

from tevo.functional.scan import scan
from tevo.mixers.recurrent.lru import LRU, eigenvalues, lru_inputs


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_equals_a_convolution_with_the_kernel_of_the_powers_of_lambda() -> None:
    mixer, n = LRU(dim=5, state_dim=7).double(), 23
    u = torch.randn(2, n, 5, dtype=torch.float64)
    lam = eigenvalues(mixer.nu_log, mixer.theta_log)
    B = torch.complex(mixer.B_re, mixer.B_im) * mixer.gamma_log.exp()[:, None]
    C = torch.complex(mixer.C_re, mixer.C_im)
    powers = lam ** torch.arange(n)[:, None]  # n N
    kernel = torch.einsum("dN,tN,Ne->tde", C, powers, B).real
    f = torch.fft.rfft
    y = torch.einsum("tde,bte->btd", f(kernel, 2 * n, dim=0), f(u, 2 * n, dim=1))
    y = torch.fft.irfft(y, 2 * n, dim=1)[:, :n] + mixer.D * u
    torch.testing.assert_close(mixer.unit(u)[0], y, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("r_min", "r_max", "max_phase"), [(0.0, 1.0, 2 * math.pi), (0.9, 0.999, math.pi / 10)])
def test_initial_lambda_is_uniform_on_the_ring(r_min: float, r_max: float, max_phase: float) -> None:
    mixer = LRU(dim=3, state_dim=4001, r_min=r_min, r_max=r_max, max_phase=max_phase).double()
    size = (-mixer.nu_log.detach().exp()).exp()
    phase = mixer.theta_log.detach().exp()
    # the parameters are float32, the bounds are not
    assert float(size.min()) >= r_min - 1e-6 and float(size.max()) <= r_max + 1e-6
    assert float(phase.min()) >= 0 and float(phase.max()) <= max_phase + 1e-6
    # uniform over the area: the square of the radius is uniform, and so is the phase; mean of 4001 draws, 5 sigma
    share = (size**2 - r_min**2) / (r_max**2 - r_min**2)
    for draw in (share, phase / max_phase):
        assert abs(float(draw.mean()) - 0.5) < 5 / math.sqrt(12 * 4001)
    # gamma from a lambda rounded to float32: 1 - |lambda|^2 is as small as 2e-3 in the second case
    torch.testing.assert_close(mixer.gamma_log.exp(), (1 - size**2).sqrt(), rtol=1e-3, atol=1e-3)


def test_white_noise_keeps_the_variance_of_the_state_constant() -> None:
    mixer = LRU(dim=8, state_dim=301, r_min=0.3, r_max=0.9).double()
    u = torch.randn(8, 400, 8, dtype=torch.float64)
    lam = eigenvalues(mixer.nu_log, mixer.theta_log)
    x, _ = scan(lam, lru_inputs(u, mixer.gamma_log, mixer.B_re, mixer.B_im))
    energy = x.detach().abs().square().mean((0, 2))
    # E|x|^2 = E|B u|^2 = 1 once the start is forgotten (0.9^100 is)
    early, late = float(energy[100:250].mean()), float(energy[250:].mean())
    assert abs(early - 1) < 0.1 and abs(late - 1) < 0.1


def test_states_never_grow_whatever_the_parameters() -> None:
    lam = eigenvalues(10 * torch.randn(1000, dtype=torch.float64), 10 * torch.randn(1000, dtype=torch.float64))
    assert float(lam.abs().max()) <= 1


def test_padding_between_tokens_is_skipped() -> None:
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool).expand(2, -1)
    for causal in (True, False):
        mixer = LRU(dim=6, causal=causal).double()
        torch.testing.assert_close(mixer(x, mask=mask)[:, mask[0]], mixer(x[:, mask[0]]), rtol=0, atol=1e-14)


def test_refuses_a_ring_that_is_none_and_a_context() -> None:
    with pytest.raises(ValueError, match="0 <= r_min < r_max <= 1"):
        LRU(dim=3, r_min=0.9, r_max=0.5)
    with pytest.raises(ValueError, match="with itself only"):
        LRU(dim=3)(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="build it with causal=True"):
        LRU(dim=3, causal=False).init_state(1)
