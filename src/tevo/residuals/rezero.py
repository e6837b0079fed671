"""ReZero: each sublayer enters the stream with one learned weight that starts at zero; there is no norm.

    x <- x + alpha F_s(x),  s = 1..S,   alpha = 0 at the start

One alpha for all sublayers of a block. At the start every block is the identity; alpha has a gradient from the first step
on, the sublayers once alpha has moved. Cost O(n d), one parameter a block.

Source: 2003.04887, sections 3 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Residual, Sublayer

CARD = Card(
    id="rezero",
    role="residual",
    summary="No norms; each block's sublayers are weighted by one learned scalar that starts at zero.",
    equations=(r"x \leftarrow x + \alpha F_s(x),\quad \alpha_0 = 0",),
    exports={"rezero": "ReZero"},
    cost="n",
    parameters="1 if shared else sublayers",
    memory="n",
    claims=("identity_at_start",),
    examples=({}, {"shared": False}, {"shared": False, "sublayers": 2}),
    equals=("majumderb/rezero RZTXEncoderLayer and RZTXDecoderLayer; values in tests/golden/rezero_a.npz",),
    notes="alpha often wants a larger learning rate than the rest; norms inside sublayers defeat the purpose.",
)


class ReZero(Residual):
    """ReZero wiring.

    Args:
        shared: one alpha for all sublayers of the block, as in the paper; otherwise one for each.
        sublayers: number of sublayers in the block.
    """

    def __init__(self, *, shared: bool = True, sublayers: int = 2) -> None:
        super().__init__()
        self.sublayers = sublayers
        self.alpha = nn.Parameter(torch.empty(1 if shared else sublayers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Exactly zero: the block starts as the identity."""
        nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """(b, n, d) through all sublayers."""
        for alpha, sublayer in zip(self.alpha.expand(self.sublayers), sublayers, strict=True):
            x = x + alpha * sublayer(x)
        return x
