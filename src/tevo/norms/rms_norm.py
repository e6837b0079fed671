"""RMSNorm: each token's features are scaled to unit root mean square and given a gain; no centring, no bias.

    y = x / sqrt(mean(x^2) + eps) * g

Source: 1910.07467, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.functional.norms import rms_norm

CARD = Card(
    id="rms_norm",
    role="norm",
    summary="Scales each token's features to unit root mean square, then a gain.",
    equations=(r"y = \frac{x}{\sqrt{\frac{1}{d}\sum_i x_i^2 + \epsilon}} \odot g",),
    exports={"rms_norm": "RMSNorm"},
    cost="n",
    parameters="d",
    memory="n",
    claims=("token_wise",),
    examples=({"dim": 12}, {"dim": 5, "eps": 1e-3}, {"dim": 1}),
)


class RMSNorm(nn.Module):
    """Root mean square normalisation.

    Args:
        dim: width d.
        eps: added to the mean square.
    """

    def __init__(self, *, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Gain one, as in the paper."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) gives (..., d)."""
        return rms_norm(x, self.weight, self.eps)
