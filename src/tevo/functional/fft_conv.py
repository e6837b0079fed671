"""Long and short convolutions of every channel with its own kernel: the core of Hyena, S4 and other filter mixers.

    y_t = sum_{j=0}^{l-1} h_j u_{t-j} + sum_{j=0}^{l'-1} h'_j u_{t+1+j},    u = 0 outside 1..n; causal without h'

Cost of the FFT form: O(n log n) FLOPs a channel, whatever l. It is causal to rounding only: the transform carries errors of
about 1e-16 (float64) of the largest input into the past, and a NaN everywhere. Letters: b batch, n tokens, d channels,
l taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["direct_conv", "fft_conv", "short_conv"]


def fft_conv(u: Tensor, h: Tensor, *, back: Tensor | None = None) -> Tensor:
    """Convolve by the fast Fourier transform, padded so that nothing wraps round.

    Half precision is computed in float32; y comes back in the dtype of u.

    Args:
        u: inputs (b, n, d).
        h: taps (d, l) at lags 0, 1, ...; those beyond n have no effect.
        back: taps h' (d, l') at lags -1, -2, ..., for a convolution that also looks ahead; None is causal.

    Returns:
        y (b, n, d).

    Raises:
        ValueError: if the shapes do not fit.
    """
    n = _check("fft_conv", u, h, back)
    if u.numel() == 0:
        return u
    dtype = torch.promote_types(u.dtype, h.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    x, h = u.to(dtype).mT, h.to(dtype)[:, :n]  # b d n
    ahead = 0
    if back is not None:
        back = back.to(dtype)[:, : n - 1]
        ahead = back.shape[1]
    size = _fast_size(n + max(h.shape[1] - 1, ahead))
    if back is not None:
        # lag -1 is the last place of the circle
        h = torch.cat([F.pad(h, (0, size - h.shape[1] - ahead)), back.flip(-1)], -1)
    y = torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(h, n=size), n=size)
    return y[..., :n].mT.to(u.dtype)


def direct_conv(u: Tensor, h: Tensor, *, back: Tensor | None = None) -> Tensor:
    """The plain form of :func:`fft_conv`: one n x n Toeplitz matrix per channel. The reference; O(n^2 d) memory."""
    n = _check("direct_conv", u, h, back)
    lag = torch.arange(n, device=u.device)[:, None] - torch.arange(n, device=u.device)  # t s
    matrix = _look_up(h, lag)
    if back is not None:
        matrix = matrix + _look_up(back, -1 - lag)
    return torch.einsum("dts, bsd -> btd", matrix, u)


def short_conv(
    u: Tensor, h: Tensor, *, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal convolution with few taps, carrying the last inputs along.

    Args:
        u: inputs (b, n, d).
        h: taps (d, l) at lags 0, 1, ..., l >= 1; above about 64, :func:`fft_conv` trains faster.
        bias: addend (d,), or None.
        state: the l - 1 inputs before u (b, l - 1, d); None is zeros.

    Returns:
        y (b, n, d), and the last l - 1 inputs (b, l - 1, d).

    Raises:
        ValueError: if the shapes do not fit.
    """
    n = _check("short_conv", u, h, None)
    b, _, d = u.shape
    reach = h.shape[1] - 1
    if state is None:
        state = u.new_zeros(b, reach, d)
    elif state.shape != (b, reach, d):
        raise ValueError(
            f"short_conv got state of shape {tuple(state.shape)}, expected (b, l - 1, d) = {(b, reach, d)}"
        )
    x = torch.cat([state, u], 1)
    after = x[:, n:]
    if n == 0:
        return u, after
    return F.conv1d(x.mT, h.flip(-1)[:, None], bias, groups=d).mT, after


def _check(name: str, u: Tensor, h: Tensor, back: Tensor | None) -> int:
    if u.dim() != 3:
        raise ValueError(f"{name} got u of shape {tuple(u.shape)}, expected (b, n, d)")
    for what, taps in (("h", h), ("back", back)):
        if taps is not None and (
            taps.dim() != 2 or taps.shape[0] != u.shape[2] or (what == "h" and taps.shape[1] == 0)
        ):
            raise ValueError(
                f"{name} got {what} of shape {tuple(taps.shape)} for u {tuple(u.shape)}, expected (d, taps) with at least "
                "one tap"
            )
    return u.shape[1]


def _fast_size(least: int) -> int:
    """The smallest even number >= least whose only prime factors are 2, 3 and 5: up to 30 times faster than a prime."""
    size = least + least % 2
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def _look_up(taps: Tensor, lag: Tensor) -> Tensor:
    """The tap of ``taps`` (d, l) at each ``lag`` (t, s), 0 where there is none: (d, t, s)."""
    there = (lag >= 0) & (lag < taps.shape[1])
    padded = F.pad(taps, (0, 1))
    return padded[:, lag.where(there, taps.shape[1])]
