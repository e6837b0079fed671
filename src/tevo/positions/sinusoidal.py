"""Sinusoidal positions, added to the embeddings.

    x_t <- sqrt(d) x_t + p(t)
    p(t, 2j) = sin(t / 10000^(2j/d)),  p(t, 2j+1) = cos(t / 10000^(2j/d))

Source: 1706.03762, sections 3.4 and 3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Position

CARD = Card(
    id="sinusoidal",
    role="position",
    summary="Adds sines and cosines of the position to the token embeddings.",
    equations=(
        r"x_t \leftarrow \sqrt{d}\, x_t + p_t",
        r"p_{t,2j} = \sin(t\,\omega_j),\quad p_{t,2j+1} = \cos(t\,\omega_j),\quad \omega_j = 10000^{-2j/d}",
    ),
    exports={"sinusoidal": "Sinusoidal"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="0",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shared_across_layers"),
    examples=({}, {"base": 100.0}, {"base": 7.0}),
)


def sinusoid(at: Tensor, dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """(#b, n) gives (#b, n, d), sines and cosines interleaved; angles are made in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    omega = base ** (-torch.arange(0, dim, 2, device=at.device, dtype=wide) / dim)
    angle = at[..., None].to(wide) * omega
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :dim].to(dtype)


class Sinusoidal(Position):
    """Sines and cosines of the position.

    Args:
        base: wavelengths run from 2 pi to 2 pi base tokens.
    """

    def __init__(self, *, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """sqrt(d) ``x`` (b, n, d) plus the code of ``at`` (#b, n); the factor is the paper's (section 3.4)."""
        return x * x.shape[-1] ** 0.5 + sinusoid(at, x.shape[-1], self.base, x.dtype)
