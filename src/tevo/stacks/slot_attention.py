"""Slot Attention as a resampler: k slots compete for the tokens, and stand for them from there on.

    y = LN(x),  s = mu + exp(log_sigma) * noise                                                           (1)
    repeat T times: a = softmax over slots of (LN(s) Wq) (y Wk)^T / sqrt(d),  w = a + 1e-8                 (2)
                    u = sum_n w_n (y_n Wv) / sum_n w_n                                                     (3)
                    s <- GRU(input u, state s),  s <- s + MLP(LN(s))                                       (4)

The softmax is over the slots, not the tokens: each token is shared out, so slots divide the tokens among themselves.
Cost O(T k n d), linear in n; no order among tokens or slots, and no causal form. :class:`tevo.SlotAttention` is the module
inside, with all its variants; this is the paper's, in the seat of a stack.

Source: 2006.15055, section 2 and the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Stack
from tevo.functional.masks import blank, check_mask
from tevo.slot_attention.module import SlotAttention

CARD = Card(
    id="slot_attention",
    role="stack",
    summary="Replaces the stack by a few slots that compete for the tokens, again and again, until each explains a part.",
    equations=(
        r"A = \mathop{\mathrm{softmax}}_{\text{slots}} \frac{(\mathrm{LN}(S) W_q)(\mathrm{LN}(X) W_k)^\top}{\sqrt{d}},\quad"
        r" W_{in} = \frac{A_{in} + \epsilon}{\sum_l (A_{il} + \epsilon)}",
        r"S \leftarrow \mathrm{GRU}(W\, \mathrm{LN}(X) W_v,\ S),\quad S \leftarrow S + \mathrm{MLP}(\mathrm{LN}(S))"
        r"\quad T\ \text{times}",
    ),
    exports={"slot_attention": "SlotResampler"},
    cost="n",
    flops=(
        "(lambda w, rows, enough: rows * (6 * w**2 + 4 * w * hidden_dim) "
        "+ (8 * w**2 * d + 4 * rows * d * (n + 2 * w) if rows * d * (enough + w) <= enough * w * (d + rows) "
        "else 8 * w**2 * rows + 4 * n * w * (d + rows)))(slot_dim or d, iterations * num_slots, max(n, 2048))"
    ),
    parameters="(lambda w: 2 * d * (w + 1) + 7 * w * w + 13 * w + hidden_dim * (2 * w + 1))(slot_dim or d)",
    memory="n",
    claims=("bidirectional", "padding"),
    examples=(
        {"dim": 12, "num_slots": 5, "hidden_dim": 7},
        {"dim": 9, "num_slots": 3, "slot_dim": 6, "iterations": 2, "hidden_dim": 10},
        {"dim": 5, "num_slots": 2, "slot_dim": 8, "iterations": 1, "hidden_dim": 3},
    ),
    equals=(
        "google-research slot_attention/model.py at 0c1bbe5f: slots and all gradients; values in "
        "tests/golden/slot_attention/sa_module_a.npz",
    ),
    departures=(
        "In evaluation the noise that slots start from is a buffer, drawn once and the same for every row, so that two calls "
        "agree; the reference draws in evaluation too, as this does in training.",
        "A row of padding alone keeps its initial slots; the reference has no mask.",
    ),
    notes=(
        "The output has one vector of width slot_dim for each slot, of which a head takes the mean. Permuting the inputs "
        "changes nothing: give them positions. Keys and values are never made where that takes fewer FLOPs for 2048 tokens."
    ),
)


class SlotResampler(Stack):
    """Slot Attention in the seat of a stack.

    Args:
        dim: width d of the inputs.
        num_slots: number of slots k.
        slot_dim: width of a slot and so of the outputs; by default dim, which the house's heads expect.
        iterations: T.
        hidden_dim: width inside the MLP.
    """

    noise: Tensor

    def __init__(
        self,
        *,
        dim: int,
        num_slots: int = 7,
        slot_dim: int | None = None,
        iterations: int = 3,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        self.attention = SlotAttention(
            dim=dim if slot_dim is None else slot_dim,
            num_slots=num_slots,
            input_dim=dim,
            iterations=iterations,
            hidden_dim=hidden_dim,
        )
        self.register_buffer("noise", torch.randn(1, num_slots, self.attention.dim))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, k, slot_dim); inputs are a set, whatever ``at`` says."""
        b, n = x.shape[:2]
        check_mask("SlotResampler", mask, b, n)
        noise = None if self.training else self.noise.expand(b, -1, -1)
        start = self.attention.initial_slots(b, noise=noise)
        if b == 0 or n == 0:
            return start
        if mask is None:
            return self.attention(x, slots=start)
        # a row of padding alone is read as if it were real, and what was read is thrown away
        real = mask.any(1, keepdim=True)
        y = self.attention(blank(x, mask), slots=start, mask=mask | ~real)
        return torch.where(real[..., None], y, start)

    def outputs(self, mask: Tensor | None, n: int) -> tuple[Tensor | None, int]:
        """All k slots are real."""
        return None, self.attention.num_slots
