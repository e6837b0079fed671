"""Rotary positions (RoPE): queries and keys are turned by angles that grow with position; scores see differences only.

    f(q, t) = R_t q,   R_t turns the pair (q_{2j}, q_{2j+1}) by t theta_j,   theta_j = base^(-2j/e)
    <f(q, s), f(k, t)> depends on s - t alone

The first half of the features is paired with the second half (pair (j, j + e/2)), as GPT-NeoX and Llama store weights.

Source: 2104.09864, section 3.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Position

CARD = Card(
    id="rope",
    role="position",
    summary="Turns queries and keys by angles proportional to position, so that scores see distances only.",
    equations=(
        r"f(q, t)_j = e^{i t \theta_j} (q_j + i\, q_{j + e/2})",
        r"\theta_j = \mathrm{base}^{-2j/e},\quad j = 0, \dots, e/2 - 1",
    ),
    exports={"rope": "RoPE"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="0",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shift_invariant", "shared_across_layers"),
    examples=({}, {"base": 100.0}, {"base": 7.0}),
    equals=("transformers 5.23.0 LlamaAttention and LlamaRotaryEmbedding; values in tests/golden/softmax_rope_a.npz",),
    departures=(
        "Features are paired (j, j + e/2) as in GPT-NeoX and Llama instead of (2j, 2j + 1) as in the paper: a fixed "
        "permutation of the query and key features, so that trained models are equivalent and weights are interchangeable "
        "with transformers.",
    ),
)


def rotate(x: Tensor, at: Tensor, base: float) -> Tensor:
    """``x`` (b, h, n, e) at ``at`` (#b, n) turned; angles are made in at least float32."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    theta = base ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = at[:, None, :, None].to(wide) * theta  # b 1 n e/2
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class RoPE(Position):
    """Rotary positions.

    Args:
        base: wavelengths run from 2 pi to 2 pi base tokens.
    """

    def __init__(self, *, base: float = 10000.0) -> None:
        super().__init__()
        self.base = base

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Q (b, h, n, e) and k (b, g, m, e), turned.

        Raises:
            ValueError: e is odd.
        """
        if q.shape[-1] % 2:
            raise ValueError(f"RoPE turns pairs of features, got head width {q.shape[-1]}; choose an even dim / heads")
        return rotate(q, q_at, self.base), rotate(k, k_at, self.base)
