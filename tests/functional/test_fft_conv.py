from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tevo.functional.fft_conv import direct_conv, fft_conv, short_conv

B, D = 2, 3


def make(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*s, dtype=torch.float64, generator=rng).requires_grad_() for s in shapes)


@pytest.mark.parametrize(
    ("n", "taps", "ahead"), [(1, 1, 0), (13, 7, None), (13, 13, None), (13, 40, 20), (40, 3, 5), (17, 1, 16)]
)
def test_transform_equals_the_toeplitz_matrix(n: int, taps: int, ahead: int | None) -> None:
    u, h, back = make((B, n, D), (D, taps), (D, ahead or 0))
    given = None if ahead is None else back
    mine, plain = fft_conv(u, h, back=given), direct_conv(u, h, back=given)
    torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-12)
    weight = torch.linspace(-1, 2, mine.numel(), dtype=torch.float64).view(mine.shape)
    inputs = (u, h) if ahead is None else (u, h, back)
    g_mine, g_plain = (torch.autograd.grad((y * weight).sum(), inputs) for y in (mine, plain))
    torch.testing.assert_close(g_mine, g_plain, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("form", [fft_conv, direct_conv])
def test_equals_the_sum_over_taps(form) -> None:
    u, h, back = make((B, 13, D), (D, 5), (D, 4))
    expected = torch.zeros_like(u)
    for t in range(13):
        for j in range(5):
            if t - j >= 0:
                expected[:, t] += h[:, j] * u[:, t - j]
        for j in range(4):
            if t + 1 + j < 13:
                expected[:, t] += back[:, j] * u[:, t + 1 + j]
    torch.testing.assert_close(form(u, h, back=back), expected, rtol=1e-12, atol=1e-12)


def test_future_inputs_do_not_change_the_past_beyond_rounding() -> None:
    u, h = make((B, 50, D), (D, 60))
    y = fft_conv(u, h)
    for t in (0, 20, 48):
        (g,) = torch.autograd.grad(y[:, t].sum(), u, retain_graph=True)
        assert g[:, t + 1 :].abs().max() <= 1e-12 * g.abs().max()
        assert g[:, t].abs().min() > 1e-3


def test_first_and_second_derivatives_are_exact() -> None:
    u, h, back = make((1, 5, 2), (2, 4), (2, 3))
    run = lambda u, h, back: fft_conv(u, h, back=back)  # noqa: E731
    assert gradcheck(run, (u, h, back))
    assert gradgradcheck(run, (u, h, back))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    u, h = (t.detach().to(dtype) for t in make((B, 300, D), (D, 300)))
    y = fft_conv(u, h)
    assert y.dtype == dtype
    # one rounding of the result, and float32 errors of sums of about 17
    torch.testing.assert_close(y.double(), direct_conv(u.double(), h.double()), rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("splits", [(13,), (1,) * 13, (0, 2, 7, 4), (5, 0, 8)])
@pytest.mark.parametrize("taps", [1, 4, 20])
def test_short_convolution_in_any_split_equals_the_long_one(taps: int, splits: tuple[int, ...]) -> None:
    u, h, bias = make((B, 13, D), (D, taps), (D,))
    expected = direct_conv(u, h) + bias
    state, parts = None, []
    for piece in u.split(splits, 1):
        y, state = short_conv(piece, h, bias=bias, state=state)
        assert state.shape == (B, taps - 1, D)
        parts.append(y)
    mine = torch.cat(parts, 1)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 2, mine.numel(), dtype=torch.float64).view(mine.shape)
    g_mine, g_plain = (torch.autograd.grad((y * weight).sum(), (u, h, bias)) for y in (mine, expected))
    torch.testing.assert_close(g_mine, g_plain, rtol=1e-11, atol=1e-12)


def test_no_tokens_give_no_tokens() -> None:
    u, h = make((B, 0, D), (D, 4))
    assert fft_conv(u, h).shape == direct_conv(u, h).shape == (B, 0, D)
    y, state = short_conv(u, h)
    assert y.shape == (B, 0, D) and (state == 0).all()


@pytest.mark.parametrize("n", [9, 10])
def test_compiles_to_one_graph(n: int) -> None:
    u, h = make((B, n, D), (D, 7))
    compiled = torch.compile(fft_conv, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(u, h), fft_conv(u, h), rtol=1e-12, atol=1e-12)


def test_vmap_over_kernels_equals_a_loop() -> None:
    u, h = make((B, 9, D), (4, D, 7))
    mapped = torch.func.vmap(fft_conv, in_dims=(None, 0))(u, h)
    looped = torch.stack([fft_conv(u, one) for one in h])
    torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-12)


def test_refuses_shapes_that_do_not_fit() -> None:
    u, h = make((B, 9, D), (D, 7))
    with pytest.raises(ValueError, match="u of shape"):
        fft_conv(u[0], h)
    with pytest.raises(ValueError, match="h of shape"):
        fft_conv(u, h.mT)
    with pytest.raises(ValueError, match="back of shape"):
        direct_conv(u, h, back=h[:2])
    with pytest.raises(ValueError, match="at least one tap"):
        short_conv(u, h[:, :0])
    with pytest.raises(ValueError, match="state of shape"):
        short_conv(u, h, state=u)
