"""ALiBi: a penalty linear in distance, with one fixed slope per head.

    s_ij <- s_ij - m_h |i - j|,   m_h = 2^(-8 h / H),  h = 1..H

Source: 2108.12409, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Position

CARD = Card(
    id="alibi",
    role="position",
    summary="Subtracts from each score a fixed slope times the distance.",
    equations=(r"s_{ij} \leftarrow s_{ij} - m_h |i - j|", r"m_h = 2^{-8h/H},\quad h = 1, \dots, H"),
    exports={"alibi": "ALiBi"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="0",
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shift_invariant", "shared_across_layers"),
    examples=({"heads": 3}, {"heads": 4}, {"heads": 12}),
    equals=("transformers 5.23.0 BloomAttention; values in tests/golden/softmax_alibi_a.npz",),
    departures=(
        "The paper is causal; with later keys visible the penalty is symmetric in the distance.",
        "Head counts that are no power of two take the paper's code's rule: slopes of the next lower power, then every "
        "other slope of the next higher one.",
    ),
)


def exponents(heads: int) -> list[float]:
    """The base-2 logarithms of the slopes m_h, in the order of the heads."""
    lower = 2 ** math.floor(math.log2(heads))
    own = [-8 * (h + 1) / lower for h in range(lower)]
    extra = [-8 * (h + 1) / (2 * lower) for h in range(0, 2 * (heads - lower), 2)]
    return own + extra


class ALiBi(Position):
    """Attention with linear biases."""

    exponents: Tensor

    def __init__(self, *, heads: int) -> None:
        super().__init__()
        # unlike the slopes, their exponents are exact in every dtype that the model may be moved to
        self.register_buffer("exponents", torch.tensor(exponents(heads)), persistent=False)

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(#b, h, n, m)."""
        # half precision cannot tell long distances apart before they are multiplied
        wide = torch.promote_types(q.dtype, torch.float32)
        slopes = self.exponents.to(wide).exp2()[:, None, None]
        distance = (q_at[:, :, None] - k_at[:, None, :]).abs()[:, None]  # b 1 n m
        return -(slopes * distance).to(q.dtype)
