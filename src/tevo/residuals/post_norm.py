"""Post-norm: the original wiring, a norm after each residual addition.

    x <- N_s(x + F_s(x)),  s = 1..S

Source: 1706.03762, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import create
from tevo.contracts import Residual, Sublayer

CARD = Card(
    id="post_norm",
    role="residual",
    summary="Norm after each residual addition.",
    equations=(r"x \leftarrow N_s(x + F_s(x))",),
    exports={"post_norm": "PostNorm"},
    cost="n",
    parameters="sublayers * (2 * d if norm == 'layer_norm' else d)",
    memory="n",
    examples=({"dim": 12}, {"dim": 5, "norm": "rms_norm", "sublayers": 3}, {"dim": 2, "sublayers": 1}),
)


class PostNorm(Residual):
    """Post-norm wiring.

    Args:
        dim: width d.
        norm: a norm's name or class.
        sublayers: number of sublayers in the block.
    """

    def __init__(self, *, dim: int, norm: str = "layer_norm", sublayers: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(create(norm, facts={"dim": dim}) for _ in range(sublayers))

    def forward(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """(b, n, d) through all sublayers."""
        for norm, sublayer in zip(self.norms, sublayers, strict=True):
            x = norm(x + sublayer(x))
        return x
