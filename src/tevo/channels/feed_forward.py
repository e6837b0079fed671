"""Feed-forward: two linear maps with a nonlinearity between.

    FFN(x) = act(x W_1 + b_1) W_2 + b_2

Source: 1706.03762, section 3.3 (ReLU); 1810.04805 (GELU).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import ChannelMixer

CARD = Card(
    id="feed_forward",
    role="channel",
    summary="Two linear maps with a nonlinearity between, for each token alone.",
    equations=(r"\mathrm{FFN}(x) = \phi(x W_1 + b_1)\, W_2 + b_2",),
    exports={"feed_forward": "GELU", "gelu": "GELU", "relu": "ReLU"},
    cost="n",
    flops="4 * n * d * (hidden_dim or 4 * d)",
    parameters="2 * d * (hidden_dim or 4 * d) + bias * ((hidden_dim or 4 * d) + d)",
    memory="n",
    claims=("token_wise",),
    examples=({"dim": 12}, {"dim": 5, "hidden_dim": 7}, {"dim": 3, "hidden_dim": 2, "bias": False}),
    equals=("transformers 5.23.0 T5DenseActDense (ReLU, no biases); values in tests/golden/glu_variants_a.npz",),
)


class _FeedForward(ChannelMixer):
    """The two maps; the nonlinearity is each class's own."""

    def __init__(self, *, dim: int, hidden_dim: int | None = None, bias: bool = True) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.into = nn.Linear(dim, hidden_dim, bias=bias)
        self.out = nn.Linear(hidden_dim, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform matrices and zero biases, as in the Transformer's released code."""
        for linear in (self.into, self.out):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class GELU(_FeedForward):
    """Feed-forward with the erf form of GELU.

    Args:
        dim: width d.
        hidden_dim: width between the maps; by default 4 dim, the paper's ratio.
        bias: whether the maps have biases.
    """

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d); tokens are independent, so a mask changes nothing."""
        return self.out(F.gelu(self.into(x)))


class ReLU(_FeedForward):
    """Feed-forward with ReLU; arguments as for :class:`GELU`."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d); tokens are independent, so a mask changes nothing."""
        return self.out(F.relu(self.into(x)))
