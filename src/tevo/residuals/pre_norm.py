"""Pre-norm: each sublayer reads a normalised stream and adds to the plain one; one more norm ends the stack.

    x <- x + F_s(N_s(x)),  s = 1..S;   after the last block  x <- N(x)

Source: 2002.04745, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import create
from tevo.contracts import Residual, Sublayer

CARD = Card(
    id="pre_norm",
    role="residual",
    summary="Norm before each sublayer, plain residual stream, one norm at the end of the stack.",
    equations=(r"x \leftarrow x + F_s(N_s(x))",),
    exports={"pre_norm": "PreNorm"},
    cost="n",
    parameters="(sublayers + (1 if depth and index == depth - 1 else 0)) * (2 * d if norm == 'layer_norm' else d)",
    memory="n",
    examples=({"dim": 12}, {"dim": 5, "norm": "rms_norm", "sublayers": 3}, {"dim": 4, "depth": 2, "index": 1}),
)


class PreNorm(Residual):
    """Pre-norm wiring.

    Args:
        dim: width d.
        norm: a norm's name or class.
        sublayers: number of sublayers in the block.
        depth: blocks in the stack.
        index: which of them this is, from 0; the last one ends with the stack's final norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        norm: str = "layer_norm",
        sublayers: int = 2,
        depth: int | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(create(norm, facts={"dim": dim}) for _ in range(sublayers))
        last = depth is not None and index == depth - 1
        self.final = create(norm, facts={"dim": dim}) if last else None

    def forward(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """(b, n, d) through all sublayers."""
        for norm, sublayer in zip(self.norms, sublayers, strict=True):
            x = x + sublayer(norm(x))
        return x if self.final is None else self.final(x)
