from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tevo.mixers.convolution.hyena import Hyena, positional_features


def build(**options: object) -> Hyena:
    torch.manual_seed(0)
    return Hyena(dim=6, length=19, emb_dim=5, filter_dim=7, **options).double()  # type: ignore[arg-type]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_filter_of_one_tap_leaves_the_gates_alone(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build()

    def one_tap(n: int) -> Tensor:
        return torch.eye(n, dtype=torch.float64)[:, :1].expand(-1, 6)

    monkeypatch.setattr(mixer, "filter", one_tap)
    torch.nn.init.zeros_(mixer.skip)
    # the short filter keeps the current token
    torch.nn.init.zeros_(mixer.short_bias)
    mixer.short.data = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(18, 1)
    first, second, v = mixer.into(x).chunk(3, -1)
    torch.testing.assert_close(mixer(x), mixer.out(first * second * v), rtol=0, atol=1e-13)


def test_order_two_is_a_toeplitz_matrix_between_two_gates(x: Tensor) -> None:
    mixer, n = build(), 13
    z = mixer.into(x)
    padded = torch.cat([z.new_zeros(2, 2, 18), z], 1)
    short = sum(padded[:, 2 - lag : 2 - lag + n] * mixer.short[:, lag] for lag in range(3)) + mixer.short_bias
    first, second, v = short.chunk(3, -1)
    lag = torch.arange(n)[:, None] - torch.arange(n)
    h = mixer.filter(n)
    T = h[lag.clamp(min=0)].masked_fill((lag < 0)[..., None], 0.0) + torch.eye(n)[..., None] * mixer.skip[0]
    y = first * torch.einsum("tsd,bsd->btd", T, second * v)
    torch.testing.assert_close(mixer(x), mixer.out(y), rtol=0, atol=1e-12)


def test_positions_are_told_apart_by_time_and_by_rotations_of_the_unit_circle() -> None:
    z = positional_features(19, 5)
    torch.testing.assert_close(z[:, 0], torch.linspace(0, 1, 19, dtype=torch.float64))
    torch.testing.assert_close(z[:, 1:3].square() + z[:, 3:].square(), torch.ones(19, 2, dtype=torch.float64))
    # the faster band turns once over the length, clockwise
    assert float(z[1, 4]) == pytest.approx(-math.sin(2 * math.pi / 19))


def test_fewer_tokens_use_the_first_taps_of_the_same_filter() -> None:
    mixer = build()
    # products of other sizes round otherwise, and three sines of frequency 14 magnify it
    torch.testing.assert_close(mixer.filter(5), mixer.filter(19)[:5], rtol=0, atol=1e-12)


def test_the_window_falls_faster_from_channel_to_channel() -> None:
    window = build(order=3).window(19)
    assert window.shape == (19, 12)
    assert bool((window[0] == 1).all()) and bool((window.diff(dim=0) < 0).all())
    assert bool((window[1:].diff(dim=1) < 0).all())
    assert float(window[-1, 0]) == pytest.approx(1e-2 ** (1 / 1.5))


def test_more_tokens_than_the_length_are_refused_at_once_and_step_by_step(x: Tensor) -> None:
    mixer = build()
    long = torch.cat([x, x], 1)
    with pytest.raises(ValueError, match=r"built for length=19 tokens, got n=26; rebuild with length>=26"):
        mixer(long)
    _, state = mixer.step(x, mixer.init_state(2))
    with pytest.raises(ValueError, match="got n=26"):
        mixer.step(x, state)


def test_refuses_what_it_has_no_form_for(x: Tensor) -> None:
    with pytest.raises(ValueError, match="causal=True"):
        build(causal=False)
    with pytest.raises(ValueError, match="odd emb_dim"):
        Hyena(dim=6, length=19, emb_dim=4)
    with pytest.raises(ValueError, match="order >= 2"):
        build(order=1)
    with pytest.raises(ValueError, match="with itself only"):
        build()(x, x)
