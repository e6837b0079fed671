"""Average attention network: attention's weights become equal ones, and gates decide what of the average passes.

    m_t = (1/t) sum_{s<=t} x_s,    g_t = W_2 relu(W_1 m_t + b_1) + b_2
    [i_t; f_t] = sigmoid(W [x_t; g_t] + b),    y_t = i_t * x_t + f_t * g_t

The gates i, f are vectors of width d. Cost O(n d (d + f)) FLOPs with f the width of the feed-forward; state: the sum of the
tokens so far and their number.

Source: 1805.00631, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.masks import blank, check_mask, refuse_context

CARD = Card(
    id="average_attention_network",
    role="mixer",
    summary="Replaces attention by the running mean of the tokens, a feed-forward on it, and gates.",
    equations=(
        r"m_t = \frac{1}{t} \sum_{s \le t} x_s,\quad g_t = \mathrm{FFN}(m_t)",
        r"[i_t; f_t] = \sigma(W [x_t; g_t] + b),\quad y_t = i_t \odot x_t + f_t \odot g_t",
    ),
    exports={"average_attention_network": "AverageAttention"},
    cost="n",
    flops="4 * n * d * (hidden_dim or 4 * d) + 8 * n * d * d",
    state="d + 1",
    parameters="2 * d * (hidden_dim or 4 * d) + (hidden_dim or 4 * d) + 4 * d * d + 3 * d",
    memory="n",
    claims=("causal", "padding", "exact_state", "nan_contained"),
    examples=({"dim": 12}, {"dim": 5, "hidden_dim": 7}, {"dim": 3, "hidden_dim": 2}),
    departures=(
        "Dropout inside the feed-forward is left to the host, which drops the mixer's output.",
        "The mean is over real tokens, so that padding changes nothing; without padding this is the paper's.",
    ),
)


def running_mean(x: Tensor, count: Tensor, total: Tensor) -> Tensor:
    """``x`` (b, n, d) behind tokens that sum to ``total`` (b, d), ``count`` (#b, n) so far with each, gives (b, n, d)."""
    # sums grow with the length: half precision would stop counting
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.to(wide).cumsum(1) + total[:, None].to(wide)
    return (sums / count[..., None].clamp(min=1)).to(x.dtype)


class AverageAttention(TokenMixer):
    """Running mean, feed-forward and gates.

    Args:
        dim: width d.
        hidden_dim: width of the feed-forward; by default 4 dim, the paper's ratio.
        causal: there is no other form.
    """

    def __init__(self, *, dim: int, hidden_dim: int | None = None, causal: bool = True) -> None:
        super().__init__()
        if not causal:
            raise ValueError("AverageAttention averages over the past; build it with causal=True")
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.into = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)
        self.gates = nn.Linear(2 * dim, 2 * dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform matrices and zero biases, as the Transformer that it changes."""
        for linear in (self.into, self.out, self.gates):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); the order is that of the tokens, whatever ``at`` says."""
        return self.step(x, self.init_state(len(x), context=context), mask=mask)[0]

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The sum of the tokens so far (b, d) and their number (b,)."""
        refuse_context("AverageAttention", context)
        like = self.out.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        return like.new_zeros(batch, len(like), dtype=wide), like.new_zeros(batch, dtype=torch.long)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        assert isinstance(state, tuple)
        total, seen = state
        assert isinstance(total, Tensor) and isinstance(seen, Tensor)
        check_mask("AverageAttention", mask, x.shape[0], x.shape[1])
        x = blank(x, mask)
        real = torch.ones_like(x[..., 0], dtype=torch.long) if mask is None else mask.long()
        count = seen[:, None] + real.cumsum(1)
        g = self.out(F.relu(self.into(running_mean(x, count, total))))
        i, f = self.gates(torch.cat([x, g], -1)).sigmoid().chunk(2, dim=-1)
        return i * x + f * g, (total + x.to(total.dtype).sum(1), seen + real.sum(1))
