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
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="length * d",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "fixed_length", "shared_across_layers"),
    examples=({"dim": 12, "length": 40}, {"dim": 6, "length": 17}, {"dim": 3, "length": 11}),
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
            ValueError: a position lies beyond the table (read from the CPU only, and not while compiling).
        """
        length, needed = self.table.shape[0], x.shape[1]
        if at.device.type == "cpu" and at.numel() and not torch.compiler.is_compiling():
            # decoding asks for one token far along
            needed = max(needed, int(at.max()) + 1)
        if needed > length:
            raise ValueError(
                f"Learned was built for length={length} tokens, got {needed}; rebuild with length>={needed}"
            )
        return x + self.table[at]
