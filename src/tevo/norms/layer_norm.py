"""LayerNorm: each token's features are centred and scaled to unit variance, then given a gain and a bias.

    y = (x - mean(x)) / sqrt(var(x) + eps) * g + b

Source: 1607.06450, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card

CARD = Card(
    id="layer_norm",
    role="norm",
    summary="Centres and scales each token's features, then gain and bias.",
    equations=(r"y = \frac{x - \mu(x)}{\sqrt{\sigma^2(x) + \epsilon}} \odot g + b",),
    exports={"layer_norm": "LayerNorm"},
    cost="n",
    parameters="2 * d",
    memory="n",
    claims=("token_wise",),
    examples=({"dim": 12}, {"dim": 5, "eps": 1e-3}, {"dim": 2}),
)


class LayerNorm(nn.Module):
    """Layer normalisation.

    Args:
        dim: width d.
        eps: added to the variance.
    """

    def __init__(self, *, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Gain one, bias zero, as in the paper."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) gives (..., d)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
