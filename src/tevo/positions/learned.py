"""Learned positions: one trained vector per position, added to the embeddings.

    x_t <- x_t + P[t],   t < length

Source: 1705.03122, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Position

CARD = Card(
    id="learned",
    role="position",
    summary="Adds a trained vector per position to the token embeddings.",
    equations=(r"x_t \leftarrow x_t + P_t,\quad t < \mathrm{length}",),
    exports={"learned": "Learned"},
    cost="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "fixed_length", "shared_across_layers"),
    examples=({"dim": 12, "length": 40},),
)


class Learned(Position):
    """A table of positions.

    Args:
        dim: width d.
        length: positions 0..length-1 have a vector.
    """

    def __init__(self, *, dim: int, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as BERT and GPT-2 take it."""
        nn.init.normal_(self.table, std=0.02)

    def no_decay(self) -> set[str]:
        """The table is an embedding."""
        return {"table"}

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """``x`` (b, n, d) plus the vectors of ``at`` (#b, n).

        Raises:
            ValueError: the sequence is longer than the table.
        """
        if x.shape[1] > self.table.shape[0]:
            raise ValueError(
                f"Learned was built for length={self.table.shape[0]} tokens, got n={x.shape[1]}; rebuild with length>="
                f"{x.shape[1]}"
            )
        return x + self.table[at]
