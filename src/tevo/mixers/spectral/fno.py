"""Fourier neural operator: a matrix of its own for each of the lowest frequencies, beside one for each token.

    y = act(x W + c + K x),   K x = IFFT(Y)                                                                  (1)
    Y_k = V_k R_k for the lowest m frequencies k, 0 for all others,   V = FFT(x) along the tokens            (2)

On a grid, frequencies are pairs: the lowest m_1 of either sign along the rows, each sign with matrices of its own, and
the lowest m_2 along the columns. R_k is complex (d, d), stored as pairs of reals. Because R belongs to frequencies and
not to tokens, the same layer works on a finer sampling of the same functions. Cost O(n d log n + m d^2); every output
sees every input, so there is no causal form and no padding.

Source: 2010.08895, section 4, and its released code of 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import TokenMixer
from tevo.functional.masks import refuse_context, refuse_mask
from tevo.functional.precision import island

CARD = Card(
    id="fno",
    role="mixer",
    summary="Mixes tokens by a complex matrix for each of the lowest frequencies, beside a linear map of each token.",
    equations=(
        r"y = \sigma\!\left(x W + c + \mathcal{F}^{-1}(Y)\right)",
        r"Y_k = \mathcal{F}(x)_k\, R_k\ \ (k < m),\quad Y_k = 0\ \text{otherwise}",
    ),
    exports={"fno": "FNO"},
    cost="n log n",
    parameters="d * d * (2 * modes if grid is None else 4 * modes[0] * modes[1]) + d * d + d",
    memory="n",
    claims=("bidirectional", "grid"),
    examples=(
        {"dim": 12, "modes": 4},
        {"dim": 5, "modes": (2, 3), "grid": (7, 4), "activation": False},
        {"dim": 4, "modes": 40},
        {"dim": 3, "modes": (4, 9), "grid": (5, 6)},
    ),
    equals=(
        "zongyi-li/fourier_neural_operator at 4d3e0c32: SpectralConv1d and 2d, FNO1d and FNO2d composed of this mixer; "
        "values in tests/golden/fno_a.npz",
    ),
    departures=(
        "Frequencies that a short sequence does not have are left out; the released code fails there.",
        "The lifting, coordinates, projection and padding of the paper's whole model are the host's.",
    ),
    notes=(
        "The order of the tokens is that of the tensor, on a grid row-major; the ends are joined (periodic), so pad other "
        "functions with zeros. activation=False is the paper's last layer. Initial matrices are positive, as released."
    ),
)


def spectral_conv(x: Tensor, R: Tensor) -> Tensor:
    """Equation (2) along a line: ``x`` (b, n, i), complex ``R`` (m, i, o) give (b, n, o)."""
    n = x.shape[1]
    kept = min(R.shape[0], n // 2 + 1)
    V = torch.fft.rfft(x, dim=1)[:, :kept]
    return torch.fft.irfft(_by_frequency(V, R[:kept]), n=n, dim=1)


def spectral_conv_2d(x: Tensor, R: Tensor) -> Tensor:
    """Equation (2) on a grid: ``x`` (b, rows, columns, i), complex ``R`` (2, m_1, m_2, i, o) give (b, rows, columns, o).

    ``R[1]`` holds the negative frequencies of the rows; where both signs would meet, it has precedence.
    """
    rows, columns = x.shape[1:3]
    high, wide = min(R.shape[1], rows), min(R.shape[2], columns // 2 + 1)
    V = torch.fft.rfft2(x, dim=(1, 2))[:, :, :wide]
    # the rows of R[0] that R[1] does not take
    low = min(high, rows - high)
    top = _by_frequency(V[:, :low], R[0, :low, :wide])
    bottom = _by_frequency(V[:, rows - high :], R[1, R.shape[1] - high :, :wide])
    between = top.new_zeros(top.shape[0], rows - low - high, *top.shape[2:])
    return torch.fft.irfft2(torch.cat([top, between, bottom], 1), s=(rows, columns), dim=(1, 2))


def _by_frequency(V: Tensor, R: Tensor) -> Tensor:
    """One product for each frequency: V (b, ..., i), R (..., i, o) give (b, ..., o)."""
    return (V.movedim(0, -2) @ R).movedim(-2, 0)


class FNO(TokenMixer):
    """A Fourier layer.

    Args:
        dim: width d.
        modes: frequencies kept, m; on a grid one number for both axes, or (m_1, m_2).
        grid: (rows, columns); None is a sequence of any length.
        activation: whether GELU ends the layer.
    """

    def __init__(
        self,
        *,
        dim: int,
        modes: int | tuple[int, int] = 16,
        grid: tuple[int, int] | None = None,
        activation: bool = True,
    ) -> None:
        super().__init__()
        kept = (modes, modes) if isinstance(modes, int) else tuple(modes)
        if min(kept) < 1 or (grid is None and not isinstance(modes, int)):
            raise ValueError(
                f"FNO got modes={modes}, grid={grid}; expected modes >= 1, and one number of modes without a grid"
            )
        self.dim, self.grid, self.activation = dim, grid, activation
        shape = (kept[0],) if grid is None else (2, *kept)
        self.R = nn.Parameter(torch.empty(*shape, dim, dim, 2))
        self.token = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Real and imaginary parts uniform in [0, 1 / d^2), as in the released code; the linear map as torch's own."""
        nn.init.uniform_(self.R, 0, self.dim**-2)
        self.token.reset_parameters()

    def regrid(self, grid: tuple[int, int]) -> None:
        """Work on a grid of another size, with the same weights."""
        if self.grid is None:
            raise ValueError(
                "FNO was built for a sequence and has no grid to change; build it with grid=(rows, columns)"
            )
        self.grid = grid

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); the order of the tokens is that of the tensor, whatever ``at`` says.

        Raises:
            ValueError: a context, a mask, or another number of tokens than the grid's.
        """
        refuse_mask("FNO", mask)
        refuse_context("FNO", context)
        y = self.token(x)
        if x.numel():
            y = y + self._convolve(x)
        return F.gelu(y) if self.activation else y

    def _convolve(self, x: Tensor) -> Tensor:
        # there are no transforms in half precision
        wide = torch.promote_types(x.dtype, torch.float32)
        with island(x):
            R = torch.view_as_complex(self.R.to(wide))
            if self.grid is None:
                return spectral_conv(x.to(wide), R).to(x.dtype)
            if x.shape[1] != self.grid[0] * self.grid[1]:
                raise ValueError(
                    f"FNO was built for grid={self.grid}, {self.grid[0] * self.grid[1]} tokens, got {x.shape[1]}; call "
                    "regrid() with the grid of the inputs"
                )
            return spectral_conv_2d(x.to(wide).unflatten(1, self.grid), R).flatten(1, 2).to(x.dtype)
