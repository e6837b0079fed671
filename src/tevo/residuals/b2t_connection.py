"""B2T: post-norm with one more connection, from the bottom of the block to just before its last norm.

    a_0 = x
    a_s = N_s(a_{s-1} + F_s(a_{s-1})),              s = 1..S-1
    y = N_S(x + a_{S-1} + F_S(a_{S-1}))

The gradient has a way through the block that passes one norm instead of S. Cost O(n d), no parameters beyond post-norm's.

Source: 2206.00330, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import create
from tevo.contracts import Position, Residual, Sublayer

CARD = Card(
    id="b2t_connection",
    role="residual",
    summary="Post-norm plus a connection from the block's input to its last norm.",
    equations=(
        r"a_s = N_s(a_{s-1} + F_s(a_{s-1})),\quad a_0 = x,\quad s < S",
        r"y = N_S(x + a_{S-1} + F_S(a_{S-1}))",
    ),
    exports={"b2t_connection": "B2T"},
    cost="n",
    parameters="sublayers * (2 * d if norm == 'layer_norm' else d)",
    memory="n",
    examples=({"dim": 12}, {"dim": 5, "norm": "rms_norm", "sublayers": 3}, {"dim": 3, "depth": 6, "sublayers": 4}),
    equals=(
        "takase/b2t_connection TransformerEncoderLayer and TransformerDecoderLayer; values in "
        "tests/golden/b2t_connection_a.npz",
    ),
    departures=(
        "The initial scaling leaves position parts alone, which may serve several blocks; in the released code positions "
        "stand outside the layers.",
    ),
    notes="As post-norm, it wants a warm-up of the learning rate.",
)


class B2T(Residual):
    """B2T wiring.

    Args:
        dim: width d.
        norm: a norm's name or class.
        sublayers: number S of sublayers in the block, >= 2.
        depth: blocks in the stack, for the initial scaling; None scales nothing.
    """

    def __init__(self, *, dim: int, norm: str = "layer_norm", sublayers: int = 2, depth: int | None = None) -> None:
        super().__init__()
        if sublayers < 2:
            raise ValueError(
                f"B2T got sublayers={sublayers}; its connection skips all sublayers but the last, so there must be at least "
                "2 (with 1, use post_norm)"
            )
        self.depth = depth
        self.norms = nn.ModuleList(create(norm, facts={"dim": dim}) for _ in range(sublayers))

    def forward(self, x: Tensor, sublayers: Sequence[Sublayer]) -> Tensor:
        """(b, n, d) through all sublayers."""
        a, last = x, len(self.norms) - 1
        for s, (norm, sublayer) in enumerate(zip(self.norms, sublayers, strict=True)):
            y = a + sublayer(a)
            a = norm(x + y if s == last else y)
        return a

    def initialise(self, block: nn.Module) -> None:
        """Every matrix of the block is multiplied by depth^-1/2, as the released code does in the layer; vectors are not."""
        if self.depth is None:
            return
        apart = {id(p) for module in block.modules() if isinstance(module, Position | B2T) for p in module.parameters()}
        with torch.no_grad():
            for parameter in block.parameters():
                if parameter.ndim > 1 and id(parameter) not in apart:
                    parameter.mul_(self.depth**-0.5)
